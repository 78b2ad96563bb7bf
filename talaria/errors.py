"""What goes wrong around a dispatch rather than in it, and how errors are told."""


class ServerError(Exception):
    """The server can't be started or reached; the text says what to do. Exit code 3."""


class Refused(Exception):
    """The API answered no; the text says what to change. `code` is the exit code that a command ends with."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def one_line(message: str) -> str:
    """Return a message of several lines, each of which says what is wrong, as one."""
    return "; ".join(" ".join(one.split()) for one in message.splitlines() if one.strip())


def prefect_away(url: str) -> str:
    """Return the words for a Prefect server that the environment names, as a shell may long after it was of use."""
    return f"no Prefect server answers at PREFECT_API_URL={url}: start it, or unset that variable to use Talaria's own"
