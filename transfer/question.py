"""A question to a file system, asked in a thread: where the server of a share is away, it may never be answered."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Question(Generic[T]):
    """Asked as soon as it is made.

    Args:
        ask: returns the answer, or raises OSError.
        name: of the thread.

    Attributes:
        answer: None until there is one.
        error: what was raised in its place.
        begun, ended: when it was asked, and answered; `time.monotonic`.
    """

    def __init__(self, ask: Callable[[], T], name: str) -> None:
        self.answer: T | None = None
        self.error: OSError | None = None
        self.begun, self.ended = time.monotonic(), 0.0
        self._ask = ask
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)
        self._thread.start()

    def _main(self) -> None:
        try:
            self.answer = self._ask()
        except OSError as exc:
            self.error = exc
        self.ended = time.monotonic()

    @property
    def is_open(self) -> bool:
        """Whether it has not been answered."""
        return self._thread.is_alive()

    def wait(self, seconds: float) -> None:
        """Wait for the answer, but no longer than that."""
        self._thread.join(seconds)
