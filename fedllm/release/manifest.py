"""What a release is and what it claims: one signed file beside the files of the model. Needs no torch.

release.json is a DSSE envelope, signed by head office, over a `Manifest`: the digest of every file of the folder, what
the model was made of, and the privacy claim with the digest of the evidence behind it.
"""

import hashlib
import os
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import Field, ValidationError, model_validator

from fedllm.audit.trust import Trust
from fedllm.canonical import canonical_json, read_json
from fedllm.config import ModelConfig, TextConfig
from fedllm.crypto.identity import Identity
from fedllm.crypto.signed_documents import open_envelope, sign_envelope
from fedllm.errors import CryptoError, ReleaseError, first_line
from fedllm.files import cannot_read, cannot_write, replace_file
from fedllm.shown import escaped
from fedllm.values import HEAD_OFFICE, Frozen, Label, Printable

MANIFEST = "release.json"
_TYPE = "application/vnd.fedllm.release+json"
_MOST_BYTES, _MOST_FILES = 16 << 20, 10_000  # of a manifest, and in it

Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]  # SHA-256, in hex


class Signed(Frozen):
    """What head office signs about a folder."""

    format: Literal[1] = 1
    made: str = Field(pattern=r"^[0-9]{4}-[0-9]{2}-[0-9]{2} [0-9]{2}:[0-9]{2}$")  # UTC, by its signer's clock
    program: Printable  # fedllm's version
    signer: Printable | None = None  # fingerprint of who signs this: DSSE does not sign it
    files: dict[str, Digest] = Field({}, max_length=_MOST_FILES)  # of the folder, but this: path with / -> SHA-256


_T = TypeVar("_T", bound=Signed)


class Base(Frozen):
    """The public model that was tuned."""

    source: Printable
    revision: Printable | None
    digest: Digest  # of its weights: fedllm.training.model.BaseModel.digest


class Training(Frozen):
    """The run that made the adapter."""

    run: Printable  # the plan's id of the run
    plan: Digest  # of the plan
    record: Digest  # of the last entry of the run's record
    adapter: Digest  # of the trained values, as that entry has it
    signer: Printable  # fingerprint of the identity that signed the record


class Privacy(Frozen):
    """What is promised to one privacy unit of one site, over the whole run."""

    mode: Literal["local", "distributed", "off"]
    unit: Literal["record", "person"]
    epsilon: float | None = Field(ge=0)  # the largest that any site has spent; None: it has no bound
    delta: float
    seeded: bool  # sampling and noise came from a seed: no protection
    verdict: Literal["within", "exceeded", "unverifiable"]  # of the audit
    audit: Digest  # of the audit's audit.json

    @property
    def private(self) -> bool:
        """Whether the model may be called private."""
        return self.mode != "off" and not self.seeded and self.epsilon is not None

    @property
    def said(self) -> str:
        """The claim in a few words of English."""
        return f"epsilon {self.epsilon:.4g} at delta {self.delta:g}" if self.private else "NOT PRIVATE"


class Manifest(Signed):
    """What a release is; everything in it is public."""

    name: Printable  # of the run, or of the student
    form: Literal["adapter", "merged", "student"]
    quantized: Literal["none", "int8", "nf4"] = "none"
    task: Literal["causal-lm", "classification"]
    labels: tuple[Label, ...] = ()
    pooling: Literal["native", "mean"] = "native"
    base: Base
    training: Training
    privacy: Privacy
    reading: TextConfig  # how a record became text in training; a question is put the same way
    max_length: int = Field(ge=8)  # tokens of a record, question and answer together
    teacher: Digest | None = None  # a student: of its teacher's release.json; the claim is the teacher's
    public_data: tuple[Digest, ...] = ()  # a student: of the files it was taught on, which cost nothing
    signer: Printable
    files: dict[str, Digest] = Field(max_length=_MOST_FILES)

    @model_validator(mode="after")
    def _validate(self) -> "Manifest":
        if (self.form == "student") != (self.teacher is not None):
            raise ValueError("a student names its teacher, and nothing else does")
        return self

    @property
    def model(self) -> ModelConfig:
        """The base as a run would name it."""
        return ModelConfig(
            source=self.base.source, revision=self.base.revision, task=self.task, labels=self.labels,
            pooling=self.pooling, max_length=self.max_length,
        )  # fmt: skip


def sign_release(folder: Path, manifest: Manifest, signer: Identity) -> Manifest:
    """Write `manifest` to a folder, with the digests of the files that lie there and the signer's name, signed.

    Returns what was signed. Raises ReleaseError for a file that a release cannot hold, FolderError if it cannot be
    written.
    """
    signed = manifest.model_copy(update={"files": digests(folder), "signer": signer.public.fingerprint})
    write_signed(folder / MANIFEST, signed, _TYPE, signer)
    return signed


def write_signed(path: Path, value: Signed, payload_type: str, signer: Identity) -> None:
    """Write what `read_signed` reads; raises FolderError."""
    text = sign_envelope(canonical_json(value.model_dump(mode="json")), payload_type, signer)
    try:
        replace_file(path, text.encode() + b"\n", 0o644)
    except OSError as error:
        raise cannot_write(path, error) from error


def verify_release(folder: Path, trust: Trust) -> Manifest:
    """Return what a release claims, after everything that can be checked offline: signer, and every file.

    Raises ReleaseError that names the first file that is missing, changed or not signed for, or says that the
    signature is not head office's.
    """
    manifest = read_manifest(folder, trust)
    check_files(folder, manifest.files)
    return manifest


