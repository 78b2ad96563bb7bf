"""Text in every character set that pydicom has a file of, and in damaged ones."""

from __future__ import annotations

from pathlib import Path

import pydicom
import pytest
from hypothesis import given
from hypothesis import strategies as st

from imaging.charset import NAME_DELIMITERS, decoded
from talaria.testing import studies

FILES = sorted((Path(pydicom.__file__).parent / "data" / "charset_files").glob("*.dcm"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_names_are_read_as_pydicom_reads_them(path: Path) -> None:
    with studies.quiet():
        ds = pydicom.dcmread(path)
        if "PatientName" not in ds:
            return  # its text is inside sequences
        charset = ds.get("SpecificCharacterSet") or ""
        terms = charset if isinstance(charset, str) else "\\".join(charset)
        assert decoded(ds.PatientName.original_string, terms.encode(), NAME_DELIMITERS) == str(ds.PatientName)


@pytest.mark.parametrize(
    ("charset", "codec", "text"),
    [
        (b"ISO_IR 192", "utf-8", "Zürich 東京 Ωμέγα 🩻"),
        (b"GB18030", "gb18030", "北京医院"),
        (b"GBK ", "gbk", "北京医院"),
        (b"ISO_IR 100", "latin-1", "Jérôme Müller"),
        (b"ISO_IR 101", "iso8859-2", "Łódź"),
        (b"ISO_IR 148", "iso8859-9", "İstanbul"),
        (b"ISO_IR 166", "iso8859-11", "กรุงเทพ"),
        (b"ISO_IR 203", "iso8859-15", "50 €"),
        (b"ISO_IR 13", "shift_jis", "ﾔﾏﾀﾞ"),
        (b"ISO 2022 IR 149", "euc_kr", "김희중"),
        (b"", "latin-1", "Jérôme"),
        (b"no such set", "latin-1", "Jérôme"),
    ],
)
def test_single_character_set(charset: bytes, codec: str, text: str) -> None:
    assert decoded(text.encode(codec), charset) == text


def test_delimiter_brings_the_first_character_set_back() -> None:
    raw = b"\x1b-F\xc4\xe9^\xe9"  # Greek, a component delimiter, then Latin-1
    assert decoded(raw, b"ISO 2022 IR 100\\ISO 2022 IR 126", NAME_DELIMITERS) == "Δι^é"


@given(
    st.binary(max_size=40),
    st.sampled_from([b"", b"ISO_IR 192", b"\\ISO 2022 IR 87", b"ISO 2022 IR 13", b"GBK", b"\xff"]),
)
def test_any_bytes_are_read_without_error_or_warning(raw: bytes, charset: bytes) -> None:
    assert isinstance(decoded(raw, charset), str)
    assert isinstance(decoded(b"\x1b$B" + raw, charset, NAME_DELIMITERS), str)
