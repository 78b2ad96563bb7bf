"""pynetdicom's application entity, for peers that connect: its sockets are closed, whatever ended the connection."""

from __future__ import annotations

from typing import Any

import pynetdicom
from pynetdicom.transport import AssociationSocket


class _Socket(AssociationSocket):
    def _shutdown_socket(self) -> None:
        """Close the socket; pynetdicom's leaves it open where it was never connected or was reset: `shutdown` fails."""
        sock = self.socket
        super()._shutdown_socket()
        if sock is not None:
            sock.close()


class AE(pynetdicom.AE):
    """Associates as pynetdicom's does."""

    def _create_socket(self, assoc: Any, address: Any, tls_args: Any) -> AssociationSocket:
        sock = _Socket(assoc, address=address)
        sock.tls_args = tls_args
        return sock
