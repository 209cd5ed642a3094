"""Students: what they learn, what they claim, on which questions, and what is refused."""

import errno
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from typer.testing import CliRunner

from fedllm.audit.trust import Trust
from fedllm.cli.main import app
from fedllm.config import ModelConfig
from fedllm.crypto.identity import Identity
from fedllm.errors import ConfigError, DataError, Diverged, FolderError, ModelError, PrivacyError, ReleaseError
from fedllm.release.distil import Teaching, Transfer, _batch, _Teacher, distil, read_transfer, soft_loss, teach
from fedllm.release.loading import Release, load_release
from fedllm.release.manifest import manifest_digest, sign_release, verify_release
from fedllm.release.synthesize import RECORDS, Sampling, write_set
from fedllm.training.data import IGNORE
from fedllm.training.model import load_base
from fedllm.training.sources import resolve
from simulations.benchmarks.students import halve
from tests.conftest import save_llama
from tests.fedllm.release.conftest import Released, a_manifest, keys_of

QUESTIONS = [f"Where is counter {number}?" for number in range(6)]
FAST = Teaching(epochs=2, learning_rate=1e-2, batch=3)


@pytest.fixture
def loaded(tiny_release: Released) -> Release:
    return load_release(tiny_release.folder, tiny_release.manifest, "cpu")


@pytest.fixture(autouse=True)
def answers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have teachers answer in a few words: what a model of random weights says has no end."""
    if request.node.name != "test_the_command_teaches_and_tells":
        monkeypatch.setattr(Release, "answers", lambda self, prompts, most, **_: [f"no. {len(p)}" for p in prompts])


@pytest.fixture
def small(tmp_path: Path) -> str:
    """A model of half the teacher's layers, whose vocabulary is the teacher's."""
    return str(save_llama(tmp_path / "small", seed=1, num_hidden_layers=1))


@pytest.fixture
def public(tmp_path: Path) -> Path:
    file = tmp_path / "public.jsonl"
    file.write_text("".join(json.dumps({"question": each}) + "\n" for each in [*QUESTIONS, QUESTIONS[0]]), "utf-8")
    return file


@pytest.fixture
def transfer(loaded: Release, public: Path) -> Transfer:
    return read_transfer(public, loaded, Trust({}), True)


def another_vocabulary(folder: Path) -> str:
    """Write a model that reads letters in pairs."""
    save_llama(folder, vocab_size=260, num_hidden_layers=1)
    whole = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    whole["model"]["vocab"]["er"] = 259
    whole["model"]["merges"] = [["e", "r"]]
    (folder / "tokenizer.json").write_text(json.dumps(whole), "utf-8")
    return str(folder)


def silent(line: str) -> None:
    pass


# ---- what is learned -------------------------------------------------------------------------------------------------


def test_the_soft_loss_is_hintons() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(5, 7), torch.randn(5, 7)
    for temperature in (0.5, 1.0, 4.0):
        p, q = ((each / temperature).softmax(1) for each in (teacher, student))
        by_hand = temperature**2 * float((p * (p / q).log()).sum(1).mean())
        assert float(soft_loss(student, teacher, temperature)) == pytest.approx(by_hand, rel=1e-5)
    assert float(soft_loss(teacher, teacher, 2.0)) == pytest.approx(0, abs=1e-6)


def test_rows_of_a_longer_embedding_stand_for_no_token() -> None:
    torch.manual_seed(0)
    student, teacher, padding = torch.randn(5, 7), torch.randn(5, 7), torch.full((5, 3), 9.0)
    assert float(soft_loss(torch.cat([student, padding], 1), teacher, 2.0)) == float(soft_loss(student, teacher, 2.0))
    assert float(soft_loss(student, torch.cat([teacher, padding], 1), 2.0)) == float(soft_loss(student, teacher, 2.0))


@pytest.mark.parametrize("by_logits", [True, False])
def test_the_loss_falls_on_every_token_of_an_answer_and_on_no_other(
    loaded: Release, small: str, transfer: Transfer, by_logits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the output head is left out before the first answer begins."""
    student: Any = load_release(Path(small), loaded.manifest, "cpu").model
    rows = [{"question": "a" * n, "answer": "bc" * n} for n in (2, 9, 5)]
    examples = [loaded.tokeniser(row, 0) for row in rows]
    trainer = object.__new__(_Teacher)
    trainer._release, trainer._temperature, trainer.seen = loaded if by_logits else None, 2.0, []
    found = trainer.compute_loss(student, _batch(examples, 0))
    ours, theirs, targets = [], [], []
    for example in examples:
        ids = torch.tensor(example.input_ids)[None]
        learned = torch.tensor(example.labels)[1:] != IGNORE
        assert int(learned.sum()) == len(example.input_ids) - len(loaded.tokeniser.prompt_ids(rows[len(targets)]))
        ours.append(student(ids).logits[0, :-1][learned])
        theirs.append(loaded.model(ids).logits[0, :-1][learned])
        targets.append(ids[0, 1:][learned])
    expected = soft_loss(torch.cat(ours), torch.cat(theirs), 2.0)
    if not by_logits:
        expected = F.cross_entropy(torch.cat(ours), torch.cat(targets))
    assert float(found) == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("targets", ["logits", "answers"])
