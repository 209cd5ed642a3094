"""An export states only what it has checked, and whatever fails leaves nothing behind."""

import hashlib
import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fedllm.audit.bundle import write_audit
from fedllm.audit.trust import Trust
from fedllm.config import ModelConfig, TextConfig
from fedllm.crypto.hash_chain import make_entry, open_entry
from fedllm.crypto.identity import Identity
from fedllm.errors import FedllmError, FolderError, ReleaseError
from fedllm.release.chat_template import Frame, made_template, ollama_template
from fedllm.release.export import export
from fedllm.release.finished_run import _largest, read_run
from fedllm.release.loading import BASE, load_release
from fedllm.release.manifest import MANIFEST, verify_release
from fedllm.training.data import Tokeniser
from server.checkpoint import CONFIG
from server.events import CHECKPOINT
from server.run_record import RECORD_KEY
from tests.conftest import byte_tokenizer, save_llama
from tests.fedllm.audit.conftest import any_pdf
from tests.fedllm.release.conftest import Released, small_run
from tests.fedllm.release.runs import SIGNER, trained
from tests.fedllm.training.bases import classifier, language, make
from tests.fedllm.training.test_chat import chatting
from tests.korean import english_words
from tests.simulations.conftest import CommandsHere, Result

pytestmark = pytest.mark.filterwarnings("ignore:Could not find a config file in:UserWarning")  # peft, of a local base
Cli = Callable[..., Result]


