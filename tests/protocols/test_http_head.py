"""Heads of HTTP answers: what their fields say."""

from __future__ import annotations

import pytest

from protocols.http.head import MAX_RETRY_AFTER_S, retry_after


@pytest.mark.parametrize(
    ("field", "seconds"),
    [
        ("120", 120),
        (" 0 ", 0),
        ("1.5", 1.5),
        ("-3", 0),
        ("1e300", MAX_RETRY_AFTER_S),
        ("inf", MAX_RETRY_AFTER_S),
        ("nan", None),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0),
        ("Wed, 21 Oct 2065 07:28:00 GMT", MAX_RETRY_AFTER_S),
        ("Wed, 21 Oct 2065 07:28:00 -0000", MAX_RETRY_AFTER_S),
        ("Wed, 99 Oct 2065", None),
        ("soon", None),
        ("", None),
        (None, None),
    ],
)
def test_retry_after(field: str | None, seconds: float | None) -> None:
    assert retry_after(field) == seconds