def test_a_student_comes_to_answer_as_its_teacher(
    loaded: Release, small: str, transfer: Transfer, targets: Any
) -> None:
    how = Teaching(targets=targets, epochs=12, learning_rate=2e-2, batch=3)
    student = teach(loaded, small, transfer, how, silent)
    assert student.logits == (targets == "logits")
    assert student.questions == len(QUESTIONS)  # each once
    assert len(student.losses) == 12
    assert student.losses[-1] < 0.7 * student.losses[0]


def test_the_same_seed_teaches_the_same_and_another_another(loaded: Release, small: str, transfer: Transfer) -> None:
    one, again, other = (
        teach(loaded, small, transfer, FAST.model_copy(update={"seed": seed}), silent).base.model.state_dict()
        for seed in (3, 3, 4)
    )
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_answers_of_the_file_are_not_read(loaded: Release, small: str, tmp_path: Path, transfer: Transfer) -> None:
    rows = tuple({**row, "answer": 7, "fedllm_answer": "no"} for row in transfer.rows)
    one, other = (
        teach(loaded, small, each, FAST, silent).base.model.state_dict()
        for each in (transfer, replace(transfer, rows=rows))
    )
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_teacher_is_never_changed(loaded: Release, small: str, transfer: Transfer) -> None:
    before = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    teach(loaded, small, transfer, FAST, silent)
    assert all(torch.equal(before[name], tensor) for name, tensor in loaded.model.state_dict().items())


def test_another_vocabulary_is_taught_by_answers_and_never_by_logits(
    loaded: Release, tmp_path: Path, transfer: Transfer
) -> None:
    other = another_vocabulary(tmp_path / "other")
    assert not teach(loaded, other, transfer, FAST, silent).logits
    with pytest.raises(ModelError, match="its vocabulary is another"):
        teach(loaded, other, transfer, FAST.model_copy(update={"targets": "logits"}), silent)


# ---- a student is a release ------------------------------------------------------------------------------------------


def test_a_student_is_a_release_with_its_teachers_claim(
    tiny_release: Released, loaded: Release, small: str, public: Path, tmp_path: Path
) -> None:
    trust = Trust.read(tiny_release.trust)
    out = tmp_path / "student"
    signed = distil(loaded, small, public, out, trust, tiny_release.signer, FAST, silent, public=True)
    found, teacher = verify_release(out, trust), tiny_release.manifest
    assert found == signed
    assert (found.form, found.quantized, found.name) == ("student", "none", "student")
    assert found.teacher == manifest_digest(tiny_release.folder)
    assert (found.privacy, found.training, found.reading) == (teacher.privacy, teacher.training, teacher.reading)
    assert found.base.source == small
    assert len(found.public_data) == 1
    answers = load_release(out, found, "cpu")
    assert len(answers.answers(answers.prompts([{"question": "a", "answer": "-"}]), 4)) == 1
    for card in ("README.md", "README.ko.md"):
        text = (out / card).read_text("utf-8")
        assert "2.5" in text
        assert found.public_data[0][:16] in text