@pytest.fixture
def run(finished_run: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, to be spoilt."""
    return Path(shutil.copytree(finished_run, tmp_path / "run"))


@pytest.fixture
def fedllm(tmp_path: Path) -> Cli:
    return CommandsHere(tmp_path)


def refused(fedllm: Cli, run: Path, *more: object) -> str:
    """Export a run, which has to fail with one error and leave nothing; return what is said."""
    dest = run.parent / "dest" / "release"
    result = fedllm("release", "export", str(run), str(dest), *map(str, more))
    assert result.code == 1, result.text
    assert result.error.count("error ") >= 1
    assert "Traceback" not in result.text
    assert "FEDLLM_TRACEBACK" not in result.text
    assert not dest.exists()
    assert not dest.parent.exists() or not list(dest.parent.iterdir())
    return result.text


# ---- what is written -------------------------------------------------------------------------------------------------


def test_a_run_is_exported_and_verified(fedllm: Cli, finished_run: Path, tmp_path: Path) -> None:
    dest = tmp_path / "release"
    result = fedllm("release", "export", str(finished_run), str(dest))
    assert result.code == 0, result.text
    verified = fedllm("release", "verify", str(dest), "--trust", str(finished_run / "trusted-keys.txt"))
    assert verified.code == 0, verified.text
    for text in (result.text, verified.text):
        assert "adapter, causal-lm" in text
        assert "for one person of one site" in text
        assert "NOT PRIVATE" not in text
    audit = json.loads((finished_run / "audit" / "audit.json").read_text("utf-8"))
    assert f"epsilon {audit['accountants']['pld']:.4g} at delta 0.001" in verified.text
    again = fedllm("release", "export", str(finished_run), str(dest))
    assert again.code == 1
    assert "Nothing was overwritten" in again.text
    assert fedllm("release", "verify", str(dest), "--trust", str(finished_run / "trusted-keys.txt")).code == 0


def test_the_manifest_states_what_record_audit_and_plan_say(release: Released, finished_run: Path) -> None:
    entries = [open_entry(line) for line in (finished_run / "record.jsonl").read_text("utf-8").splitlines()]
    plan = json.loads((finished_run / "plan.json").read_text("utf-8"))
    audit = (finished_run / "audit" / "audit.json").read_bytes()
    manifest, figures = release.manifest, json.loads(audit)
    assert manifest.form == "merged"
    assert manifest.base.source == plan["model"]["source"]
    assert manifest.training.record == entries[-1].digest
    assert manifest.training.adapter == entries[-1].body["adapter"]
    assert manifest.training.plan == entries[0].body["plan_digest"]
    assert manifest.training.signer == manifest.signer == entries[-1].signer.fingerprint
    assert manifest.privacy.audit == hashlib.sha256(audit).hexdigest()
    assert manifest.privacy.epsilon == figures["accountants"]["pld"]
    assert manifest.privacy.verdict == figures["verdict"] == "within"
    assert (manifest.privacy.delta, manifest.privacy.unit, manifest.privacy.mode) == (1e-3, "person", "local")
    assert manifest.reading.prompt == "Q: {question}\nA:"
    assert manifest.max_length == plan["model"]["max_length"]


def test_a_release_moves_to_another_machine(finished_run: Path, tmp_path: Path) -> None:
    """A base that nobody else has by its name lies beside the adapter."""
    signer = Identity.read(finished_run / RECORD_KEY)
    made = export(read_run(finished_run, signer), tmp_path / "first", signer)
    moved = made.folder.rename(tmp_path / "moved")
    trust = Trust({"head-office": [signer.public.fingerprint]})
    loaded = load_release(moved, verify_release(moved, trust), "cpu")
    assert (moved / BASE / "model.safetensors").exists()
    assert json.loads((moved / "adapter_config.json").read_text("utf-8"))["base_model_name_or_path"] == BASE
    answers = loaded.answers(loaded.prompts([{"question": "a", "answer": "b"}]), 4)
    assert len(answers) == 1


def test_all_may_read_a_release_and_nobody_else_than_its_owner_may_write_it(release: Released) -> None:
    for path in (release.folder, *release.folder.rglob("*")):
        assert path.stat().st_mode & 0o777 == (0o755 if path.is_dir() else 0o644), path


def test_a_run_that_protects_nobody_is_branded(fedllm: Cli, tmp_path: Path) -> None:
    run = small_run(tmp_path / "runs", save_llama(tmp_path / "base"), privacy={"mode": "off", "noise_multiplier": None})
    result = fedllm("release", "export", str(run), str(tmp_path / "release"), "--merge")
    assert result.code == 0, result.text
    assert result.output.startswith("NOT PRIVATE")
    assert "epsilon ∞" in result.text
    verified = fedllm("release", "verify", str(tmp_path / "release"), "--trust", str(run / "trusted-keys.txt"))
    assert verified.output.startswith("NOT PRIVATE")
    assert "**NOT PRIVATE**" in (tmp_path / "release" / "README.md").read_text("utf-8")
    assert "NOT PRIVATE" in (tmp_path / "release" / "README.ko.md").read_text("utf-8")
    assert "differential-privacy" not in front_matter(tmp_path / "release")["tags"]


def test_head_office_signs_a_run_of_a_deployment_with_its_own_key(fedllm: Cli, run: Path, tmp_path: Path) -> None:
    """Its audit need not be signed: what it says is computed again."""
    key = (run / RECORD_KEY).rename(tmp_path / "identity")
    with any_pdf():
        write_audit(run, tmp_path / "report", [("audit", "en")])
    dest = tmp_path / "release"
    arguments = ["release", "export", str(run), str(dest), "--key", str(key), "--audit", str(tmp_path / "report")]
    result = fedllm(*arguments)
    assert result.code == 0, result.text
    assert fedllm("release", "verify", str(dest), "--trust", str(run / "trusted-keys.txt")).code == 0


def test_gaps_in_the_evidence_are_stated_and_make_no_claim_smaller(
    fedllm: Cli, run: Path, tmp_path: Path, release: Released
) -> None:
    """Without ledgers the audit counts the answers of this run; what the sites have signed of all their runs counts."""
    (tmp_path / "none").mkdir()
    key = Identity.read(run / RECORD_KEY)
    with any_pdf():
        audit = write_audit(run, tmp_path / "report", [("audit", "en")], tmp_path / "none", key).audit
    assert audit.verdict == "unverifiable"
    found = read_run(run, key, tmp_path / "report").privacy
    assert found.verdict == "unverifiable"
    assert found.epsilon is not None
    assert release.manifest.privacy.epsilon is not None
    assert found.epsilon == pytest.approx(release.manifest.privacy.epsilon, abs=1e-3)
    before = audit.model_copy(update={"sites": (audit.sites[0].model_copy(update={"charged": 7.5}), *audit.sites[1:])})
    assert _largest(before) == 7.5
    unbounded = audit.sites[0].model_copy(update={"charged": None})
    assert _largest(audit.model_copy(update={"sites": (unbounded, *audit.sites[1:])})) is None
    dest = tmp_path / "release"
    result = fedllm("release", "export", str(run), str(dest), "--audit", str(tmp_path / "report"))
    assert result.code == 0, result.text
    assert "cannot verify" in result.text
    assert "not all of it could be verified" in (dest / "README.md").read_text("utf-8")
    assert "일부 미검증" in (dest / "README.ko.md").read_text("utf-8")


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_a_folder_without_a_run_is_refused(fedllm: Cli, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    key = tmp_path / "identity"
    Identity.load_or_create(key)
    assert "holds no run" in refused(fedllm, tmp_path / "empty", "--key", key)


def test_without_a_key_it_says_which(fedllm: Cli, run: Path) -> None:
    (run / RECORD_KEY).unlink()
    assert "give --key" in refused(fedllm, run)


def test_without_an_audit_it_says_how_to_make_one(fedllm: Cli, run: Path) -> None:
    shutil.rmtree(run / "audit")
    assert f"fedllm audit report '{run}'" in refused(fedllm, run)


def test_an_epsilon_that_the_evidence_contradicts_is_refused(fedllm: Cli, run: Path) -> None:
    path = run / "audit" / "audit.json"
    audit = json.loads(path.read_text("utf-8"))
    audit["accountants"]["pld"] /= 2
    path.write_text(json.dumps(audit), "utf-8")
    assert "audit.json: accountants.pld states" in refused(fedllm, run)


def test_an_audit_that_was_changed_since_it_was_signed_is_refused(fedllm: Cli, run: Path) -> None:
    (run / "audit" / "audit.html").write_text("all is well", "utf-8")
    assert "audit.html: altered" in refused(fedllm, run)


def test_an_audit_that_a_stranger_has_signed_is_refused(fedllm: Cli, run: Path) -> None:
    with any_pdf():
        write_audit(run, run / "audit", [("audit", "en")], signer=Identity.generate())
    assert "who is not trusted" in refused(fedllm, run)


def test_an_audit_of_another_run_is_refused(fedllm: Cli, run: Path, tmp_path: Path, finished_run: Path) -> None:
    other = small_run(tmp_path / "runs", Path(read_base(finished_run)), training={"rounds": 1})
    shutil.rmtree(run / "audit")
    shutil.copytree(other / "audit", run / "audit")
    shutil.copy(other / RECORD_KEY, run / RECORD_KEY)  # which has signed that audit
    assert "is about run" in refused(fedllm, run)


def read_base(run: Path) -> str:
    return str(json.loads((run / CONFIG).read_text("utf-8"))["model"]["source"])


def test_a_run_that_goes_on_is_refused(fedllm: Cli, run: Path) -> None:
    record = run / "record.jsonl"
    lines = record.read_text("utf-8").splitlines(keepends=True)
    record.write_text("".join(lines[:-1]), "utf-8")
    assert "has no end" in refused(fedllm, run)


def test_a_record_that_was_altered_is_refused(fedllm: Cli, run: Path) -> None:
    record = run / "record.jsonl"
    lines = record.read_text("utf-8").splitlines(keepends=True)
    record.write_text("".join([lines[0], *lines[2:]]), "utf-8")
    assert "Entries were removed" in refused(fedllm, run)


def test_a_record_that_says_something_else_than_its_audit_is_refused(fedllm: Cli, run: Path) -> None:
    record = run / "record.jsonl"
    last = open_entry(record.read_text("utf-8").splitlines()[-1])
    line = make_entry(last.number + 1, last.digest, "end", last.at, dict(last.body), Identity.read(run / RECORD_KEY))
    record.write_text(record.read_text("utf-8") + line + "\n", "utf-8")
    assert "Make it again: fedllm audit report" in refused(fedllm, run)


def test_another_plan_than_the_records_is_refused(fedllm: Cli, run: Path) -> None:
    plan = json.loads((run / "plan.json").read_text("utf-8"))
    plan["privacy"]["delta"] = 1e-9
    (run / "plan.json").write_text(json.dumps(plan), "utf-8")
    assert "is not the plan that record.jsonl holds" in refused(fedllm, run)


def test_other_values_than_the_record_has_signed_are_refused(fedllm: Cli, run: Path) -> None:
    for name in (CHECKPOINT, f"{CHECKPOINT}.previous"):
        tensors = load_file(run / name)
        save_file({key: value + np.float32(1e-3) for key, value in tensors.items()}, run / name)
    assert "no checkpoint holds the adapter" in refused(fedllm, run)


def test_an_adapter_file_that_holds_something_else_is_refused(fedllm: Cli, run: Path) -> None:
    path = run / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    first = next(iter(tensors))
    save_file({**tensors, first: tensors[first] + np.float32(1)}, path)
    assert "does not hold what was trained" in refused(fedllm, run)
    path.unlink()
    assert "cannot be read" in refused(fedllm, run)


@pytest.mark.parametrize("damage", ["cut", "empty", "noise", "gone", "folder"])
@pytest.mark.parametrize(
    "name", ["record.jsonl", "plan.json", CONFIG, "audit/audit.json", "audit/record.jsonl", "adapter", RECORD_KEY]
)
def test_a_damaged_run_is_one_clear_error(fedllm: Cli, run: Path, name: str, damage: str) -> None:
    path = run / name if name != "adapter" else run / "adapter" / "adapter_model.safetensors"
    data = path.read_bytes()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage != "gone":
        path.write_bytes({"cut": data[: len(data) // 2], "empty": b"", "noise": b"\xff" + data[1:]}[damage])
        path.chmod(0o600)
    refused(fedllm, run)


def test_another_base_is_refused(tmp_path: Path) -> None:
    base = save_llama(tmp_path / "base")
    run, _ = trained(tmp_path / "run", language(base))
    save_llama(base, seed=1)
    with pytest.raises(ReleaseError, match="holds other weights"):
        export(run, tmp_path / "release", SIGNER)


def test_a_run_on_top_of_a_release_is_refused_for_its_epsilon_is_not_all_that_was_spent(tmp_path: Path) -> None:
    base = save_llama(tmp_path / "base")
    run, _ = trained(tmp_path / "run", language(base))
    (base / MANIFEST).touch()
    with pytest.raises(ReleaseError, match="is a release itself"):
        export(run, tmp_path / "release", SIGNER)
    assert not (tmp_path / "release").exists()


def test_virtual_tokens_cannot_be_merged(tmp_path: Path, tiny_llama: Path) -> None:
    run, _ = trained(tmp_path / "run", language(tiny_llama), method="prompt", tokens=4)
    for options in ({"merge": True}, {"quantize": "int8"}):
        with pytest.raises(ReleaseError, match="prompt tuning adds 4 virtual tokens to a text and changes no weight"):
            export(run, tmp_path / "release", SIGNER, **options)  # type: ignore[arg-type]


def test_a_verdict_of_exceeded_is_refused(fedllm: Cli, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fedllm.audit.bundle as bundle

    read = bundle.reread

    def exceeded(folder: Path, trust: Trust) -> Any:
        audit = read(folder, trust)
        findings = [f.model_copy(update={"status": "fails"}) if f.code == "budget" else f for f in audit.findings]
        return audit.model_copy(update={"verdict": "exceeded", "findings": tuple(findings)})

    monkeypatch.setattr(bundle, "reread", exceeded)
    assert "is not released: its audit says exceeded (budget" in refused(fedllm, run)


# ---- nothing is left of what fails -----------------------------------------------------------------------------------


def test_an_export_that_is_interrupted_leaves_nothing(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    signer = Identity.read(finished_run / RECORD_KEY)
    run = read_run(finished_run, signer)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fedllm.release.export.sign_release", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export(run, tmp_path / "place" / "release", signer, merge=True)
    assert not list((tmp_path / "place").iterdir())


def test_a_folder_with_something_in_it_is_left_alone(finished_run: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("x", "utf-8")
    signer = Identity.read(finished_run / RECORD_KEY)
    with pytest.raises(FolderError, match="Nothing was overwritten"):
        export(read_run(finished_run, signer), tmp_path, signer)
    assert (tmp_path / "mine").read_text("utf-8") == "x"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 56 KiB: no room for what is written, whatever the form."""
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=56k", "none", str(place)], capture_output=True)
    if done.returncode != 0:
        pytest.skip("mounting is not permitted here")
    yield place
    subprocess.run(["umount", str(place)], capture_output=True, check=False)


@pytest.mark.parametrize("merge", [True, False])
def test_a_full_disk_is_one_clear_error(finished_run: Path, small_disk: Path, merge: bool) -> None:
    signer = Identity.read(finished_run / RECORD_KEY)
    run = read_run(finished_run, signer)
    with pytest.raises(FedllmError, match=r"No space left on device.*Free some space, then try again"):
        export(run, small_disk / "release", signer, merge=merge)
    assert not list(small_disk.iterdir())


# ---- cards -----------------------------------------------------------------------------------------------------------


def front_matter(folder: Path) -> Any:
    return yaml.safe_load((folder / "README.md").read_text("utf-8").split("---\n")[1])


def snippet_of(page: str) -> str:
    found = re.search(r"```python\n(.*?)```", page, re.DOTALL)
    assert found is not None
    return found[1]


def runs_in(folder: Path, code: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    """Run the code of a card in its folder, and return what it prints."""
    monkeypatch.chdir(folder)
    exec(compile(code, "card", "exec"), {})
    return capsys.readouterr().out


MADE: dict[str, tuple[Callable[[Path], ModelConfig], dict[str, Any], dict[str, Any]]] = {
    "merged": (lambda place: language(save_llama(place)), {}, {"merge": True}),
    "adapter": (lambda place: language(save_llama(place)), {}, {}),
    "virtual": (lambda place: language(save_llama(place)), {"method": "prompt", "tokens": 4}, {}),
    "classes": (lambda place: classifier(save_llama(place)), {}, {"merge": True}),
    "classes-adapter": (lambda place: classifier(save_llama(place)), {}, {}),
    "mean": (lambda place: classifier(save_llama(place), pooling="mean"), {}, {"merge": True}),
}


def test_a_card_says_what_somebody_at_several_sites_is_promised(release: Released) -> None:
    """It is less than k times as much: with one noise for all sites, epsilon grows faster than their number."""
    audit = json.loads((release.key.parent / "audit" / "audit.json").read_text("utf-8"))
    (_, two), (_, three), *_ = audit["accountants"]["several_sites"]
    english, korean = ((release.folder / name).read_text("utf-8") for name in ("README.md", "README.ko.md"))
    assert f"at epsilon {two:.4g} at 2 sites, {three:.4g} at 3 sites" in english
    assert f"2개 지점 {two:.4g}, 3개 지점 {three:.4g}" in korean
    assert "add up" not in english


def test_the_korean_card_is_korean(release: Released) -> None:
    page = re.sub(r"```.*?```", "", (release.folder / "README.ko.md").read_text("utf-8"), flags=re.DOTALL)
    names = ["English", "vLLM", "llama.cpp", "GGUF", "Ollama", "Llama, Mistral, Gemma, Phi-3", "float32", "generated"]
    assert english_words(page, [*names, release.manifest.base.source, release.manifest.name]) == set()


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers 5, of how peft 0.21 calls it
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("case", MADE)
def test_a_card_says_how_to_load_the_model_and_that_works(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, method, options = MADE[case]
    run, _ = trained(tmp_path / "run", base(tmp_path / "base"), **method)
    folder = export(run, tmp_path / "release", SIGNER, **options).folder
    (tmp_path / "keys.txt").write_text(f"head-office {SIGNER.public.fingerprint}\n", "utf-8")
    english, korean = ((folder / name).read_text("utf-8") for name in ("README.md", "README.ko.md"))
    assert snippet_of(english) == snippet_of(korean)
    capsys.readouterr()
    printed = runs_in(folder, snippet_of(english), capsys, monkeypatch)
    if case.startswith(("classes", "mean")):
        assert printed.strip() in ("neg", "pos")
    assert (folder / "Modelfile").exists() == (case in ("merged", "adapter"))
    assert ("vllm serve" in english) == ("vllm serve" in korean) == (case in ("merged", "adapter"))
    for page in (english, korean):
        assert "2.5" in page
        assert "0.001" in page
        assert not re.search(r"\{[{%]|[%}]\}\n", page.replace(str(tmp_path), "")), "something was not filled in"
    card = front_matter(folder)
    assert card["pipeline_tag"] == (
        "text-classification" if case.startswith(("classes", "mean")) else "text-generation"
    )
    assert card["library_name"] == ("transformers" if options else "peft")
    assert "base_model" not in card  # a local path is no name
    assert "license" not in card


def test_a_card_names_a_base_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = trained(tmp_path / "run", language(save_llama(tmp_path / "base")))
    monkeypatch.setattr("fedllm.release.cards.resolve", lambda source: "someone/model")
    folder = export(run, tmp_path / "release", SIGNER).folder
    assert front_matter(folder)["base_model_relation"] == "adapter"
    assert "FROM ../base\nADAPTER .\n" in (folder / "Modelfile").read_text("utf-8")


def test_a_modelfile_asks_as_in_training(release: Released) -> None:
    text = (release.folder / "Modelfile").read_text("utf-8")
    assert text.splitlines()[1:] == [
        "FROM .", 'TEMPLATE """{{ "Q: " }}{{ .Prompt }}{{ "\\nA:" }}"""', 'PARAMETER stop "</s>"',
        "PARAMETER temperature 0",
    ]  # fmt: skip


# ---- how a question is put -------------------------------------------------------------------------------------------

TEMPLATES = [
    "Q: {question}\nA:",
    "{question}",
    "  {question} ",
    '질문 "{question}"\t🙂 \\n {{literal}} %}} {{{{ ',
    "{{% if x %}}{question}{{% endif %}}\n\n",
    "{question} ... {question}",
]


@pytest.mark.parametrize("prompt", TEMPLATES)
def test_a_chat_template_makes_the_tokens_of_training(prompt: str, tiny_llama: Path) -> None:
    tokenizer = byte_tokenizer()
    model, reading = ModelConfig(source=str(tiny_llama)), TextConfig(prompt=prompt, text=" {answer}")
    template = made_template(tokenizer, model, reading)
    tokenizer.chat_template = template
    for asked in ("카드를 잃어버렸어요 🙂", '"{{ x }}" {% y %}', "a\nb"):
        row = {"question": asked, "answer": "b"}
        trained_on = Tokeniser(tokenizer, model, reading).prompt_ids(row)
        turns = [
            {"role": "system", "content": "Be kind."}, {"role": "user", "content": "before"},
            {"role": "assistant", "content": "yes"}, {"role": "user", "content": asked},
        ]  # fmt: skip
        for opens in (True, False):
            found = tokenizer.apply_chat_template(turns, add_generation_prompt=opens, return_dict=False)
            assert found == trained_on
        turns.append({"role": "assistant", "content": "b"})
        whole = tokenizer.apply_chat_template(turns, return_dict=False)
        example = Tokeniser(tokenizer, model, reading)(row, 0)
        assert whole == example.input_ids.tolist()


@pytest.mark.parametrize("system", [None, '친절하게 "답"하세요.\n{{ x }}'])
@pytest.mark.parametrize("prompt", ["{question}", "Q {{1}}: {question}\n한국어로?"])
def test_a_chat_goes_through_the_bases_template_as_in_training(system: str | None, prompt: str, tmp_path: Path) -> None:
    base = make(tmp_path / "base", "llama", tokenizer=chatting())
    run, _ = trained(tmp_path / "run", language(base), rank=2, alpha=4.0)
    reading = TextConfig(prompt=prompt, text="{answer}", chat=True, system=system)
    made = export(replace(run, reading=reading), tmp_path / "release", SIGNER, merge=True)
    tokenizer = AutoTokenizer.from_pretrained(made.folder)
    tokeniser = Tokeniser(chatting(), run.outcome.plan.model.model_copy(update={"max_length": 500}), reading)
    turns = [{"role": "user", "content": "왜 {{ y }}?"}]
    row = {"question": "왜 {{ y }}?", "answer": "b"}
    asked = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    assert asked == tokeniser.prompt_ids(row)
    whole = tokenizer.apply_chat_template([*turns, {"role": "assistant", "content": "b"}], return_dict=False)
    assert whole == tokeniser(row, 0).input_ids.tolist()
    if system is not None:  # a conversation with a system turn of its own keeps it
        own = [{"role": "system", "content": "own"}, *turns]
        assert system not in tokenizer.apply_chat_template(own, tokenize=False)
    elif prompt == "{question}":
        assert tokenizer.chat_template == chatting().chat_template
    closing = tokenizer.convert_tokens_to_ids("<|im_end|>")
    generation = json.loads((made.folder / "generation_config.json").read_text("utf-8"))
    assert generation["eos_token_id"] == [2, closing]
    modelfile = (made.folder / "Modelfile").read_text("utf-8")
    assert "\nTEMPLATE" not in modelfile  # Ollama knows those of bases
    assert 'PARAMETER stop "<|im_end|>"' in modelfile


def test_a_template_of_the_base_gives_way_to_the_prompt_of_training(tmp_path: Path) -> None:
    base = make(tmp_path / "base", "llama", tokenizer=chatting())
    run, _ = trained(tmp_path / "run", language(base), rank=2, alpha=4.0)
    folder = export(run, tmp_path / "release", SIGNER).folder
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "why"}], tokenize=False) == "<s>Q: why\nA:"


