"""Folders that answer queries: their index, and what it answers."""
