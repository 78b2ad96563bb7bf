"""Which presentation contexts to ask for, and which one to use.

One context per (SOP class, transfer syntax), so that the answer tells of each syntax whether the peer takes it: of
several syntaxes in one context it would choose a single one (PS3.8 section 9.3.3.2).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

from pydicom.uid import UID

from protocols.dimse.association import MAX_CONTEXTS

EXPLICIT_LITTLE, IMPLICIT_LITTLE = "1.2.840.10008.1.2.1", "1.2.840.10008.1.2"
DEFLATED_LITTLE = "1.2.840.10008.1.2.1.99"
# What every peer should take; the explicit one keeps the value representations of private elements.
UNCOMPRESSED = (EXPLICIT_LITTLE, IMPLICIT_LITTLE)
# What a peer that stores compressed data only may take instead, best known first.
LOSSLESS = (
    "1.2.840.10008.1.2.4.90",  # JPEG 2000, lossless only
    "1.2.840.10008.1.2.4.80",  # JPEG-LS lossless
    "1.2.840.10008.1.2.5",  # RLE
)

Pair = tuple[str, str]  # SOP class, transfer syntax


def groups(needed: Iterable[Pair], fallbacks: Sequence[str]) -> list[list[Pair]]:
    """Distribute the contexts that a plan needs over as few associations as hold them (128 each).

    Args:
        needed: what the plan's instances have.
        fallbacks: syntaxes to ask for beside, for every SOP class.

    Returns:
        One list per association. All contexts of a SOP class are in the same list.
    """
    by_class: dict[str, list[str]] = {}
    for sop_class, syntax in needed:
        syntaxes = by_class.setdefault(sop_class, [])
        if syntax not in syntaxes:
            syntaxes.append(syntax)
    made: list[list[Pair]] = []
    for sop_class, syntaxes in by_class.items():
        wanted = [*syntaxes, *(syntax for syntax in fallbacks if syntax not in syntaxes)][:MAX_CONTEXTS]
        pairs = [(sop_class, syntax) for syntax in wanted]
        if not made or len(made[-1]) + len(pairs) > MAX_CONTEXTS:
            made.append([])
        made[-1].extend(pairs)
    return made


def offered(pairs: Iterable[Pair], sop_class: str) -> list[str]:
    """The transfer syntaxes among these pairs for a SOP class."""
    return [syntax for each, syntax in pairs if each == sop_class]


def conversions(accepted: Mapping[Pair, int], sop_class: str, allowed: Collection[str]) -> list[str]:
    """The accepted syntaxes that an instance may be converted to, best first."""
    return [syntax for syntax in (*UNCOMPRESSED, *LOSSLESS) if syntax in allowed and (sop_class, syntax) in accepted]


def names(syntaxes: Iterable[str]) -> str:
    """Name transfer syntaxes or SOP classes for people."""
    return ", ".join(UID(syntax).name for syntax in syntaxes) or "none"
