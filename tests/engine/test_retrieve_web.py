"""Retrievals from a DICOMweb server: what one number or study meets stops no other; what all meet ends them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from prefect.client.schemas.objects import State
from prefect.states import Completed

from imaging.query import Query
from protocols.dicomweb import client
from talaria.testing import studies
from tasks.retrieve.job import Stage
from tasks.retrieve.run import Retrieval
from tasks.retrieve.wish import Wish
from tests.engine.material import alone_with
from tests.servers.dicomweb import Reply, Request, Scripted, scripted
from tests.targets.dicomweb import dicomweb_target
from tests.targets.dicomweb_query.finding import hold
from transfer.home import Home

RUN = "00000000-0000-4000-8000-000000000002"
NUMBERS = [f"A{number}" for number in range(1, 11)]


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    alone_with(RUN, tmp_path / "home", monkeypatch)


@pytest.fixture
def server() -> Iterator[Scripted]:
    with scripted() as one:
        for number in NUMBERS:
            hold(one, *(studies.dataset(study=f"1.2.3.{number[1:]}", AccessionNumber=number) for _ in range(2)))
        yield one


async def delivered(paths: list[str], targets: list[str], **_: Any) -> State[Any]:
    return Completed()


def retrieved(server: Scripted, **keys: Any) -> Retrieval:
    wish = Wish("src", targets=("archive",), **({"accessions": " ".join(NUMBERS)} | keys))
    source = dicomweb_target(
        server.url, direction="query", http_user="lab", http_password="secret-77", max_attempts=2, retry_delay_s=0
    )
    one = Retrieval(RUN, wish, source, Home.current(), delivered)
    asyncio.run(one.run())
    return one


def asked(server: Scripted) -> set[str]:
    """The studies that were asked for after the search, by number."""
    return {
        value.rpartition(".")[2]
        for request in server.requests
        for key, value in request.query
        if key == "StudyInstanceUID"
    }


def refusing(server: Scripted, status: int, refuses: Callable[[str], bool]) -> None:
    """Have a server refuse what is asked about some studies."""
    usual = server._usual

    def answer(request: Request) -> Reply:
        uids = [value for key, value in request.query if key == "StudyInstanceUID"] + request.path.split("/")[3:4]
        return Reply(status) if uids and refuses(uids[0].rpartition(".")[2]) else usual(request)

    server._usual = answer  # type: ignore[method-assign]


def test_a_source_that_accepts_our_credentials_no_more_is_asked_for_fewer_and_fewer_studies(server: Scripted) -> None:
    """It may lock the account after some attempts, for all who use it."""
    refusing(server, 401, lambda number: int(number) > 2)
    found = list(retrieved(server).job.studies.values())
    assert [study.stage for study in found] == [Stage.DELIVERED] * 2 + [Stage.FAILED] * 8
    assert all("401" in study.reason for study in found[2:])
    assert asked(server) == {"1", "2", "3", "4", "6", "10"}


@pytest.mark.parametrize("status", [401, 403])
def test_studies_that_are_denied_one_by_one_take_no_other_with_them(server: Scripted, status: int) -> None:
    refusing(server, status, lambda number: number in ("1", "2", "7"))
    found = retrieved(server).job.studies.values()
    assert {study.accession for study in found if study.stage is Stage.FAILED} == {"A1", "A2", "A7"}
    assert {study.accession for study in found if study.stage is Stage.DELIVERED} == set(NUMBERS) - {"A1", "A2", "A7"}


def test_a_study_that_is_denied_takes_no_other_with_it_where_it_may_be_the_study(server: Scripted) -> None:
    """Of three that are left, two may be hidden from us."""
    refusing(server, 403, lambda number: number in ("8", "9"))
    found = retrieved(server).job.studies.values()
    assert {study.accession for study in found if study.stage is Stage.FAILED} == {"A8", "A9"}


@pytest.mark.parametrize("status", [405, 500, 503])
@pytest.mark.parametrize("bad", [{"A1"}, {"A5"}, {"A10"}, {"A1", "A6"}])
def test_a_number_at_which_a_search_fails_fails_alone(
    server: Scripted, monkeypatch: pytest.MonkeyPatch, bad: set[str], status: int
) -> None:
    """As where a server stumbles over what one study holds."""
    monkeypatch.setattr(client, "FIRST_WAIT_S", 0.0)
    usual = server._usual

    def answer(request: Request) -> Reply:
        return Reply(status) if dict(request.query).get("AccessionNumber") in bad else usual(request)

    server._usual = answer  # type: ignore[method-assign]
    one = retrieved(server)
    assert {study.accession for study in one.job.studies.values()} == set(NUMBERS) - bad
    assert set(one.job.failed) == bad and all(str(status) in why for why in one.job.failed.values())


@pytest.mark.parametrize("bad", [{"1"}, {"10"}, {"3", "4"}])
def test_a_study_at_which_a_search_fails_fails_alone_and_is_fetched_by_a_retry(server: Scripted, bad: set[str]) -> None:
    """As of a list of studies that were chosen on our pages."""
    usual = server._usual
    refusing(server, 500, lambda number: number in bad)
    uids = [f"1.2.3.{number[1:]}" for number in NUMBERS]
    wish = {"accessions": "", "filters": Query(StudyInstanceUID=",".join(uids))}
    found = retrieved(server, **wish).job
    assert {study.study for study in found.studies.values() if study.stage is Stage.DELIVERED} == {
        uid for uid in uids if uid.rpartition(".")[2] not in bad
    }
    failed = [study for study in found.studies.values() if study.stage is Stage.FAILED]
    assert {study.study.rpartition(".")[2] for study in failed} == bad and all("500" in one.reason for one in failed)
    assert not found.error and not found.unknown
    before = len(server.requests)
    retrieved(server, **wish)  # a later part of the same run, as after a pause
    assert len(server.requests) == before
    server._usual = usual  # type: ignore[method-assign]
    found.ended = True
    found.save()
    again = retrieved(server, **wish).job.studies.values()
    assert {study.accession for study in again} == set(NUMBERS) and {study.stage for study in again} == {
        Stage.DELIVERED
    }


@pytest.mark.parametrize("reply", [Reply(401), Reply(500), Reply(resets=True)], ids=["401", "500", "reset"])
def test_a_list_of_which_all_fails_is_asked_for_a_few_times_only(server: Scripted, reply: Reply) -> None:
    server._usual = lambda request: reply  # type: ignore[method-assign]
    one = retrieved(server)
    assert set(one.job.failed) == set(NUMBERS)
    assert len(server.requests) <= (1 if reply.status == 401 else 10)