def test_a_student_can_teach_and_keeps_the_claim(
    tiny_release: Released, loaded: Release, small: str, public: Path, tmp_path: Path
) -> None:
    trust, signer = Trust.read(tiny_release.trust), tiny_release.signer
    first = distil(loaded, small, public, tmp_path / "first", trust, signer, FAST, silent, public=True)
    again = load_release(tmp_path / "first", first, "cpu")
    second = distil(again, small, public, tmp_path / "second", trust, signer, FAST, silent, public=True)
    assert second.teacher == manifest_digest(tmp_path / "first") != first.teacher
    assert second.privacy == first.privacy


def test_a_student_is_stored_in_the_type_that_it_came_in(
    tiny_release: Released, loaded: Release, small: str, public: Path, tmp_path: Path
) -> None:
    weights = Path(small) / "model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    config = json.loads((Path(small) / "config.json").read_text("utf-8"))
    (Path(small) / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}), "utf-8")
    trust = Trust.read(tiny_release.trust)
    distil(loaded, small, public, tmp_path / "out", trust, tiny_release.signer, FAST, silent, public=True)
    assert {t.dtype for t in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}


def test_a_student_of_a_model_that_is_not_private_says_so(
    tiny_release: Released, loaded: Release, small: str, public: Path, tmp_path: Path
) -> None:
    privacy = loaded.manifest.privacy.model_copy(update={"seeded": True})
    branded = replace(loaded, manifest=loaded.manifest.model_copy(update={"privacy": privacy}))
    trust = Trust.read(tiny_release.trust)
    found = distil(branded, small, public, tmp_path / "out", trust, tiny_release.signer, FAST, silent, public=True)
    assert not found.privacy.private
    assert "NOT PRIVATE" in (tmp_path / "out" / "README.md").read_text("utf-8")
    assert "프라이버시 보호 미적용" in (tmp_path / "out" / "README.ko.md").read_text("utf-8")


# ---- on which questions ----------------------------------------------------------------------------------------------


@pytest.fixture
def sampled(loaded: Release, tiny_release: Released, tmp_path: Path) -> Path:
    """A synthetic set of the teacher's, signed."""
    prompts = tmp_path / "prompts.yaml"
    prompts.write_text(json.dumps({"prompts": QUESTIONS}), "utf-8")
    write_set(tmp_path / "set", loaded, prompts, 6, Sampling(), None, tiny_release.signer)
    return tmp_path / "set"


def test_a_file_is_refused_until_somebody_says_that_it_is_public(loaded: Release, public: Path) -> None:
    with pytest.raises(PrivacyError, match="cost epsilon that nobody counts") as error:
        read_transfer(public, loaded, Trust({}), False)
    assert "--data-is-public" in str(error.value)


def test_the_teachers_own_synthetic_set_needs_nobodys_word(
    loaded: Release, sampled: Path, tiny_release: Released
) -> None:
    for data in (sampled, sampled / RECORDS):
        found = read_transfer(data, loaded, Trust.read(tiny_release.trust), False)
        assert found.synthetic
        assert [row["question"] for row in found.rows] == QUESTIONS or len(found.rows) == len(QUESTIONS)


def test_a_set_of_another_adapter_is_refused_whatever_is_said(
    loaded: Release, sampled: Path, tiny_release: Released
) -> None:
    """Two adapters that were trained on the same records tell more of them than one."""
    training = loaded.manifest.training.model_copy(update={"adapter": "9" * 64})
    other = replace(loaded, manifest=loaded.manifest.model_copy(update={"training": training}))
    for public in (False, True):
        with pytest.raises(ReleaseError, match="adds up"):
            read_transfer(sampled, other, Trust.read(tiny_release.trust), public)


def test_a_set_that_was_altered_is_refused_whatever_is_said(
    loaded: Release, sampled: Path, tiny_release: Released
) -> None:
    with (sampled / RECORDS).open("a") as file:
        file.write('{"question": "a record of a site"}\n')
    for public in (False, True):
        with pytest.raises(ReleaseError, match=RECORDS):
            read_transfer(sampled, loaded, Trust.read(tiny_release.trust), public)


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty"),
        ("\n", "no records"),
        ('{"q": "a"}\n', "missing column question; the records have q"),
        ('{"question": ["a"]}\n', "question holds a list"),
        ('{"question": null}\n', "question is empty"),
        ('{"question"\n', "line 1"),
    ],
)
def test_questions_that_cannot_be_read_are_one_clear_error(
    loaded: Release, small: str, tmp_path: Path, text: str, said: str
) -> None:
    file = tmp_path / "questions.jsonl"
    file.write_text(text, "utf-8")
    with pytest.raises(DataError, match=said) as error:
        teach(loaded, small, read_transfer(file, loaded, Trust({}), True), FAST, silent)
    assert "questions.jsonl" in str(error.value)


