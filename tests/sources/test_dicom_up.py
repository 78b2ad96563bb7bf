"""Modalities beside a running `talaria up`: from an association to the targets, whatever is killed or changed."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from shutil import rmtree
from typing import Any

import pytest
import yaml

from talaria.testing import studies
from talaria.testing.process import free_port, listening
from tests.protocols.intake import refusal, store_until_cut_off
from tests.protocols.test_dimse_intake import associated, data_set, instance_of, sent, stored
from tests.servers.scp import scp
from tests.servers.up import Talaria
from transfer.home import Home
from transfer.listening import listeners

SETTLE_S = 1


class Listener:
    """DICOM sources, and the folders that they deliver to, below one folder of the test's."""

    def __init__(self, up: Talaria, folder: Path) -> None:
        self.up, self.folder = up, folder
        self.names: set[str] = set()

    def shelf(self, name: str) -> Path:
        """Save a folder target; return its folder."""
        path = self.folder / name
        path.mkdir()
        self.up.apply(**{name: {"type": "folder", "folder": str(path), "layout": "{StudyInstanceUID}"}})
        return path

    def apply(self, code: int = 0, **sources: dict[str, Any]) -> str:
        path = self.folder / "sources.yaml"
        base = {"type": "dicom", "host": "127.0.0.1", "settle_s": SETTLE_S, "keep_free": 0}
        path.write_text(yaml.safe_dump({"sources": {name: base | fields for name, fields in sources.items()}}))
        ran = self.up.here("source", "apply", str(path))
        assert ran.returncode == code, ran.stderr
        self.names |= set() if code else set(sources)
        return ran.stderr

    def until_heard(self, port: int, aet: str) -> None:
        """Wait until an AE title is listened for."""

        def answers() -> bool:
            return sent("echoscu", "-aet", "CT1", "-aec", aet, "127.0.0.1", str(port)).returncode == 0

        self.up.until(answers)

    def received(self, name: str) -> list[Path]:
        return list((self.up.home / "received" / name).rglob("*.dcm"))


@pytest.fixture
def listener(up: Talaria, tmp_path: Path) -> Iterator[Listener]:
    one = Listener(up, tmp_path)
    yield one
    for name in one.names:
        for unit in (up.home / "received" / name).glob("*"):
            rmtree(unit, ignore_errors=True)  # with units that wait it is not removed
        up.here("source", "remove", name)


def arrived(shelf: Path) -> set[str]:
    """SOP instance UIDs of what lies in a folder target; not what is just coming."""
    return {path.stem for folder in shelf.glob("[!.]*") for path in folder.glob("*.dcm")}


def test_a_node_behind_talaria_sees_the_modality(listener: Listener, tmp_path: Path) -> None:
    port = free_port()
    with scp() as pacs, scp() as back:
        archive = listener.shelf("archive")
        listener.up.apply(
            pacs={"type": "dicom", "host": "127.0.0.1", "port": pacs.port, "aet_target": "NOT-THIS",
                  "pass_sender_aet": True, "pass_receiver_aet": True},
            back={"type": "dicom", "host": "sender", "port": back.port, "aet_target": back.aet},
        )  # fmt: skip
        listener.apply(
            ct={"port": port, "aet": "ROUTER", "peers": [{"aet": "CT*", "host": "127.0.0.1"}],
                "routes": [{"calling": "CT*", "modality": "CT", "targets": ["pacs"]}, {"targets": ["archive"]},
                           {"called": "ROUTER", "targets": ["back"]}]}
        )  # fmt: skip
        listener.until_heard(port, "ROUTER")
        files = studies.ct(tmp_path / "study", 3)
        done = sent("storescu", "-aet", "CT7", "-aec", "ROUTER", "127.0.0.1", str(port), "+sd", tmp_path / "study")
        assert done.returncode == 0, done.stderr
        wanted = {instance_of(path) for path in files}
        listener.up.until(lambda: pacs.kept.keys() == wanted == back.kept.keys() and arrived(archive) == wanted)
        proposals = [one.proposal for one in pacs.associations if one.proposal is not None]
        assert {(one.calling, one.called) for one in proposals} == {("CT7", "ROUTER")}
        assert sorted(map(data_set, archive.glob("[!.]*/*.dcm"))) == sorted(map(data_set, files))
        listener.up.until(lambda: not listener.received("ct"))  # everybody has confirmed it
        shown = listener.up.told("source", "show", "ct")
        assert shown["units"]["done"] == 1 and not shown["attention"]
        assert listener.up.told("source", "test", "ct")["ok"]
        assert refusal(port, "MR1") == (1, 1, 3)
        home = Home(listener.up.home)
        listener.up.until(lambda: any(one.instances == 3 and one.refused == 1 for one in listeners(home)))


