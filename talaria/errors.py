"""What goes wrong around a dispatch rather than in it."""


class ServerError(Exception):
    """The server can't be started or reached; the text says what to do. Exit code 3."""


class Refused(Exception):
    """The API answered no; the text says what to change. `code` is the exit code that a command ends with."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code
