"""QIDO-RS and WADO-RS: queries, retrievals, verification."""
