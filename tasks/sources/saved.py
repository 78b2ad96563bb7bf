"""Sources as Prefect keeps them: found by name over all types, loaded, saved and removed (`tasks.documents`)."""

from __future__ import annotations

from blocks import SOURCES, Source
from tasks.documents import Documents

KEPT = Documents(Source, SOURCES)
