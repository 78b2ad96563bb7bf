"""How many connections pay for small objects.

To a near store the time of a small object is spent in this process, where threads only wait for each other (measured:
2,000 of 35 kB take a sixth longer with four than with one); to a far one it is spent waiting, which threads do at the
same time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from transfer.meter import Meter
from transfer.plan import Item

SMALL_BYTES = 128 << 10  # on average: larger ones are hashed and sent without the interpreter's lock
MANY = 200  # objects; for fewer it is not worth finding out
TIMED = 4  # objects that are timed, after a first one that makes the connection


def useful(items: Sequence[Item], most: int, send: Callable[[], None]) -> int:
    """Return how many connections pay, at most `most`; send some objects to find out if that is not known.

    Args:
        send: sends the next one.
    """
    if most == 1 or len(items) < MANY or sum(item.size for item in items) > SMALL_BYTES * len(items):
        return most
    send()
    meter, shares = Meter(), []
    try:
        for _ in range(TIMED):
            send()
            shares.append(meter.share())
    finally:
        meter.close()
    return max(1, min(most, int(1 / max(*shares, 1 / most))))
