"""A source is a place on this machine, or a hub name, or an error of ours; never another error."""

from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fedllm.errors import ConfigError
from fedllm.training.sources import resolve


@pytest.mark.parametrize("name", ["gpt2", "org/model", "org/model-1.5", "데이터/집합"])
def test_a_name_that_can_only_be_on_the_hub_stays_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve(name) == name


def test_what_is_on_this_machine_is_not_asked_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "model").mkdir(parents=True)
    assert resolve("org/model") == Path("org/model")
    assert resolve(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("source", ["./model", "../model", "/a/b/c", "~/model", "a/b/c", "records.jsonl", "a/b.csv"])
def test_a_path_where_nothing_is_is_never_asked_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ConfigError, match="no such file or folder"):
        resolve(source)


def test_what_ships_in_a_package_is_found() -> None:
    assert isinstance(resolve("pkg://fedllm/plan.py"), Path)
    for missing in ("pkg://fedllm/no_such_file", "pkg://no_such_package/x", "pkg://no.such.package/x", "pkg:///x"):
        with pytest.raises(ConfigError):
            resolve(missing)


@example("~no_such_user_at_all/model")
@example("x" * 300)
@example("a\0b")
@example("pkg://.relative/x")
@example("pkg://sys/x")
@example("pkg://os/x")
@example("pkg://fed llm/x")
@example("pkg://fedllm..plan/x")
@example("pkg://fedllm/" + "x" * 300)
@example("pkg://fedllm/a\0b")
@given(st.text(max_size=20).filter(lambda source: not source.startswith("pkg://")))
def test_any_text_is_a_place_a_name_or_an_error_of_ours(source: str) -> None:
    try:
        place = resolve(source)
    except ConfigError:
        return
    assert place == source or (isinstance(place, Path) and place.exists())
