"""DICOMweb as a client. For `tasks/dicomweb/`.

shared     service (where it is, what a status means), client (dicomweb-client over our connections)
STOW-RS    stow, stow_body, stow_answer, stow_doubts
QIDO-RS    qido (what a query matches), pages (all pages of one search)
WADO       wado, wado_uri, readback (compares what a server has with what it was sent)
"""
