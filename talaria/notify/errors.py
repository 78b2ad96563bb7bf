"""What keeps a message from being sent."""

from __future__ import annotations


class NotSent(Exception):
    """A message was not taken; it is tried again later. The sentence says why, and what to change.

    Args:
        after_s: seconds that the other side asks to wait.
    """

    def __init__(self, words: str, after_s: float = 0.0) -> None:
        super().__init__(words)
        self.after_s = after_s
