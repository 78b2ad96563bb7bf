"""DICOM upper layer and DIMSE: associations, C-STORE, C-FIND, C-GET, C-MOVE, storage commitment. For `tasks/dicom*.py`.

connection      transport, entity, association (pynetdicom), direct (bytes), answer, stream, message, asking, contexts
C-STORE         fleet (all associations), backlog, conveyor (one association), store (bytes), pace, status
C-FIND          query, search, parts, accessions, identifier, find (what a peer has of what was sent)
C-GET, C-MOVE   pull, series, offers, get, receive, moves, scp (our Storage SCP), acceptance
modalities      intake (who, and what is complete), senders, served (one association), keeping (names on disk),
                receivers (processes that receive beside the listener), receiver (one of them), committing
commitment      commitment, listener, ports
"""
