"""Which presentation contexts to request.

One context per (SOP class, transfer syntax), so that the answer shows for each syntax whether the peer accepts it: from
several syntaxes in one context it would choose a single one (PS3.8 section 9.3.3.2).
"""

from __future__ import annotations

from collections.abc import Iterable

from pydicom.uid import UID

from imaging.transcode import fallbacks
from protocols.dimse.association import MAX_CONTEXTS

# What every peer should take. Asked for even if nothing may be converted: the answer is part of the rejection.
UNCOMPRESSED = ("1.2.840.10008.1.2.1", "1.2.840.10008.1.2")

Pair = tuple[str, str]  # SOP class, transfer syntax


def groups(needed: Iterable[Pair], policy: str, room: int = MAX_CONTEXTS, *, apart: bool = False) -> list[list[Pair]]:
    """Distribute the contexts that a plan needs over as few associations as possible.

    Args:
        needed: what the plan's instances have.
        policy: what they may be converted to, as in `imaging.transcode`.
        room: contexts in one association.
        apart: whether each SOP class gets an association of its own.

    Returns:
        One list per association. All contexts of a SOP class are in the same list: what the plan holds first, then
        what that may be converted to.
    """
    by_class: dict[str, dict[str, None]] = {}
    for sop_class, syntax in needed:
        by_class.setdefault(sop_class, {})[syntax] = None
    made: list[list[Pair]] = []
    for sop_class, held in by_class.items():
        wanted = dict.fromkeys((*held, *UNCOMPRESSED))
        for syntax in held:
            wanted |= dict.fromkeys(fallbacks(syntax, policy))
        pairs = [(sop_class, syntax) for syntax in wanted][:room]
        if apart or not made or len(made[-1]) + len(pairs) > room:
            made.append([])
        made[-1].extend(pairs)
    return made


def of_class(pairs: Iterable[Pair], sop_class: str) -> list[str]:
    """Return the transfer syntaxes among these pairs for a SOP class."""
    return [syntax for each, syntax in pairs if each == sop_class]


def names(uids: Iterable[str]) -> str:
    """Return the names of transfer syntaxes or SOP classes for people."""
    return ", ".join(UID(uid).name for uid in uids) or "none"
