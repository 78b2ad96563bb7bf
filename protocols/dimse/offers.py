"""Which storage contexts a retrieval by C-GET requests: an association has room for 126."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from protocols.dimse.association import MAX_CONTEXTS
from protocols.dimse.contexts import Pair

# The syntaxes that instances come in; asked for in contexts of their own, or the peer would choose one for a class.
SYNTAXES = (
    "1.2.840.10008.1.2.1", "1.2.840.10008.1.2", "1.2.840.10008.1.2.4.70", "1.2.840.10008.1.2.4.90",
    "1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.51", "1.2.840.10008.1.2.4.80", "1.2.840.10008.1.2.5",
    "1.2.840.10008.1.2.4.91", "1.2.840.10008.1.2.4.57", "1.2.840.10008.1.2.4.81", "1.2.840.10008.1.2.1.99",
    "1.2.840.10008.1.2.2", "1.2.840.10008.1.2.4.201", "1.2.840.10008.1.2.4.202", "1.2.840.10008.1.2.4.203",
    "1.2.840.10008.1.2.4.102", "1.2.840.10008.1.2.4.103", "1.2.840.10008.1.2.4.100", "1.2.840.10008.1.2.4.101",
    "1.2.840.10008.1.2.4.104", "1.2.840.10008.1.2.4.105", "1.2.840.10008.1.2.4.106", "1.2.840.10008.1.2.4.107",
    "1.2.840.10008.1.2.4.108", "1.2.840.10008.1.2.4.92", "1.2.840.10008.1.2.4.93", "1.2.840.10008.1.2.4.110",
    "1.2.840.10008.1.2.4.111", "1.2.840.10008.1.2.4.112", "1.2.840.10008.1.2.1.98",
)  # fmt: skip
USUAL = 8  # of the syntaxes, from the first: as many as there is room for where fifteen classes are asked for
# For series of which the peer doesn't list the instances: what most studies are made of.
USUAL_CLASSES = (
    "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.2.1", "1.2.840.10008.5.1.4.1.1.4",
    "1.2.840.10008.5.1.4.1.1.4.1", "1.2.840.10008.5.1.4.1.1.1", "1.2.840.10008.5.1.4.1.1.1.1",
    "1.2.840.10008.5.1.4.1.1.1.2", "1.2.840.10008.5.1.4.1.1.6.1", "1.2.840.10008.5.1.4.1.1.3.1",
    "1.2.840.10008.5.1.4.1.1.7", "1.2.840.10008.5.1.4.1.1.12.1", "1.2.840.10008.5.1.4.1.1.20",
    "1.2.840.10008.5.1.4.1.1.128", "1.2.840.10008.5.1.4.1.1.88.33", "1.2.840.10008.5.1.4.1.1.11.1",
)  # fmt: skip

# What series of a modality are made of, as good as always. Of other series the peer is asked for its instances before.
CLASSES_OF = {
    modality: tuple(f"1.2.840.10008.5.1.4.1.1.{number}" for number in numbers.split())
    for modality, numbers in {
        "CT": "2 2.1 7 2.2", "MR": "4 4.1 7 4.2 4.3 4.4", "CR": "1 1.1 7", "DX": "1.1 1 1.1.1 7",
        "MG": "1.2 13.1.3 7 1.2.1", "US": "6.1 3.1 7 6.2 6 3", "NM": "20 7 5", "PT": "128 130 7 128.1",
        "XA": "12.1 12.1.1 7 13.1.1", "RF": "12.2 12.2.1 7",
    }.items()
}  # fmt: skip
# And those of other ones, of more than one kind: only where the peer doesn't name the class of any of their instances.
OTHER_CLASSES_OF = {
    modality: tuple(f"1.2.840.10008.5.1.4.1.1.{number}" for number in numbers.split())
    for modality, numbers in {
        "SR": "88.22 88.11 88.33 88.34 88.67 88.35 88.50 88.65 88.69 88.40 88.59 88.68 88.72 88.73 88.76",
        "KO": "88.59", "PR": "11.1 11.2 11.3 11.4 11.5 11.8", "DOC": "104.1 104.2 104.3 104.4 104.5",
        "M3D": "104.3 104.4", "RTSTRUCT": "481.3", "RTDOSE": "481.2", "RTPLAN": "481.5 481.8", "RTIMAGE": "481.1",
        "RTRECORD": "481.4 481.6 481.7 481.9", "SEG": "66.4 66.5", "REG": "66.1 66.3", "FID": "66.2",
        "ECG": "9.1.1 9.1.2 9.1.3", "HD": "9.2.1 9.1.2", "EPS": "9.3.1 9.1.2", "AU": "9.4.1 9.4.2",
        "OT": "7 7.1 7.2 7.3 7.4 104.1 66", "SC": "7 7.1 7.2 7.3 7.4", "ES": "77.1.1 77.1.1.1 77.1.4 7",
        "XC": "77.1.4 77.1.4.1 7", "GM": "77.1.2 77.1.2.1 7", "SM": "77.1.6 77.1.3 77.1.2 7",
        "OP": "77.1.5.1 77.1.5.2 77.1.4 7", "OPT": "77.1.5.4 7 104.1", "IO": "1.3 1.3.1 1.1 1 7", "PX": "1.1 1.3 1 7",
        "IVUS": "3.1 6.1 7", "IVOCT": "14.1 14.2 7",
    }.items()
}  # fmt: skip


def pairs_for(classes: Mapping[str, Iterable[str]], asked: Collection[Pair] = ()) -> list[Pair]:
    """Return the storage contexts to request for SOP classes, each with the syntaxes that are known of it (or none).

    One context per class and syntax: of several syntaxes in one the peer would choose for all of a class. What a peer
    names comes first; the rest of the 126 places is divided.

    Args:
        asked: those that have been requested: others come before them.
    """
    wanted = dict.fromkeys((sop_class, syntax) for sop_class, syntaxes in classes.items() for syntax in syntaxes)
    wanted |= dict.fromkeys((sop_class, syntax) for syntax in SYNTAXES for sop_class in classes)
    return sorted(wanted, key=asked.__contains__)[: MAX_CONTEXTS - 2]


def usual_pairs(classes: Mapping[str, Iterable[str]]) -> set[Pair]:
    """Return the storage contexts without which SOP classes are not asked for on an association that there is."""
    return {(sop_class, syntax) for sop_class, syntaxes in classes.items() for syntax in (*syntaxes, *SYNTAXES[:USUAL])}
