"""What a target, a source or a rule is: one Prefect block per type.

Importing this package registers all types with Prefect, including those of other packages, so that a saved document
loads as its own class.
"""

from __future__ import annotations

from blocks.base import Direction, Target
from blocks.dicom import DicomTarget
from blocks.dicom_source import DicomSource
from blocks.dicom_tls import DicomTlsTarget
from blocks.dicomweb import DicomWebTarget
from blocks.extensions import Extension, load
from blocks.folder import FolderTarget
from blocks.inbox import InboxSource
from blocks.list_source import ListSource
from blocks.rsync import RsyncTarget
from blocks.rule import CommandRule, EmailRule, Rule, WebhookRule
from blocks.s3 import S3Target
from blocks.sftp import SftpTarget
from blocks.source import Source
from blocks.xnat import XnatTarget

_CLASSES: tuple[type[Target], ...] = (
    DicomTarget,
    DicomTlsTarget,
    DicomWebTarget,
    FolderTarget,
    RsyncTarget,
    S3Target,
    SftpTarget,
    XnatTarget,
)
_OWN = {cls.type_name: cls for cls in _CLASSES}
EXTENSIONS, REFUSED = load(_OWN)  # types of other packages; those that can't be used, with the reason
TYPES: dict[str, type[Target]] = _OWN | {name: one.block for name, one in EXTENSIONS.items()}
SOURCES: dict[str, type[Source]] = {cls.type_name: cls for cls in (InboxSource, ListSource, DicomSource)}
RULES: dict[str, type[Rule]] = {cls.type_name: cls for cls in (WebhookRule, EmailRule, CommandRule)}

__all__ = ["EXTENSIONS", "REFUSED", "RULES", "SOURCES", "TYPES", "Direction", "Extension", "Rule", "Source", "Target"]
