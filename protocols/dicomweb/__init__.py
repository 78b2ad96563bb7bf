"""DICOMweb as a client: STOW-RS, QIDO-RS, WADO-RS, and comparing what a server has with what it was sent."""
