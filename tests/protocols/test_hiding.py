"""Secrets and patients' data are found in every spelling in which peers have been seen to quote them."""

from __future__ import annotations

import base64
import html
import json
import time
import unicodedata
from collections.abc import Callable
from urllib.parse import quote, quote_plus

import pytest

from protocols.net.hiding import date_forms, forms, hiding, secret_forms
from protocols.net.words import clean

SPELLINGS: dict[str, Callable[[str], str]] = {
    "as it is": str,
    "in other letters": str.swapcase,
    "NFD": lambda text: unicodedata.normalize("NFD", text),
    "UTF-8 read as Latin-1": lambda text: text.encode().decode("latin-1"),
    "UTF-8 read as Windows-1252": lambda text: text.encode().decode("cp1252", "replace"),
    "Latin-1 read as UTF-8": lambda text: text.encode("latin-1", "replace").decode("utf-8", "replace"),
    "lost": lambda text: text.encode("ascii", "replace").decode(),
    "in a URL": quote,
    "in a URL, small letters": lambda text: quote(text).lower(),
    "in a URL of Latin-1": lambda text: quote(text, encoding="latin-1", errors="replace"),
    "in a URL twice": lambda text: quote(quote(text)),
    "in a form": quote_plus,
    "in HTML": html.escape,
    "in HTML, by number": lambda text: "".join(f"&#{ord(c)};" for c in text),
    "in HTML, by hexadecimal number": lambda text: "".join(f"&#x{ord(c):x};" for c in text),
    "in HTML, by name": lambda text: text.encode("ascii", "xmlcharrefreplace").decode().replace("&#252;", "&uuml;"),
    "in JSON": lambda text: json.dumps(text)[1:-1],
    "in Python": lambda text: ascii(text)[1:-1],
    "with more blanks": lambda text: text.replace(" ", "   "),
    "with hard blanks": lambda text: text.replace(" ", "\u00a0"),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("value", ["Müller Groß", "Jane  Q Doe", "O'Brien & Søn", "ACC 12/34"])
def test_every_spelling(value: str, spelling: str) -> None:
    said = SPELLINGS[spelling](value)
    assert clean(f"no: <{said}> is known", {value}) == "no: <***> is known", said
    assert hiding({value})(f"/{said}/") == "/***/"


def test_a_value_that_is_decomposed_itself() -> None:
    value = unicodedata.normalize("NFD", "Müller")
    assert clean("for Müller", {value}) == clean(f"for {value}", {value}) == "for ***"


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize(
    "value", ["000\U0002f800", "\u212bngstr\u00f6m", "a\u0301\u0323b", "\u0958\u0915", "\u2126" * 3]
)
def test_a_value_that_is_written_otherwise_when_it_is_normalized(value: str, many: bool) -> None:
    hide = hiding({value, *(f"{number:09}" for number in range(501 if many else 0))})
    assert hide(f"for {value}!") == hide(f"for {unicodedata.normalize('NFC', value)}!") == "for ***!"


def test_what_is_lost_is_no_license_to_hide_everything() -> None:
    assert clean("why? and who?", forms("李^Wu")) == "why? and who?"


@pytest.mark.parametrize("before", ["", "u:", "user:", "a user:"])
def test_a_secret_in_base64(before: str) -> None:
    secret = "corréct horse/battery+staple"
    for code in (base64.b64encode, base64.urlsafe_b64encode):
        said = code(f"{before}{secret}".encode()).decode()
        shown = clean(f"bad credentials {said}!", secret_forms({secret}, ("user",)))
        left = shown.removeprefix("bad credentials ").removesuffix("!").replace("***", "")
        assert len(left) <= 12, shown  # what stands before the secret, and half a character at either end
    assert clean(secret.encode().hex(), secret_forms({secret})) == "***"


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_long_secret(spelling: str) -> None:
    said = SPELLINGS[spelling]("abc/+=&" * 9)
    assert clean(f"no: <{said}> is known", secret_forms({"abc/+=&" * 9})) == "no: <***> is known", said


def test_a_short_secret_is_no_license_either() -> None:
    assert secret_forms({"ab"}) == {"ab"}
    assert secret_forms({""}) == set()


def test_dates() -> None:
    for said in ("19700203", "1970-02-03", "03.02.1970", "02/03/1970", "03/02/1970", "03-02-1970", "1970%2D02%2D03"):
        assert clean(f"born {said}.", date_forms("19700203")) == "born ***."


PEM = "\n".join(
    [
        "-----BEGIN PRIVATE KEY-----",
        *(base64.b64encode(bytes((7 * n + m) % 256 for m in range(48))).decode() for n in range(100)),
        "-----END PRIVATE KEY-----",
    ]
)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_key_shown_as_a_whole_or_by_a_line(spelling: str) -> None:
    lines = PEM.splitlines()[1:-1]
    hide = hiding(secret_forms([PEM, *lines]) | {"Müller"})
    spell = SPELLINGS[spelling]
    shown = hide(f"no: <{spell(PEM)}> of Müller is known")
    assert not [line for line in lines if spell(line) in shown] and shown.endswith("> of *** is known")
    assert hide(f"no: <{spell(lines[50])}> of Müller is known") == "no: <***> of *** is known"
    assert hide("no key of Müller is known") == "no key of *** is known"


def test_letters_that_are_taken_for_those_of_a_token() -> None:
    token = "kiss" * 10
    for said in ("\u212aiss", "k\u0131ss", "k\u0130ss", "ki\u017fs", "KISS"):
        assert hiding({token})(f"no: {said * 10}.") == "no: ***."


def test_a_key_that_is_not_shown_costs_no_time() -> None:
    begun = time.process_time()
    hide = hiding(secret_forms([PEM, *PEM.splitlines()[1:-1]]) | {"Müller"})
    assert hide("Müller's study is refused") == "***'s study is refused"
    assert time.process_time() - begun < 1  # it was 4, for each dispatch; now 0.1


def test_a_long_message_and_many_values_take_no_time() -> None:
    begun = time.process_time()
    hide = hiding({f"Patient {n} Müller-{n}" for n in range(60)})
    assert hide("x Mü" * 4_000 + "Patient 7 Müller-7").endswith("***")
    hiding({"a  b" * 10})(" " * 10_000)
    hiding({"a b " * 10})("a " * 5_000)
    key = {base64.b64encode(bytes([n] * 48)).decode() for n in range(200)}
    assert hiding(secret_forms(key))(f"no: {min(key)}") == "no: ***"
    assert time.process_time() - begun < 10
