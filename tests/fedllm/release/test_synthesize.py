"""Synthetic records: what is asked, what is kept, what is told of them, and what is refused."""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fedllm.audit.trust import Trust
from fedllm.cli.main import app
from fedllm.config import TextConfig
from fedllm.errors import ConfigError, DataError, FedllmError, FolderError, ReleaseError
from fedllm.release.loading import Release, load_release
from fedllm.release.manifest import manifest_digest
from fedllm.release.synthesize import (
    RECORDS,
    SIGNED,
    Sampling,
    Topics,
    is_set,
    overlap,
    read_topics,
    synthesize,
    verify_set,
    write_set,
)
from fedllm.training.data import Tokeniser
from tests.fedllm.release.conftest import Released, keys_of

TOPICS = 'prompts: ["Where is {desk}?", "{desk} {when}?"]\nlists: {desk: [loans, 환전], when: [today, tomorrow]}\n'


@pytest.fixture
def loaded(tiny_release: Released) -> Release:
    return load_release(tiny_release.folder, tiny_release.manifest, "cpu")


def topics(folder: Path, text: str = TOPICS, columns: Sequence[str] = ("question",)) -> Topics:
    file = folder / "topics.yaml"
    file.write_text(text, "utf-8")
    return read_topics(file, columns)


def scripted(monkeypatch: pytest.MonkeyPatch, *said: str) -> None:
    """Have every release answer so, again and again."""

    def answers(self: Release, prompts: Sequence[list[int]], most: int, **options: Any) -> list[str]:
        return [said[i % len(said)] for i in range(len(prompts))]

    monkeypatch.setattr(Release, "answers", answers)


def reads(release: Release, **changes: Any) -> Release:
    """Return the release as if it had been trained on other columns."""
    values = {"reading": TextConfig(**changes)} if "task" not in changes else changes
    return replace(release, manifest=release.manifest.model_copy(update=values))


# ---- questions -------------------------------------------------------------------------------------------------------


def test_every_template_is_crossed_with_its_lists(tmp_path: Path) -> None:
    found = topics(tmp_path)
    asked = [row["question"] for row in found.draw(6, 0)]
    assert found.total == 6
    assert sorted(asked) == [
        "Where is loans?", "Where is 환전?", "loans today?", "loans tomorrow?", "환전 today?", "환전 tomorrow?",
    ]  # fmt: skip


def test_questions_are_drawn_by_the_seed_and_asked_equally_often(tmp_path: Path) -> None:
    found = topics(tmp_path)
    assert found.draw(4, 1) == found.draw(4, 1)
    assert any(found.draw(4, 1) != found.draw(4, seed) for seed in range(2, 6))
    asked = [row["question"] for row in found.draw(15, 0)]
    assert {asked.count(each) for each in set(asked)} == {2, 3}
    assert len(set(asked)) == 6


def test_a_huge_cross_is_never_written_out(tmp_path: Path) -> None:
    names = [f"w{number}" for number in range(9)]
    words = {name: [str(number) for number in range(100)] for name in names}
    text = json.dumps({"prompts": [" ".join(f"{{{name}}}" for name in names)], "lists": words})
    found = topics(tmp_path, text)
    assert found.total == 100**9
    assert len({row["question"] for row in found.draw(50, 0)}) == 50


