"""A series to retrieve, and what is known about it before and during the retrieval."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace

from imaging.header import UID, Header
from protocols.dimse.contexts import Pair
from protocols.dimse.get import FinalResponse, Retriever
from protocols.dimse.offers import CLASSES_OF, OTHER_CLASSES_OF, SYNTAXES

Images = dict[str, tuple[str, tuple[str, ...]]]  # SOP class and transfer syntaxes by SOP instance UID


@dataclass(eq=False)
class PulledSeries:
    """A series to retrieve, or a part of one.

    Attributes:
        announced: how many instances the peer says that it has, None if it doesn't say.
        images: what the peer lists; None if it lists nothing, or was not asked.
        patient, charset: Patient ID, for peers of Patient Root, and the character set in which the peer takes it.
        listed: whether the peer was asked to list it.
        all_listed: whether `images` is all that the peer has, as far as is known.
        proven: whether that was looked into though nothing showed a limit.
        doubtful: whether more must be known about it before it is requested again.
        moves: why it is retrieved by C-MOVE, though others may come by C-GET.
        is_part: whether it is to be asked for by `images` only.
        answers: the peer's final responses.
        refused: how many instances were not taken, by reason.
        asked: contexts that were requested of C-GET; an association has not room for any number.
        granted: those of them that the peer accepted.
        unwanted: instances that came and were not taken.
    """

    study: str
    uid: str
    announced: int | None = None
    images: Images | None = None
    patient: str = field(default="", repr=False)
    charset: str = ""
    modality: str = ""
    listed: bool = False
    all_listed: bool = False
    proven: bool = False
    doubtful: bool = False
    moves: str = ""
    is_part: bool = False
    answers: list[FinalResponse] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)
    asked: set[Pair] = field(default_factory=set)
    granted: set[Pair] = field(default_factory=set)
    unwanted: set[str] = field(default_factory=set)

    def classes(self, of: Collection[str] | None = None) -> dict[str, tuple[str, ...]]:
        """Return the SOP classes of its instances, with the syntaxes that the peer names: as listed, or as usual.

        Args:
            of: only those of these instances.
        """
        found: dict[str, dict[str, None]] = {}
        images = self.images or {}
        listed = images.values() if of is None else [images[uid] for uid in of if uid in images]
        for sop_class, syntaxes in listed:
            if UID.fullmatch(sop_class):
                found.setdefault(sop_class, {}).update(dict.fromkeys(syntaxes))
        if not found:
            usual = CLASSES_OF.get(self.modality) or (OTHER_CLASSES_OF.get(self.modality) if self.listed else None)
            return dict.fromkeys(usual or (), ())
        return {sop_class: tuple(syntaxes) for sop_class, syntaxes in found.items()}

    def was_asked(self, retriever: Retriever) -> None:
        """Note the contexts of an association on which it is asked for."""
        self.asked |= retriever.pairs
        self.granted |= retriever.granted

    def untried(self, uids: Iterable[str]) -> bool:
        """Return True if contexts for some of these instances have not been requested yet, as far as they are named."""
        images = self.images or {}
        return any(
            UID.fullmatch(sop_class) and any((sop_class, syntax) not in self.asked for syntax in (*syntaxes, *SYNTAXES))
            for sop_class, syntaxes in (images.get(uid, ("", ())) for uid in uids)
        )

    def may_come_otherwise(self, missing: Iterable[str]) -> bool:
        """Return True if C-GET may not bring something because it has no context for it, and C-MOVE may.

        Args:
            missing: instances that are listed, and did not come.
        """
        images, listed = self.images or {}, list(missing)
        for uid in listed:
            sop_class, syntaxes = images.get(uid, ("", ()))
            if uid not in self.unwanted and not any((sop_class, syntax) in self.granted for syntax in syntaxes):
                return True
        if listed or (images and all(UID.fullmatch(sop_class) for sop_class, _ in images.values())):
            return False
        last = self.answers[-1] if self.answers else None  # how many are missing, the peer's counts say
        fails = last is not None and bool(last.failed or last.status) and not self.unwanted
        return fails or self.modality not in CLASSES_OF

    def refuses(self, header: Header) -> str:
        """Return why an instance is not wanted; "" if it is."""
        if header.StudyInstanceUID == self.study and header.SeriesInstanceUID == self.uid:
            return ""
        return "" if self.images and header.SOPInstanceUID in self.images else "of another series than was asked for"

    def has_class(self, uid: str, classes: Collection[str]) -> bool:
        """Return False if an instance is listed with another SOP class than these."""
        sop_class = (self.images or {}).get(uid, ("", ()))[0]
        return not UID.fullmatch(sop_class) or sop_class in classes

    def divided(self, uids: Sequence[str], count: int) -> list[PulledSeries]:
        """Return some instances of a listed series as so many jobs of their own, whose answers are the series'."""
        images, each = self.images or {}, -(-len(uids) // count)
        parts = ({uid: images[uid] for uid in uids[start : start + each]} for start in range(0, len(uids), each))
        return [replace(self, announced=None, images=one, is_part=True) for one in parts]