def test_sources_are_changed_and_paused_while_they_run(listener: Listener) -> None:
    shelf, port, other = listener.shelf("changing"), free_port(), free_port()
    listener.apply(one={"port": port, "aet": "ONE", "targets": ["changing"]})
    listener.until_heard(port, "ONE")
    words = listener.apply(2, two={"port": port, "aet": "ONE", "targets": ["changing"]})
    assert f"AE title ONE on port {port} is that of one" in words
    assert "a route to nobody" in listener.apply(2, two={"port": port, "aet": "TWO", "routes": [{"targets": []}]})
    assert "no target named nobody" in listener.apply(2, two={"port": port, "aet": "TWO", "targets": ["nobody"]})
    listener.apply(two={"port": port, "aet": "TWO", "targets": ["changing"]})
    listener.until_heard(port, "TWO")
    held = associated(port, called="TWO")
    listener.up.here("source", "pause", "two")
    listener.up.until(lambda: sent("echoscu", "-aec", "TWO", "127.0.0.1", str(port)).returncode != 0)
    assert stored(held, studies.dataset()) == 0xA700
    listener.up.here("source", "resume", "two")
    listener.until_heard(port, "TWO")
    again = associated(port, called="TWO")
    assert stored(again, studies.dataset()) == 0
    again.release()
    listener.up.until(lambda: len(arrived(shelf)) == 1 and not listener.received("two"))
    listener.apply(one={"port": other, "aet": "ONE", "targets": ["changing"]})
    listener.until_heard(other, "ONE")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        number = taken.getsockname()[1]
        listener.apply(three={"port": number, "aet": "THREE", "targets": ["changing"]})
        trouble = f"can't listen on 127.0.0.1, port {number}: Address already in use"
        listener.up.until(lambda: trouble in listener.up.told("source", "test", "three", code=None)["problems"])
    listener.until_heard(number, "THREE")  # as soon as it is free
    listener.up.until(lambda: listener.up.told("source", "test", "three", code=None)["ok"])
    log = (listener.up.home / "logs" / "listening.log").read_text()
    assert log.count("source.stuck: three") == 1  # said once, though it was tried again and again
    listener.up.child("talaria.engine.listening").kill()
    listener.up.until(lambda: not listening(other))
    listener.until_heard(other, "ONE")  # it is started again
    listener.up.here("source", "remove", "two")
    listener.up.until(lambda: not listening(port))


@pytest.mark.slow  # 10 s; tests/protocols/test_dimse_intake.py kills the listener alone
def test_killed_at_any_moment_what_was_confirmed_is_dispatched(listener: Listener) -> None:
    """First what listens is killed, then everything; the senders go on until they are cut off."""
    shelf, port = listener.shelf("safe"), free_port()
    listener.apply(ct={"port": port, "aet": "ROUTER", "targets": ["safe"]})
    confirmed: set[str] = set()
    for what in ("listening", "everything"):
        listener.until_heard(port, "ROUTER")
        before = len(confirmed)
        with ThreadPoolExecutor(3) as pool:
            for number in range(3):
                pool.submit(store_until_cut_off, port, confirmed, f"CT{number}", "ROUTER")
            listener.up.until(lambda: len(confirmed) >= before + 12)  # noqa: B023
            if what == "listening":
                listener.up.child("talaria.engine.listening").kill()
            else:
                listener.up.kill()
    listener.up.start()
    listener.up.until(lambda: confirmed <= arrived(shelf))
    listener.up.until(lambda: not listener.received("ct"))
    assert len(confirmed) >= 24