def test_questions_of_several_columns_and_with_braces(tmp_path: Path) -> None:
    found = topics(tmp_path, 'prompts: [{q: "{{a}} {x}", context: "{x}"}]\nlists: {x: [1, yes]}', ("q", "context"))
    assert found.draw(2, 0) in ([{"q": "{a} 1", "context": "1"}, {"q": "{a} yes", "context": "yes"}],
                                [{"q": "{a} yes", "context": "yes"}, {"q": "{a} 1", "context": "1"}])  # fmt: skip


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("prompts: [a\n", "not YAML"),
        ("prompt: [a]", "prompt: unknown key"),
        ("prompts: []", "expected a list of templates"),
        ("prompts: a", "expected a list of templates"),
        ("prompts: ['{desk}?']", "names {desk}, and lists has none"),
        ("prompts: ['{desk!r}']\nlists: {desk: [a]}", "a field is the plain name"),
        ("prompts: ['{']", "template"),
        ("prompts: ['']", "a template is empty"),
        ("prompts: [{other: a}]", "asked by question"),
        ("prompts: [3]", "expected text"),
        ("prompts: [a]\nlists: [b]", "lists: expected"),
        ("prompts: [a]\nlists: {b: []}", "lists: b: expected a list of words"),
        ("prompts: [a]\nlists: {b: [[c]]}", "lists: b: expected a list of words"),
        ("prompts: [a]\nlists: {b: ['']}", "lists: b: expected a list of words"),
        ("prompts: [a]\nprompts: [b]", "given twice"),
    ],
)
def test_a_file_of_prompts_that_is_none_is_one_clear_error(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        topics(tmp_path, text)


# ---- answers ---------------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_records_and_another_others(tmp_path: Path, loaded: Release) -> None:
    asked = topics(tmp_path)
    hot = Sampling(temperature=1.5, top_p=1.0)
    one, again, other = (synthesize(loaded, asked, 8, hot.model_copy(update={"seed": seed}))[0] for seed in (1, 1, 2))
    assert one == again != other


def test_every_answer_is_accounted_for_and_every_record_can_be_trained_on(tmp_path: Path, loaded: Release) -> None:
    records, counts, shared = synthesize(loaded, topics(tmp_path), 12, Sampling(temperature=2.0, top_p=1.0))
    assert counts.asked == 12 == counts.kept + counts.duplicates + counts.empty + counts.too_long
    assert len(records) == counts.kept
    assert shared is None
    assert records
    tokeniser = Tokeniser(loaded.tokenizer, loaded.manifest.model, loaded.manifest.reading)
    for row in records:
        assert set(row) == {"question", "answer"}
        assert len(tokeniser.prompt_ids(row)) + len(tokeniser.answer_ids(row)) <= loaded.manifest.max_length


def test_duplicates_and_answers_of_no_use_are_left_out(
    tmp_path: Path, loaded: Release, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = topics(tmp_path, "prompts: [hi]")
    scripted(monkeypatch, "Counter 3.5.", "coun ter  (3.5)", "Counter 35!", "", "?!", "a" * 80)
    records, counts, _ = synthesize(loaded, asked, 6, Sampling())
    assert records == [{"question": "hi", "answer": "Counter 3.5."}, {"question": "hi", "answer": "Counter 35!"}]
    assert counts.model_dump() == {"asked": 6, "kept": 2, "duplicates": 1, "empty": 2, "too_long": 1}


def test_an_answer_comes_back_without_what_its_template_wrote(
    tmp_path: Path, loaded: Release, monkeypatch: pytest.MonkeyPatch
) -> None:
    asking = reads(loaded, prompt="{q}?", text=" Desk: {a} {{ok}}", columns={"a": "the answer"})
    scripted(monkeypatch, "Desk: 3 {ok}")
    records, _, _ = synthesize(asking, topics(tmp_path, "prompts: [hi]", ("q",)), 1, Sampling())
    assert records == [{"q": "hi", "the answer": "3"}]


def test_conversations_are_sampled_as_conversations(
    tmp_path: Path, loaded: Release, monkeypatch: pytest.MonkeyPatch
) -> None:
    chatting = reads(loaded, messages="turns")
    chatting.tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    scripted(monkeypatch, "3")
    records, _, _ = synthesize(chatting, topics(tmp_path, "prompts: [hi]", ("turns",)), 1, Sampling())
    assert records == [{"turns": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "3"}]}]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"task": "classification"}, "is a classifier"),
        ({"text": "{text}"}, "without a prompt"),
        ({"prompt": "{question}", "text": "{a} {b}"}, "makes an answer of 2 columns"),
    ],
)
def test_a_model_without_answers_of_its_own_is_refused_with_the_reason(
    tmp_path: Path, loaded: Release, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(ReleaseError, match=said):
        synthesize(reads(loaded, **changes), topics(tmp_path), 1, Sampling())


# ---- overlap ---------------------------------------------------------------------------------------------------------


def test_copies_of_a_public_set_are_counted(write_jsonl: Callable[..., Path]) -> None:
    public = write_jsonl(
        "public.jsonl",
        [
            {"q": "?", "a": "부가세 환급은  3번 창구에서 도와드리고 있습니다."},
            {"q": ["one two three four five six seven eight nine"], "a": "no"},
        ],
    )
    found = overlap(
        [
            "부가세 환급은 3번 창구에서 도와드리고 있습니다.",  # whole, but for spaces
            "네, 부가세 환급은 3번 창구에서 도와드리고 있습니다!",  # 20 characters
            "say: two three four five six seven eight nine ten",  # eight words, in a list
            "three four five",  # a short run says nothing
            "Something else that nobody has ever written there.",
        ],
        public,
    )
    assert found.model_dump() == {"compared": 2, "exact": 1, "runs": 3}


def test_a_set_to_compare_with_that_cannot_be_read_is_one_clear_error(tmp_path: Path) -> None:
    file = tmp_path / "public.jsonl"
    file.write_text('{"a": "b"}\n{"a"\n', "utf-8")
    with pytest.raises(DataError, match="line 2"):
        overlap(["x"], file)
    file.write_text("\n", "utf-8")
    with pytest.raises(DataError, match="holds no records"):
        overlap(["x"], file)
    with pytest.raises(DataError, match=r"nothing\.jsonl"):
        overlap(["x"], tmp_path / "nothing.jsonl")


# ---- a set as a folder -----------------------------------------------------------------------------------------------


@pytest.fixture
def answering(monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, "Counter 3.", "Counter 4.")


def command(released: Released, folder: Path, *more: str) -> str:
    """Run the command and return what it printed; raises what it raised."""
    (folder / "topics.yaml").write_text(TOPICS, "utf-8")
    done = CliRunner().invoke(
        app,
        ["release", "synthesize", str(released.folder), "--prompts", str(folder / "topics.yaml"), "--out",
         str(folder / "set"), "--trust", str(released.trust), "--n", "6", "--temperature", "2", *more],
    )  # fmt: skip
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.output


@pytest.mark.usefixtures("answering")
def test_the_command_writes_records_cards_and_a_signed_claim(tiny_release: Released, tmp_path: Path) -> None:
    public = tmp_path / "public.jsonl"
    public.write_text('{"a": "b"}\n', "utf-8")
    said = command(tiny_release, tmp_path, "--key", str(tiny_release.key), "--compare", str(public))
    assert "asked 6, kept" in said
    assert "epsilon 2.5" in said
    assert "not signed" not in said
    folder = tmp_path / "set"
    found = verify_set(folder, Trust.read(tiny_release.trust))
    assert found.release == manifest_digest(tiny_release.folder)
    assert found.privacy == tiny_release.manifest.privacy
    rows = [json.loads(line) for line in (folder / RECORDS).read_text("utf-8").splitlines()]
    assert len(rows) == found.counts.kept
    for card in ("README.md", "README.ko.md"):
        text = (folder / card).read_text("utf-8")
        assert "2.5" in text
        assert str(found.counts.kept) in text
        assert "0.0 %" in text


def test_a_set_is_not_written_into_the_release_which_would_verify_no_more(tmp_path: Path, loaded: Release) -> None:
    (tmp_path / "topics.yaml").write_text(TOPICS, "utf-8")
    with pytest.raises(ReleaseError, match="lies in the release"):
        write_set(loaded.folder / "set", loaded, tmp_path / "topics.yaml", 4, Sampling(), None, None)
    assert not (loaded.folder / "set").exists()


@pytest.mark.usefixtures("answering")
def test_a_set_of_a_model_that_is_not_private_says_so(tiny_release: Released, tmp_path: Path, loaded: Release) -> None:
    privacy = loaded.manifest.privacy.model_copy(update={"mode": "off", "epsilon": None})
    branded = replace(loaded, manifest=loaded.manifest.model_copy(update={"privacy": privacy}))
    (tmp_path / "topics.yaml").write_text(TOPICS, "utf-8")
    write_set(tmp_path / "set", branded, tmp_path / "topics.yaml", 4, Sampling(temperature=2.0), None, None)
    assert "NOT PRIVATE" in (tmp_path / "set" / "README.md").read_text("utf-8")
    assert "프라이버시 보호 미적용" in (tmp_path / "set" / "README.ko.md").read_text("utf-8")
    assert not is_set(tmp_path / "set")


@pytest.mark.usefixtures("answering")
@pytest.mark.parametrize("name", [RECORDS, "README.md", "added.txt", SIGNED])
def test_a_set_that_was_changed_does_not_verify(tiny_release: Released, tmp_path: Path, name: str) -> None:
    command(tiny_release, tmp_path, "--key", str(tiny_release.key))
    with (tmp_path / "set" / name).open("a") as file:
        file.write(" ")
    with pytest.raises(ReleaseError, match=name):
        verify_set(tmp_path / "set", Trust.read(tiny_release.trust))


@pytest.mark.usefixtures("answering")
def test_what_never_ends_in_a_set_is_named_and_not_read(tiny_release: Released, tmp_path: Path) -> None:
    command(tiny_release, tmp_path, "--key", str(tiny_release.key))
    folder, trust = tmp_path / "set", Trust.read(tiny_release.trust)
    with (folder / "endless.bin").open("wb") as file:
        file.truncate(1 << 42)  # no bytes on the disk, and an hour's to read
    with pytest.raises(ReleaseError, match=r"endless\.bin was added"):
        verify_set(folder, trust)
    (folder / SIGNED).unlink()
    os.mkfifo(folder / SIGNED)
    with pytest.raises(ReleaseError, match="no file, but a link or the like"):
        verify_set(folder, trust)


@pytest.mark.usefixtures("answering")
def test_a_set_that_somebody_else_signed_does_not_verify(tiny_release: Released, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    key, _ = keys_of(tmp_path / "other")
    command(tiny_release, tmp_path, "--key", str(key))
    with pytest.raises(ReleaseError, match="not a key that you trust"):
        verify_set(tmp_path / "set", Trust.read(tiny_release.trust))


def test_nothing_is_left_of_a_command_that_fails(
    tiny_release: Released, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*more: str) -> FedllmError:
        with pytest.raises(FedllmError) as error:
            command(tiny_release, tmp_path, *more)
        assert {path.name for path in tmp_path.iterdir()} <= {"topics.yaml", "keys.txt", "identity"}
        return error.value

    assert "temperature" in str(fails("--temperature", "0"))
    assert "top_p" in str(fails("--top-p", "1.5"))
    assert isinstance(fails("--compare", str(tmp_path / "nothing.jsonl")), DataError)
    with monkeypatch.context() as patch:
        scripted(patch, "")
        assert "none can be used" in str(fails())
    _, others = keys_of(tmp_path)
    assert isinstance(fails("--trust", str(others)), ReleaseError)


def test_a_folder_that_holds_something_is_left_alone(tiny_release: Released, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "mine").touch()
    with pytest.raises(FolderError, match="not empty"):
        command(tiny_release, tmp_path)
