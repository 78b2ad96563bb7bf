"""Tests for types of target, of this repository or another package: the conformance suite and what it needs.

A package that adds a type (`docs/ninth-target.md`) tests it with a file of two lines:

    from talaria.testing.conformance import *
    from talaria_webdav.harness import HARNESSES

harness what the suite must know about a type: a server, and how to see what it holds
conformance  the suite: every case against every harness
cases        its cases, by what they are about
studies      makes small studies, with odd names, damaged files and what no log may show
process      starts real servers on loopback
relay        delays, cuts and stalls what passes between a driver and its server

It needs what `talaria[testing]` installs, and nothing of this repository's `tests/`.
"""

import pytest

# Before it is imported: its assertions explain themselves as those of a test file do.
pytest.register_assert_rewrite("talaria.testing.conformance", "talaria.testing.cases", "talaria.testing.harness")
