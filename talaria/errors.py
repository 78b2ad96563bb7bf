"""What goes wrong around a dispatch rather than in it."""


class ServerError(Exception):
    """The server can't be started or reached; the text says what to do. Exit code 3."""
