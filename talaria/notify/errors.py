"""What keeps a message from being sent."""

from __future__ import annotations

import os

from transfer import silent


class NotSent(Exception):
    """A message was not taken; it is tried again later. The sentence says why, and what to change.

    Args:
        after_s: seconds that the other side asks to wait.
    """

    def __init__(self, words: str, after_s: float = 0.0) -> None:
        super().__init__(words)
        self.after_s = after_s


async def check_answers(path: str) -> None:
    """Check that the file system of a path answers: who looks there else would not come back, and nobody be answered.

    Raises:
        NotSent: it does not.
    """
    if path not in await silent.looked(os.path.exists, [path]):
        raise NotSent(f"{path}: its file system does not answer: is the server of its share away?")
