"""Fields of an answer's head (RFC 9110)."""

from __future__ import annotations

import math
import time
from datetime import UTC
from email.utils import parsedate_to_datetime

MAX_RETRY_AFTER_S = 86_400.0  # longest wait that is honoured: a day


def retry_after(value: str | None) -> float | None:
    """Return the seconds that a Retry-After field asks to wait, whether it names them or a date (section 10.2.3).

    None if there is no such field, or nothing can be read from it.
    """
    text = (value or "").strip()
    try:
        seconds = float(text)
    except ValueError:
        try:
            when = parsedate_to_datetime(text)
        except (TypeError, ValueError, OverflowError):
            return None
        seconds = when.replace(tzinfo=when.tzinfo or UTC).timestamp() - time.time()
    return None if math.isnan(seconds) else min(max(0.0, seconds), MAX_RETRY_AFTER_S)
