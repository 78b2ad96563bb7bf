"""What the options of a search are for the API, and what the API makes of them."""

from __future__ import annotations

import pytest

from imaging.query import Query
from talaria.cli.keys import Keys
from tasks.retrieve.asked import query_of
from tasks.retrieve.wish import Wish
from transfer.errors import Misconfigured
from transfer.query import study_tests


def test_options_list_descriptions_and_the_api_takes_each_as_it_is() -> None:
    given = Keys(study_description=['CT, "CHEST, PA"', "ct"]).given()
    assert given == {"study_description": ["CT", "CHEST, PA", "ct"]}
    made = query_of(study_descriptions=given["study_description"], series_descriptions=["AX T1, 5mm", " "])
    assert made.StudyDescription == ("CT", "CHEST, PA", "ct") and made.SeriesDescription == ("AX T1, 5mm",)


def test_blanks_ask_for_nothing_and_uids_may_be_pasted() -> None:
    assert query_of(patient_id=" ", patient_name="\t", study_uids=[" "], series_uid=" ", modality=" ") == Query()
    made = query_of(study_uids=["1.2, 1.3", "1.4\n1.5"], series_uid=" 1.6\n1.7 ", patient_name=" Doe^Jane ")
    assert (made.StudyInstanceUID, made.SeriesInstanceUID) == ("1.2,1.3,1.4,1.5", "1.6,1.7")
    assert made.PatientName == "Doe^Jane"


def test_what_mails_add_to_uids_is_dropped_and_what_can_be_no_uid_or_code_is_refused() -> None:
    made = query_of(study_uids=["\u202a1.2.3\u200b\u00a01.4;1.5\ufeff"], modality="CT\u200e")
    assert (made.StudyInstanceUID, made.Modality) == ("1.2.3,1.4,1.5", "CT")
    for wrong in ({"study_uids": ["1.2.3", "Müller"]}, {"series_uid": "1.2\u0663"}, {"modality": "\u0421T"}):
        with pytest.raises(Misconfigured) as caught:
            query_of(**wrong)
        assert "Müller" not in str(caught.value)


@pytest.mark.parametrize("typed", ["CT,MR", "CT MR", " CT; MR ", "CT/MR", "CT\\MR", "CT + MR,"])
def test_several_modalities_may_be_typed_as_people_do(typed: str) -> None:
    """They were one code, that nothing has: all was called missing."""
    assert query_of(modality=typed).Modality == "CT,MR"


@pytest.mark.parametrize(
    ("given", "day"),
    [
        ("20240101 - 20240131", "20240101-20240131"),
        ("20240101\u201320240131", "20240101-20240131"),
        ("\uff12\uff10\uff12\uff14\uff10\uff11\uff13\uff11", "20240131"),
        ("\u200e2024-\u200e", "2024-"),
    ],
)
def test_dates_are_taken_as_they_are_pasted_and_typed(given: str, day: str) -> None:
    made = query_of(study_date=given)
    assert made.StudyDate == day and study_tests(made)


@pytest.mark.parametrize("key", ["patient_id", "patient_name", "modality", "study_date", "study_descriptions"])
@pytest.mark.parametrize("value", ["a" * 70_000, "Doe\0", "Doe\nX", "\x1b$B", "\udcff"], ids=ascii)
def test_what_no_value_can_be_is_refused_in_words_and_not_sent(key: str, value: str) -> None:
    with pytest.raises(Misconfigured, match="has at most 1000 characters, and none that can't be printed") as refused:
        query_of(**{key: [value] if key == "study_descriptions" else value})
    assert len(str(refused.value)) < 100


def test_a_search_for_what_is_no_number_does_not_ask_for_everything() -> None:
    """It would have found all, and a retrieval with a date fetched all of that day."""
    with pytest.raises(Misconfigured, match="holds no accession number"):
        Wish("pacs", ("archive",), accessions="*", filters=query_of(study_date="20240101")).numbers()


@pytest.mark.parametrize("key", ["accession", "patient_id", "study_date", "modality", "series_uid"])
@pytest.mark.parametrize("empty", ["", " ", " , "])
def test_an_option_that_is_empty_does_not_ask_for_everything(key: str, empty: str) -> None:
    """As `--accession "$NUMBER"` where the variable is not set: with a date, all of that day was fetched."""
    option = f"--{key.replace('_', '-')}"
    with pytest.raises(ValueError, match=f"{option} is empty: give a value, or leave it out"):
        Keys(**{"modality": "CT", key: empty}).given()
    assert Keys(modality="CT").given() == {"modality": "CT"}


@pytest.mark.parametrize("empty", [[""], [" , "], [",", ""]])
def test_descriptions_that_are_empty_do_not_ask_for_everything(empty: list[str]) -> None:
    with pytest.raises(ValueError, match="--series-description is empty"):
        Keys(modality="CT", series_description=empty).given()
    assert Keys(series_description=["", "T1"]).given() == {"series_description": ["T1"]}
