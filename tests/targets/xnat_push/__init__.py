"""Pushes to XNAT, from labels to the archive."""
