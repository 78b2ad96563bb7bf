"""Shared by every protocol: connections, TLS, ping, and what may be shown of a peer's words."""
