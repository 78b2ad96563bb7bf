"""Folder targets: what becomes of files, folders, links and disks."""
