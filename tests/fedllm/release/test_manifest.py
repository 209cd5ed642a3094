"""A release is what was signed: whatever is changed, added, missing, or signed by others, is named."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedllm.audit.trust import Trust
from fedllm.canonical import canonical_json
from fedllm.crypto.identity import Identity
from fedllm.crypto.signed_documents import sign_envelope
from fedllm.errors import ReleaseError
from fedllm.release.manifest import MANIFEST, Manifest, read_manifest, sign_release, verify_release
from tests.fedllm.release.conftest import Released
from tests.test_architecture import ROOT

TYPE = "application/vnd.fedllm.release+json"
Copy = Callable[[], Path]


@pytest.fixture
def trust(tiny_release: Released) -> Trust:
    return Trust.read(tiny_release.trust)


@pytest.fixture
def copy(tiny_release: Released, tmp_path: Path) -> Path:
    """A copy of the release, to be spoilt."""
    return Path(shutil.copytree(tiny_release.folder, tmp_path / "copy"))


def test_a_release_of_a_run_verifies(release: Released) -> None:
    assert verify_release(release.folder, Trust.read(release.trust)).name == "run"


def test_a_release_verifies_wherever_it_is_copied(copy: Path, trust: Trust, tiny_release: Released) -> None:
    assert verify_release(copy, trust) == tiny_release.manifest


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_changed_byte_is_named(copy: Path, trust: Trust, name: str) -> None:
    data = bytearray((copy / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / name).write_bytes(data)
    with pytest.raises(ReleaseError, match=f"{name} was changed since it was signed"):
        verify_release(copy, trust)


def test_a_missing_file_is_named(copy: Path, trust: Trust) -> None:
    (copy / "config.json").unlink()
    with pytest.raises(ReleaseError, match=r"config\.json is missing"):
        verify_release(copy, trust)


@pytest.mark.parametrize("name", ["modeling.py", "deep/er/notes.txt", ".hidden", "모델.bin"])
def test_an_added_file_is_named(copy: Path, trust: Trust, name: str) -> None:
    (copy / name).parent.mkdir(parents=True, exist_ok=True)
    (copy / name).write_bytes(b"")
    with pytest.raises(ReleaseError, match=f"{name} was added"):
        verify_release(copy, trust)


def test_a_renamed_file_is_named(copy: Path, trust: Trust) -> None:
    (copy / "config.json").rename(copy / "config2.json")
    with pytest.raises(ReleaseError, match=r"config.json is missing|config2.json was added"):
        verify_release(copy, trust)


@pytest.mark.parametrize("kind", ["link", "folder", "outside", "pipe"])
def test_what_is_no_plain_file_is_refused(copy: Path, trust: Trust, tmp_path: Path, kind: str) -> None:
    place = copy / "config.json"
    if kind == "link":  # to the very bytes that were signed
        place.rename(tmp_path / "elsewhere.json")
        place.symlink_to(tmp_path / "elsewhere.json")
    elif kind == "folder":
        (copy / "more").symlink_to(tmp_path)
    elif kind == "outside":
        (copy / "more").symlink_to("/etc/hostname")
    else:
        os.mkfifo(copy / "more")
    with pytest.raises(ReleaseError, match="neither a file nor a folder"):
        verify_release(copy, trust)


def test_a_manifest_that_is_a_pipe_is_refused_and_not_waited_for(copy: Path, trust: Trust) -> None:
    (copy / MANIFEST).unlink()
    os.mkfifo(copy / MANIFEST)
    with pytest.raises(ReleaseError, match="no file, but a link or the like"):
        verify_release(copy, trust)


def test_an_added_file_is_named_before_any_is_read(copy: Path, trust: Trust) -> None:
    with (copy / "endless.bin").open("wb") as file:
        file.truncate(1 << 42)  # no bytes on the disk, and an hour's to read
    with pytest.raises(ReleaseError, match=r"endless\.bin was added"):
        verify_release(copy, trust)


def test_an_empty_folder_is_named_for_an_adapter_would_take_it_for_its_base(copy: Path, trust: Trust) -> None:
    (copy / "base").mkdir()
    with pytest.raises(ReleaseError, match="base: nothing is in this folder"):
        verify_release(copy, trust)


def test_a_files_name_cannot_write_a_line_of_its_own(copy: Path, trust: Trust) -> None:
    (copy / "a\nverified: 9 files\x1b[0m").touch()
    with pytest.raises(ReleaseError) as refused:
        verify_release(copy, trust)
    assert "\n" not in str(refused.value)
    assert "\x1b" not in str(refused.value)


def test_a_stranger_is_not_believed(copy: Path, trust: Trust, tiny_release: Released) -> None:
    stranger = Identity.generate()
    sign_release(copy, tiny_release.manifest, stranger)
    with pytest.raises(ReleaseError, match=f"signed by {stranger.public.fingerprint}, which is not a key that you"):
        verify_release(copy, trust)


def test_a_better_claim_needs_head_offices_key(copy: Path, trust: Trust, tiny_release: Released) -> None:
    claim = tiny_release.manifest.privacy.model_copy(update={"epsilon": 0.1})
    sign_release(copy, tiny_release.manifest.model_copy(update={"privacy": claim}), Identity.generate())
    with pytest.raises(ReleaseError, match="not a key that you trust"):
        verify_release(copy, trust)


def test_a_site_that_is_trusted_is_not_head_office(copy: Path, tiny_release: Released) -> None:
    fingerprint = tiny_release.signer.public.fingerprint
    with pytest.raises(ReleaseError, match="not a key that you trust as head-office"):
        verify_release(copy, Trust({"busan": [fingerprint], "head-office": [Identity.generate().public.fingerprint]}))


def test_a_manifest_that_names_another_signer_is_refused(copy: Path, trust: Trust, tiny_release: Released) -> None:
    manifest = tiny_release.manifest.model_copy(update={"signer": "somebody"})
    envelope = sign_envelope(canonical_json(manifest.model_dump(mode="json")), TYPE, tiny_release.signer)
    (copy / MANIFEST).write_text(envelope + "\n", "utf-8")
    with pytest.raises(ReleaseError, match="names somebody as its signer"):
        verify_release(copy, trust)


def test_a_claim_that_was_altered_in_place_does_not_fit_its_signature(copy: Path, trust: Trust) -> None:
    import base64

    envelope = json.loads((copy / MANIFEST).read_text("utf-8"))
    payload = base64.b64decode(envelope["payload"]).replace(b'"epsilon":2.5', b'"epsilon":0.5')
    envelope["payload"] = base64.b64encode(payload).decode()
    (copy / MANIFEST).write_text(json.dumps(envelope, separators=(",", ":")) + "\n", "utf-8")
    with pytest.raises(ReleaseError, match="the signature does not fit the content"):
        verify_release(copy, trust)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda text: text[: len(text) // 2], "not a signed envelope"),
        (lambda text: "", "not a signed envelope"),
        (lambda text: text + text, "not a signed envelope"),
        (lambda text: " " + text, "not in the form in which it was signed"),
        (lambda text: "[" * 100_000, "not a signed envelope"),
        (lambda text: " " * (17 << 20), "expected at most 16,777,216"),
    ],
    ids=["half", "empty", "twice", "another form", "deep", "huge"],
)
def test_a_damaged_manifest_is_one_clear_error(
    copy: Path, trust: Trust, spoil: Callable[[str], str], words: str
) -> None:
    (copy / MANIFEST).write_text(spoil((copy / MANIFEST).read_text("utf-8")), "utf-8")
    with pytest.raises(ReleaseError, match=words):
        verify_release(copy, trust)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": 2}, "format"),
        ({"more": 1}, "more"),
        ({"files": {"a": "b"}}, "files"),
        ({"form": "student"}, "a student names its teacher"),
        ({"made": "yesterday"}, "made"),
        ({"name": "two\nlines"}, "name"),
    ],
)
def test_a_manifest_that_says_something_impossible_is_refused(
    copy: Path, trust: Trust, tiny_release: Released, change: dict[str, object], words: str
) -> None:
    values = {**tiny_release.manifest.model_dump(mode="json"), **change}
    envelope = sign_envelope(canonical_json(values), TYPE, tiny_release.signer)
    (copy / MANIFEST).write_text(envelope + "\n", "utf-8")
    with pytest.raises(ReleaseError, match=words):
        verify_release(copy, trust)


def test_an_envelope_of_another_kind_is_no_release(copy: Path, trust: Trust, tiny_release: Released) -> None:
    content = canonical_json(tiny_release.manifest.model_dump(mode="json"))
    envelope = sign_envelope(content, "application/vnd.fedllm.audit+json", tiny_release.signer)
    (copy / MANIFEST).write_text(envelope + "\n", "utf-8")
    with pytest.raises(ReleaseError, match="an envelope of another kind"):
        verify_release(copy, trust)


def test_a_folder_without_a_manifest_is_no_release(tmp_path: Path, trust: Trust) -> None:
    with pytest.raises(ReleaseError, match="holds no release"):
        verify_release(tmp_path, trust)
    with pytest.raises(ReleaseError, match="holds no release"):
        verify_release(tmp_path / "missing", trust)


@settings(suppress_health_check=list(HealthCheck))
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_no_flipped_bit_of_a_manifest_goes_unnoticed(tiny_release: Released, place: float, bit: int) -> None:
    data = bytearray((tiny_release.folder / MANIFEST).read_bytes())
    data[int(place * (len(data) - 1))] ^= 1 << bit  # not the line's end, which is not signed
    folder = tiny_release.folder.parent / f"flipped-{os.getpid()}"
    folder.mkdir(exist_ok=True)
    (folder / MANIFEST).write_bytes(data)
    with pytest.raises(ReleaseError):
        read_manifest(folder, Trust.read(tiny_release.trust))


def test_what_was_signed_is_what_is_read(tmp_path: Path, tiny_release: Released) -> None:
    (tmp_path / "파일 one.txt").write_text("x", "utf-8")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "two").write_bytes(b"\0")
    changes = {"name": "한국어 이름", "labels": ("카드", "loan"), "task": "classification"}
    signed = sign_release(tmp_path, tiny_release.manifest.model_copy(update=changes), tiny_release.signer)
    found = verify_release(tmp_path, Trust.read(tiny_release.trust))
    assert found == signed == Manifest.model_validate_json(signed.model_dump_json())
    assert set(found.files) == {"파일 one.txt", "deep/two"}


def test_verification_needs_no_torch(tiny_release: Released) -> None:
    code = (
        "import sys\nfrom fedllm.cli.main import main\n"
        "try: main()\n"
        "finally: print('LOADED', sorted({'torch', 'transformers', 'peft', 'numpy'} & set(sys.modules)))"
    )
    arguments = ["release", "verify", str(tiny_release.folder), "--trust", str(tiny_release.trust)]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert "verified: " in done.stdout
    loaded = done.stdout.partition("LOADED ")[2]
    assert "torch" not in loaded
    assert "transformers" not in loaded
    assert len(done.stdout.splitlines()) < 24  # one screen
