"""DICOM as bytes: headers, character sets, recoding, pixels, transcoding, JSON, matching. No network, no Prefect.

Everybody may use it.
"""
