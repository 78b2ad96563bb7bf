"""Runs the stand-in in a process of its own: python -m tests.servers.xnat --port 8080 [--folder DIR]."""

from __future__ import annotations

import argparse
import threading
from pathlib import Path

from tests.servers.xnat import xnat


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--folder", type=Path, help="where files go; without it their contents are thrown away")
    arguments = parser.parse_args()
    with xnat(arguments.folder, port=arguments.port) as server:
        print(server.url, flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
