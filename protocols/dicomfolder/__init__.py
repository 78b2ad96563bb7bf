"""A folder that is queried like a DICOMweb server: index, scan, storing, fetching. For `tasks/dicomweb/folder.py`."""
