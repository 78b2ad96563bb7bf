"""A listener for associations that peers open to us, served by pynetdicom."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, cast

from pydicom.uid import UID
from pynetdicom import AE
from pynetdicom.association import Association
from pynetdicom.transport import RequestHandler, ThreadedAssociationServer

from protocols.dimse.contexts import UNCOMPRESSED
from protocols.dimse.message import VERIFICATION
from protocols.dimse.turns import Turns
from protocols.net.connection import SLICE_S, host_of

HANDSHAKE_S = 10  # for a peer to begin, and to shake hands
IDLE_S = 60  # silence on an association after which it is ended
TLS_HANDSHAKE = b"\x16"  # how a TLS connection begins (RFC 8446 section 5.1); an association begins with 01


class Listener:
    """A port on which peers' associations are served by pynetdicom, in threads of its own.

    Args:
        abstract_syntaxes: of the services that peers report with; C-ECHO is answered too.
        handlers: event handlers of pynetdicom's.

    Attributes:
        turns: who awaits peers over TLS; without anybody, none is answered.
    """

    def __init__(
        self,
        host: str,
        port: int,
        ae_title: str,
        abstract_syntaxes: Sequence[str],
        handlers: Sequence[Any],
    ) -> None:
        ae = AE(ae_title)
        ae.acse_timeout = ae.dimse_timeout = HANDSHAKE_S
        ae.network_timeout = IDLE_S
        for abstract_syntax in abstract_syntaxes:
            # A peer that comes to report is the SCP although it asked for the association (PS3.7 Annex D.3.3.4).
            ae.add_supported_context(
                UID(abstract_syntax), [UID(each) for each in UNCOMPRESSED], scu_role=True, scp_role=True
            )
        ae.add_supported_context(VERIFICATION)
        self._server = cast(
            _Server,
            ae.make_server((host, port), evt_handlers=list(handlers), server_class=_Server, request_handler=_Handler),
        )
        ae._servers.append(self._server)  # what `start_server` does, which knows no server class
        self.turns = self._server.turns = Turns()
        self.port = int(self._server.server_address[1])
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(SLICE_S,), name="dicom-listener", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Stop listening, and break open associations."""
        self._server.shutdown()
        for assoc in self._server.active_associations:
            with suppress(OSError, AttributeError):  # it may end by itself meanwhile
                assoc.dul.socket.socket.shutdown(socket.SHUT_RDWR)  # type: ignore[union-attr]
            assoc.kill()
        self._thread.join(HANDSHAKE_S)


class _Server(ThreadedAssociationServer):
    turns: Turns
    daemon_threads = True


class _Handler(RequestHandler):
    """Begins TLS, if the peer does, in the connection's own thread; pynetdicom's server would block meanwhile."""

    def _create_association(self) -> Association:
        assoc = super()._create_association()
        assoc.dul.daemon = True  # else a peer that stays keeps the process alive
        return assoc

    def handle(self) -> None:
        """Serve a connection, if it begins with TLS or an association request."""
        sock = self.request
        try:
            sock.settimeout(HANDSHAKE_S)
            first = sock.recv(1, socket.MSG_PEEK)
            context = self._context() if first == TLS_HANDSHAKE else None
            if context is not None:
                sock = self.request = context.wrap_socket(sock, server_side=True)
            elif first != b"\x01":
                raise ConnectionAbortedError
            sock.settimeout(IDLE_S)  # also of half a PDU, which pynetdicom would wait for without end
        except OSError:
            sock.close()
            return
        super().handle()

    def _context(self) -> ssl.SSLContext | None:
        return self.server.turns.context(host_of(self.client_address)) if isinstance(self.server, _Server) else None
