"""Entry point of the `talaria` command."""

from __future__ import annotations

from talaria.cli import app


def main() -> None:
    """Run the command line."""
    app()


if __name__ == "__main__":
    main()
