"""DICOM upper layer and DIMSE: associations, C-STORE from disk, storage commitment."""