def test_a_teacher_that_says_nothing_teaches_nothing(
    loaded: Release, small: str, transfer: Transfer, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(
        Release, "answers", lambda self, prompts, most, **_: ["3", "", *["x" * 60] * (len(prompts) - 2)]
    )
    assert teach(loaded, small, transfer, FAST, said.append).questions == 1
    assert f"left out: 1 empty answers, {len(QUESTIONS) - 2} too long for a record" in said
    monkeypatch.setattr(Release, "answers", lambda self, prompts, most, **_: [""] * len(prompts))
    with pytest.raises(DataError, match="no answer of the teacher can be used: 6 empty"):
        teach(loaded, small, transfer, FAST, silent)


def test_a_classifier_is_refused_with_the_reason(loaded: Release, small: str, transfer: Transfer) -> None:
    classifier = replace(loaded, manifest=loaded.manifest.model_copy(update={"task": "classification"}))
    with pytest.raises(ReleaseError, match="is a classifier"):
        teach(classifier, small, transfer, FAST, silent)


def test_a_student_that_is_no_smaller_is_warned_of(loaded: Release, tmp_path: Path, transfer: Transfer) -> None:
    said: list[str] = []
    teach(loaded, str(save_llama(tmp_path / "large", num_hidden_layers=3)), transfer, FAST, said.append)
    assert any("it is no smaller" in line for line in said)


def test_a_student_of_fewer_positions_is_taught_on_shorter_records(
    tiny_release: Released, loaded: Release, tmp_path: Path, public: Path
) -> None:
    said: list[str] = []
    short = str(save_llama(tmp_path / "short", num_hidden_layers=1, max_position_embeddings=32))
    trust = Trust.read(tiny_release.trust)
    found = distil(loaded, short, public, tmp_path / "out", trust, tiny_release.signer, FAST, said.append, public=True)
    assert found.max_length == 32
    assert any("the student reads 32 tokens" in line for line in said)


def test_a_tokenizer_without_a_pad_token_pads_with_its_end_or_is_refused(
    loaded: Release, tmp_path: Path, transfer: Transfer
) -> None:
    folder = Path(another_vocabulary(tmp_path / "other"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), eos_token="</s>")
    tokenizer.save_pretrained(folder)
    assert teach(loaded, str(folder), transfer, FAST, silent).tokenizer.pad_token == "</s>"
    PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json")).save_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder).eos_token is None
    with pytest.raises(ModelError, match="neither a pad nor an eos token"):
        teach(loaded, str(folder), transfer, FAST, silent)


def test_a_student_that_is_not_there_is_one_clear_error(loaded: Release, transfer: Transfer) -> None:
    with pytest.raises(ConfigError, match="/no/such/model"):
        teach(loaded, "/no/such/model", transfer, FAST, silent)


def test_a_loss_that_is_no_number_ends_the_training(loaded: Release, small: str, transfer: Transfer) -> None:
    """The weights are numbers, and their products are too large for one."""
    weights = load_file(Path(small) / "model.safetensors")
    weights["model.norm.weight"] = torch.full_like(weights["model.norm.weight"], 3e38)
    save_file(weights, Path(small) / "model.safetensors", {"format": "pt"})
    with pytest.raises(Diverged, match="Lower --learning-rate"):
        teach(loaded, small, transfer, FAST, silent)


@pytest.mark.parametrize(
    "failure",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_one_clear_error_and_leaves_nothing(
    tiny_release: Released, loaded: Release, small: str, public: Path, tmp_path: Path, failure: Exception,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def full(*_: Any, **__: Any) -> None:
        raise failure

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", full)
    before = set(tmp_path.iterdir())
    trust = Trust.read(tiny_release.trust)
    with pytest.raises(FolderError, match=r"No space left on device.*Free some space"):
        distil(loaded, small, public, tmp_path / "out", trust, tiny_release.signer, FAST, silent, public=True)
    assert set(tmp_path.iterdir()) == before


def test_a_student_that_has_learned_from_records_of_its_own_is_refused(
    tiny_release: Released, loaded: Release, public: Path, tmp_path: Path
) -> None:
    trust, signer = Trust.read(tiny_release.trust), tiny_release.signer
    with pytest.raises(ReleaseError, match="is a release itself"):
        distil(loaded, str(tiny_release.folder), public, tmp_path / "out", trust, signer, FAST, silent, public=True)


def test_a_student_is_not_written_into_its_teachers_folder_which_would_verify_no_more(
    tiny_release: Released, loaded: Release, small: str, public: Path
) -> None:
    trust, signer = Trust.read(tiny_release.trust), tiny_release.signer
    with pytest.raises(ReleaseError, match="lies in the release"):
        distil(loaded, small, public, tiny_release.folder / "out", trust, signer, FAST, silent, public=True)
    assert not (tiny_release.folder / "out").exists()


def test_a_key_that_nobody_would_trust_is_told_before_the_training(
    tiny_release: Released, loaded: Release, small: str, public: Path, tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    _, others = keys_of(tmp_path / "other")
    with pytest.raises(ReleaseError, match="the student would not verify"):
        distil(loaded, small, public, tmp_path / "out", Trust.read(others), tiny_release.signer, FAST, silent)


# ---- the command -----------------------------------------------------------------------------------------------------


def command(released: Released, student: str, data: Path, out: Path, *more: str) -> str:
    """Run the command and return what it printed; raises what it raised."""
    done = CliRunner().invoke(
        app,
        ["release", "distil", str(released.folder), "--student", student, "--data", str(data), "--out", str(out),
         "--trust", str(released.trust), "--key", str(released.key), "--epochs", "2", *more],
    )  # fmt: skip
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.output


def test_the_command_teaches_and_tells(tmp_path: Path) -> None:
    """On the demo's base, which answers by itself."""
    key, trust = keys_of(tmp_path)
    folder = tmp_path / "release"
    shutil.copytree(Path(resolve("pkg://simulations.demo/base")), folder)
    sign_release(folder, a_manifest(folder, max_length=96), Identity.read(key))
    released = Released(folder, key, trust)
    base = load_base(ModelConfig(source=str(folder), max_length=96), "cpu")
    small = halve(base.model, base.tokenizer, tmp_path / "small")
    (tmp_path / "topics.yaml").write_text('{"prompts": ["What is the fee for {x}?"], "lists": {"x": ["a", "b"]}}')
    done = CliRunner().invoke(
        app,
        ["release", "synthesize", str(folder), "--prompts", str(tmp_path / "topics.yaml"), "--out",
         str(tmp_path / "set"), "--trust", str(trust), "--n", "8", "--key", str(key)],
    )  # fmt: skip
    assert done.exception is None, done.output
    said = command(released, str(small), tmp_path / "set", tmp_path / "out")
    assert said.splitlines()[0].startswith("the teacher answers ")
    assert "epoch 2/2" in said
    assert "epsilon 2.5 at delta 1e-05, for one person of one site" in said
    found = verify_release(tmp_path / "out", Trust.read(trust))
    assert found.form == "student"
    student = load_release(tmp_path / "out", found, "cpu")
    assert student.answers(student.prompts([{"question": "What is the fee for a?", "answer": "-"}]), 40) != [""]


def test_the_command_refuses_before_it_trains(tiny_release: Released, small: str, public: Path, tmp_path: Path) -> None:
    with pytest.raises(PrivacyError):
        command(tiny_release, small, public, tmp_path / "out")
    with pytest.raises(ConfigError, match="epochs=0"):
        command(tiny_release, small, public, tmp_path / "out", "--data-is-public", "--epochs", "0")
    with pytest.raises(ConfigError, match="temperature"):
        command(tiny_release, small, public, tmp_path / "out", "--data-is-public", "--temperature", "0")
    with pytest.raises(FolderError, match="not empty"):
        command(tiny_release, small, public, tmp_path, "--data-is-public")
    changed = save_llama(tmp_path / "changed", seed=9)
    (changed / "release.json").write_bytes((tiny_release.folder / "release.json").read_bytes())
    with pytest.raises(ReleaseError, match="was changed"):
        command(replace(tiny_release, folder=changed), small, public, tmp_path / "out", "--data-is-public")
    assert not (tmp_path / "out").exists()
