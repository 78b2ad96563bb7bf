"""XNAT: its REST interface, its answers, and zips that are made while they are sent. For `tasks/xnat/`."""
