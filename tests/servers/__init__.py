"""Servers that tests talk to: real ones, and scripted ones for what real ones don't do on demand."""
