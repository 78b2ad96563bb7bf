"""Errors survive a process boundary whole, and say in one line what, where and which file."""

from __future__ import annotations

import pickle

import pytest

from transfer import errors

CLASSES = [
    one for one in vars(errors).values() if isinstance(one, type) and issubclass(one, errors.DispatchError)
]  # fmt: skip


@pytest.mark.parametrize(("given", "shown"), [("Bräu", "Bräu"), ("a\udcff: no", "a\\xff: no"), ("\ud83d", "\\ud83d")])
def test_a_message_is_text_whatever_bytes_a_path_has(given: str, shown: str) -> None:
    """Else the end of its run can't be kept, which then is a fault of ours."""
    error = errors.NotFound(given)
    assert (error.message, str(error), error.args) == (shown, shown, (shown,))
    assert shown.encode()


@pytest.mark.parametrize("kind", CLASSES)
def test_survives_pickle(kind: type[errors.DispatchError]) -> None:
    error = kind("no room: 5 MB", "archive", "a/1.dcm")
    error.message = "changed later"
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert str(copy) == str(error) == "archive: changed later (a/1.dcm)"
    assert vars(copy) == vars(error)


def test_retry_after_survives_pickle() -> None:
    copy = pickle.loads(pickle.dumps(errors.Busy("later", "pacs", retry_after=12.5)))
    assert copy.retry_after == 12.5


def test_which_are_worth_another_attempt() -> None:
    assert {one.__name__ for one in CLASSES if one.retryable} == {
        "Retryable", "Unreachable", "NothingCame", "TimedOut", "Busy", "DiskFull", "Interrupted",
        "LedgerAway", "LedgerFull", "SourceAway",
    }  # fmt: skip


def test_text() -> None:
    assert str(errors.Denied("no")) == "no"
    assert str(errors.Denied("no", "pacs")) == "pacs: no"
    assert str(errors.Rejected("no", item="1.dcm")) == "no (1.dcm)"


@pytest.mark.parametrize("kind", CLASSES)
def test_each_has_a_remedy_that_is_a_sentence(kind: type[errors.DispatchError]) -> None:
    class Special(kind):  # type: ignore[misc, valid-type]
        """What a protocol makes of it."""

    known = errors.known_as(Special("no"))
    assert known is (kind if kind in errors.REMEDIES else errors.DispatchError)
    assert errors.REMEDIES[known].endswith(".") and errors.REMEDIES[known][0].isupper()


def test_every_class_that_is_raised_has_a_remedy_of_its_own() -> None:
    assert set(CLASSES) - set(errors.REMEDIES) == {errors.Retryable, errors.Permanent}
