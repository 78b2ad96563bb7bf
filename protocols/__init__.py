"""One package for each wire protocol, without targets and Prefect; drivers (`tasks`) use them.

All of them may use `net`, `http` and `files`; apart from these they don't know each other.
"""
