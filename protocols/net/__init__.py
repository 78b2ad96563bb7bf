"""Connections, TLS, ping, and what a message may show of a peer's words. Every protocol may use it."""
