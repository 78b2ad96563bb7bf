"""Imports of what is large: with Prefect come half a million objects, which stay as long as the process."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def staying() -> Iterator[None]:
    """Look for no garbage within the block, and never for any among what is there at its end."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.freeze()
