"""Protocols, each against real or scripted servers."""