def test_a_tokenizer_that_reads_the_beginning_of_a_text_otherwise_makes_the_tokens_of_training(
    tiny_llama: Path,
) -> None:
    """As those of SentencePiece, which put a blank before the first word."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = ["<pad>", "<s>", "</s>", "<unk>", "▁", *map(chr, range(33, 127))]
    inner = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, [], unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    inner.decoder = decoders.Metaspace(prepend_scheme="first")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    model, reading = ModelConfig(source=str(tiny_llama)), TextConfig(prompt="Q: {question} A:", text=" {answer}")
    tokenizer.chat_template = made_template(tokenizer, model, reading)
    found = tokenizer.apply_chat_template([{"role": "user", "content": "why"}], return_dict=False)
    assert found == Tokeniser(tokenizer, model, reading).prompt_ids({"question": "why", "answer": "b"})


def test_a_conversation_without_a_question_is_refused(release: Released) -> None:
    tokenizer = AutoTokenizer.from_pretrained(release.folder)
    with pytest.raises(Exception, match="expected a turn of the user"):
        tokenizer.apply_chat_template([{"role": "system", "content": "a"}])


def test_several_fields_have_no_chat_template(tiny_llama: Path) -> None:
    reading = TextConfig(prompt="{context} {question}", text="{answer}")
    assert made_template(byte_tokenizer(), ModelConfig(source=str(tiny_llama)), reading) is None


@pytest.mark.parametrize("prompt", TEMPLATES)
def test_ollamas_template_is_made_of_strings_alone(prompt: str) -> None:
    frame = Frame.of(prompt)
    assert frame is not None
    text = ollama_template(frame)
    assert '"""' not in text
    pieces = re.findall(r'\{\{ (?:(\.Prompt)|("(?:[^"\\]|\\.)*")) \}\}', text)
    assert "".join("asked" if hole else json.loads(literal) for hole, literal in pieces) == prompt.format(
        question="asked"
    )
    assert re.sub(r'\{\{ (?:\.Prompt|"(?:[^"\\]|\\.)*") \}\}', "", text) == ""


def test_an_answer_of_a_release_ends_where_it_ended_in_training(release: Released) -> None:
    tokenizer = AutoTokenizer.from_pretrained(release.folder)
    generation = json.loads((release.folder / "generation_config.json").read_text("utf-8"))
    assert generation["eos_token_id"] == [tokenizer.eos_token_id]
    assert generation["pad_token_id"] == tokenizer.pad_token_id


def test_reading_a_run_needs_no_torch() -> None:
    from tests.test_architecture import ROOT

    code = "import sys, fedllm.release.finished_run; print({'torch', 'transformers', 'peft'} & set(sys.modules))"
    import sys

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "set()"