def read_manifest(folder: Path, trust: Trust) -> Manifest:
    """Return what head office has signed for a release; its files are not looked at. Raises ReleaseError."""
    if not os.path.lexists(folder / MANIFEST):
        raise ReleaseError(
            f"{folder} holds no release: there is no {MANIFEST}. Name a folder that `fedllm release export` has made."
        )
    return read_signed(folder / MANIFEST, _TYPE, Manifest, trust, _MOST_BYTES)


def read_signed(path: Path, payload_type: str, kind: type[_T], trust: Trust, most: int, what: str = "release") -> _T:
    """Return the `kind` that head office has signed in a file of at most `most` bytes; people call its folder `what`.

    Raises ReleaseError for what is no such file, and for another signer than `trust` knows.
    """
    again = f"Copy the {what} again."
    try:
        state = path.lstat()
        if not stat.S_ISREG(state.st_mode):  # a pipe would never end
            raise ReleaseError(f"{path}: no file, but a link or the like. {again}")
        if state.st_size > most:
            raise ReleaseError(f"{path}: {state.st_size:,} bytes, expected at most {most:,}. Is it a {what}?")
        text = path.read_text("utf-8")
    except UnicodeDecodeError:
        raise ReleaseError(f"{path}: not a signed envelope. {again}") from None
    except OSError as error:
        raise cannot_read(path, error) from None
    try:
        payload, signer = open_envelope(text.removesuffix("\n"), payload_type)
        read_json(payload)  # no key twice
        found = kind.model_validate_json(payload)
    except CryptoError as error:
        raise ReleaseError(f"{path}: {error}. {again}") from None
    except ValidationError as error:
        first = error.errors()[0]
        raise ReleaseError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    except (ValueError, RecursionError) as error:
        raise ReleaseError(f"{path}: {first_line(error)}") from None
    if not trust.knows(HEAD_OFFICE, signer):
        raise ReleaseError(
            f"{path} is signed by {signer.fingerprint}, which is not a key that you trust as {HEAD_OFFICE}. Compare it "
            "with head office over another channel before you add it to your file of keys."
        )
    if found.signer != signer.fingerprint:
        raise ReleaseError(f"{path}: it names {found.signer} as its signer, and {signer.fingerprint} signed it.")
    return found


def check_files(folder: Path, signed: Mapping[str, str], but: str = MANIFEST, what: str = "release") -> None:
    """Raise ReleaseError that names the first file of a folder, all `but` one, that is not as it was signed."""
    again = f"Copy the {what} again."
    found = _files(folder, but)
    for name in sorted(signed.keys() | found.keys()):  # before any is read: one that was added may be endless
        if name not in found:
            raise ReleaseError(f"{folder}: {escaped(name)} is missing. {again}")
        if name not in signed:
            raise ReleaseError(f"{folder}: {escaped(name)} was added: nobody has signed for it. {again}")
    for name, digest in digests(folder, but).items():
        if digest != signed[name]:
            raise ReleaseError(f"{folder}: {escaped(name)} was changed since it was signed. {again}")


def digests(folder: Path, but: str = MANIFEST) -> dict[str, str]:
    """Return the SHA-256, in hex, of every file in a folder but its manifest, by its path with /.

    Raises ReleaseError for what is no plain file: what a link points to is not what was signed.
    """
    found: dict[str, str] = {}
    try:
        for name, path in _files(folder, but).items():
            with path.open("rb") as file:
                found[name] = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise cannot_read(folder, error) from None
    return found


def _files(folder: Path, but: str) -> dict[str, Path]:
    """Return every file in a folder but its manifest, by its path with /. Raises ReleaseError as `digests` does."""
    found: dict[str, Path] = {}
    try:
        for root, folders, names in os.walk(folder, onerror=_raise):
            if not folders and not names:  # even so a library may take it for what it is named like
                raise ReleaseError(
                    f"{escaped(root)}: nothing is in this folder, and nobody has signed for it. Remove it."
                )
            for name in sorted((*folders, *names)):
                path = Path(root) / name
                mode = path.lstat().st_mode
                inside = path.relative_to(folder).as_posix()
                if stat.S_ISREG(mode):
                    if inside != but:
                        found[inside] = path
                elif not stat.S_ISDIR(mode):
                    raise ReleaseError(
                        f"{folder}: {escaped(inside)}: neither a file nor a folder, but a link or the like. Remove it."
                    )
    except OSError as error:
        raise cannot_read(folder, error) from None
    return found


def check_place(folder: Path, releases: Sequence[Path]) -> None:
    """Raise ReleaseError where `folder` lies in a release, which another file would break."""
    for release in releases:
        if folder.resolve().is_relative_to(release.resolve()):
            raise ReleaseError(
                f"--out {folder} lies in the release {release}, where nobody signed for it. Choose another."
            )


def check_public(model: str | Path) -> None:
    """Raise ReleaseError where a model that is begun with, a hub's name or a folder, is a release itself.

    What it tells of records adds to what comes of it, and no claim here counts both.
    """
    if isinstance(model, Path) and (model / MANIFEST).exists():
        raise ReleaseError(
            f"{model} is a release itself: it reveals something of its own records, and no claim would cover both. "
            "Name a public model."
        )


def manifest_digest(folder: Path) -> str:
    """Return the SHA-256, in hex, of a release's manifest: by it others name the release. Raises FolderError."""
    try:
        return hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()
    except OSError as error:
        raise cannot_read(folder / MANIFEST, error) from None


def _raise(error: OSError) -> None:
    raise error
