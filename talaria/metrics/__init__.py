"""Figures for monitoring, at `/metrics` of the front door: gathered at most each ten seconds, whoever asks.

`gather` collects them, `families` writes them as Prometheus reads them; `certificates` and `disks` are also what rules
that write to people look at (`talaria.notify`).
"""
