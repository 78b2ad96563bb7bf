"""A folder that is queried like a DICOMweb server: its index, its scan, what is put into it and fetched from it."""
