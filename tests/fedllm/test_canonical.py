"""One spelling for what identifies."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedllm.canonical import canonical, canonical_json

SAME = {
    "김하나": [
        "김하나",
        " 김하나\n",
        unicodedata.normalize("NFD", "김하나"),
        "김\u200b하나",
        "\ufeff김하나",
        "김하나\u3164",
    ],
    "1000": [1000, 1000.0, "1000", "1000.0", "1000.", "1e3", "1.0E+3", " 1000.00 ", "10\u00ad00"],
    "0": [0, 0.0, -0.0, "0.0"],
    "two words": ["two words", "two  words", "two\u00a0words", "two\r\nwords", "\u2060two words"],
    "1000.5": [1000.5, "1000.5"],
    "": ["", " ", "\u200b", "\ufe0f", "\t\u2800"],
}
DIFFERENT = ["1000", "1000.5", "01000", "a", "A", "ａ", "é", "e", "None", "True", "1e400", "1-0", "1.0.0", "1,0"]


@pytest.mark.parametrize("spelling", SAME)
def test_what_means_the_same_is_spelt_the_same(spelling: str) -> None:
    assert {canonical(each) for each in SAME[spelling]} == {spelling}


def test_what_differs_stays_different() -> None:
    assert len({canonical(each) for each in DIFFERENT}) == len(DIFFERENT)


@given(st.one_of(st.text(), st.floats(), st.integers(), st.text("0123456789.eE+- \u200b\u1160\u0301")))
def test_a_spelling_is_its_own(value: object) -> None:
    once = canonical(value)
    assert canonical(once) == once
    assert once == once.strip()
    assert unicodedata.is_normalized("NFC", once)


@given(st.text(), st.sampled_from(["\u200b", "\ufeff", "\u00ad", "\u2060", "\u3164", "\x00", "\U000e0100"]), st.data())
def test_what_does_not_show_changes_nothing(text: str, invisible: str, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(text)))
    assert canonical(text[:at] + invisible + text[at:]) == canonical(text)


@given(st.integers(-(2**53), 2**53))
def test_a_whole_number_is_the_same_as_a_float_and_as_text(number: int) -> None:
    assert canonical(number) == canonical(float(number)) == canonical(str(float(number))) == str(number)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), "\ud800", {"a": float("-inf")}])
def test_what_has_no_canonical_json_is_refused(bad: object) -> None:
    with pytest.raises(ValueError, match=r"."):
        canonical_json(bad)
