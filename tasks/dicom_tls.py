"""DICOM targets behind TLS: the same as DICOM targets except for the connection, which `protocols.dimse` makes."""

from __future__ import annotations

from blocks.dicom_tls import DicomTlsTarget
from tasks.dicom import check, check_move, find, push, retrieve
from tasks.driver import Driver, Facts
from transfer.receipt import Level

driver: Driver[DicomTlsTarget] = Driver(
    target=DicomTlsTarget,
    check=check,
    push=push,
    find=find,
    retrieve=retrieve,
    check_move=check_move,
    facts=Facts(dicom_only=True, reconnects=True, verifies_by=(Level.ACCEPTED, Level.LISTED, Level.PROVEN)),
)
