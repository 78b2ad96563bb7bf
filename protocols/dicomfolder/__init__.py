"""A folder that is queried like a DICOMweb server: its index, its scan, storing into it and fetching from it."""
