"""A site's folder: its keys, its settings, and what it knows of the server.

    site.yaml          records, policy, models, resources: yours to edit, and never changed by the server
    NAME.join          the join request; holds no secret
    grant.json         the server's answer, as installed: its address and the keys that are believed
    keys/1/            `identity`, `link` and `serving`, and the certificates of the last two, link.pem and serving.pem;
                       after a rotation keys/2/, and so on, until the old are retired
    keys/ca.pem        the certificate authorities that are believed
    keys/ledger.anchor which entry of the ledger is the newest
    declaration.json   what the owner has declared of the records, signed when `fedllm site check` found it to hold
    data/ledger.db     the privacy that was spent
    run/link.json      whether the site is connected
    data/unfinished.json  records are being used; left behind by a failure, it stops the site
    data/models.json   the digests of the models' files, so that each is read once

The grant names the keys that it was made for: they are the ones in use. New keys wait beside them for a grant of their
own, and old ones go on opening messages until they are retired. So each step is one write that counts.
"""

import contextlib
import json
import re
import shutil
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import AwareDatetime, Field

from client.policy import SitePolicy
from client.site_file import HUB_NAME, TEMPLATE, SiteData, SiteFile
from fedllm.canonical import canonical
from fedllm.config import ModelConfig
from fedllm.crypto.certificates import certified_key, key_line, make_key
from fedllm.crypto.identity import Identity, PublicIdentity
from fedllm.crypto.signed_documents import open_document, sign_document
from fedllm.errors import ConfigError, CryptoError, DataError, FederationError, FolderError, ModelError
from fedllm.files import check_private, check_socket, locked, new_folder, read, read_secret, write_secret
from fedllm.privacy.ledger_place import SITE, LedgerPlace
from fedllm.protocol.enrolment import MAX_DOCUMENT, Grant, JoinRequest, check_host, now, read_config, same_fingerprint
from fedllm.values import Frozen, SiteName, address, check_site_name, parse

if TYPE_CHECKING:
    from client.records import Declared


CHECK = "Run: fedllm site check"


class Declaration(Frozen):
    """What the owner has declared of the records, as `fedllm site check` found it to hold: the site starts with it."""

    kind: Literal["fedllm declaration v1"] = "fedllm declaration v1"
    site: SiteName
    data: SiteData
    unit: Literal["record", "person"]
    models: dict[str, str]  # as in site.yaml
    tokenizers: dict[str, str]  # digest of every model's tokenizer, special tokens and chat template
    files: dict[str, str] = Field(default_factory=dict)  # digest of the files of every model: its settings and weights
    made_at: AwareDatetime

    @property
    def declared(self) -> "Declared":
        """What plans are compared with."""
        from client.records import Declared

        return Declared(self.data.size or 0, self.unit, self.data.labels)


# ---- the folder ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class KeySet:
    """The keys of one generation."""

    number: int
    identity: Identity
    folder: Path

    @property
    def link_file(self) -> Path:
        """PEM, the private key with which the site connects; its certificate is beside it."""
        return self.folder / "link"

    @property
    def serving_file(self) -> Path:
        """PEM, the private key with which the site serves in its own network; its certificate is beside it."""
        return self.folder / "serving"


@dataclass(frozen=True)
class Office:
    """A site's folder, read and checked."""

    folder: Path
    config: SiteFile
    keys: tuple[KeySet, ...]  # oldest first
    grant: Grant | None

    @classmethod
    def open(cls, folder: Path) -> "Office":
        """Read the folder; raises FolderError, ConfigError or CryptoError with the remedy."""
        if not folder.is_dir():
            raise FolderError(f"{folder}: no such folder. Make it: fedllm site init --name NAME")
        for place in (folder, folder / "keys"):
            check_private(place)
        config = read_config(SiteFile, folder / "site.yaml")
        keys = _read_keys(folder / "keys")  # before the grant: of a folder of before they say more
        grant_file = folder / "grant.json"
        grant = Grant.open(read_secret(grant_file))[0] if grant_file.exists() else None
        if grant is not None and grant.site != config.name:
            raise ConfigError(f"name={config.name}: the server admitted this site as {grant.site}. Restore the name.")
        office = cls(folder, config, keys, grant)
        check_private(office.in_use.link_file)
        if grant is not None:
            check_private(office.ca_file)
        return office

    @property
    def name(self) -> str:
        """The site's name."""
        return self.config.name

    @cached_property
    def in_use(self) -> KeySet:
        """The keys that the grant was made for, or the newest ones before there is a grant."""
        if self.grant is None:
            return self.keys[-1]
        for keys in self.keys:
            if keys.identity.public.fingerprint == self.grant.site_fingerprint:
                return keys
        raise FolderError(
            f"{self.folder / 'keys'} lacks the keys that the grant was made for. Restore them from a backup. If they "
            "are lost: fedllm site init in a new folder, keeping site.yaml and data/, and be admitted anew."
        )

    @property
    def identity(self) -> Identity:
        """The identity that signs."""
        return self.in_use.identity

    def peers(self, named: Mapping[str, str]) -> dict[str, PublicIdentity]:
        """Return those of the sites that the server names whose fingerprints this site has pinned, and itself."""
        known = {self.name: self.identity.public}
        for name, fingerprint in self.config.policy.peers.items():
            with contextlib.suppress(CryptoError):  # the server may send anything
                identity = PublicIdentity.from_text(named.get(name, ""))
                if name != self.name and same_fingerprint(fingerprint, identity.fingerprint):
                    known[name] = identity
        return known

    @property
    def identities(self) -> tuple[Identity, ...]:
        """Every identity that may open a message, the one in use first."""
        return tuple(keys.identity for keys in sorted(self.keys, key=lambda keys: keys is not self.in_use))

    @property
    def coordinators(self) -> tuple[PublicIdentity, ...]:
        """Every identity by which the server is known; raises FederationError before a grant is installed."""
        return self._granted.identities

    @property
    def address(self) -> str:
        """HOST:PORT of the server; raises FederationError before a grant is installed."""
        return address(self._granted.host, self._granted.port)

    @property
    def _granted(self) -> Grant:
        if self.grant is None:
            raise FederationError(
                f"{self.name} has no grant yet. Send {self.join_file} to the server, read the fingerprint "
                f"{self.identity.public.fingerprint} to them on the telephone, and: fedllm site install FILE.grant"
            )
        return self.grant

    @property
    def ca_file(self) -> Path:
        """PEM, the authorities by which the server is believed."""
        return self.folder / "keys" / "ca.pem"

    @property
    def link_state_file(self) -> Path:
        """What the link last knew."""
        return self.folder / "run" / "link.json"

    @property
    def join_file(self) -> Path:
        """The join request that was made last."""
        return self.folder / f"{self.name}.join"

    @property
    def declaration(self) -> Declaration:
        """What the owner has declared; raises ConfigError if that is not what site.yaml says."""
        path = self.folder / "declaration.json"
        if not path.exists():
            raise ConfigError(f"site.yaml was not checked yet. {CHECK}")
        content, signers = open_document(read_secret(path))
        found = parse(Declaration, content)
        if not set(signers) & {keys.identity.public for keys in self.keys}:
            raise ConfigError(f"{path} is not signed by this site. {CHECK}")
        own = self.config
        if (found.site, found.data, found.unit, found.models) != (own.name, own.data, own.policy.unit, own.models):
            raise ConfigError(f"site.yaml says something else of records or models than when it was checked. {CHECK}")
        return found

    def declare(self, tokenizers: dict[str, str], files: dict[str, str]) -> Declaration:
        """Sign what site.yaml says of the records, by which tokenizers they are read, and what the models are."""
        own = self.config
        made = Declaration(
            site=own.name, data=own.data, unit=own.policy.unit, models=own.models, tokenizers=tokenizers, files=files,
            made_at=now(),
        )  # fmt: skip
        write_secret(self.folder / "declaration.json", sign_document(made.model_dump(mode="json"), self.identity))
        return made

    @property
    def ledger_file(self) -> Path:
        """The privacy ledger."""
        return self.folder / "data" / "ledger.db"

    @property
    def ledger(self) -> LedgerPlace:
        """The privacy ledger, its anchor beside the keys, and which data set the records are."""
        name = canonical(self.config.data.name or SITE)
        return LedgerPlace(self.ledger_file, self.folder / "keys" / "ledger.anchor", name)

    @property
    def socket(self) -> Path | None:
        """Where a relay listens, None if the site makes its own connection; raises ConfigError."""
        return None if self.config.socket is None else check_socket(self._place(self.config.socket), "site.yaml")

    @property
    def policy(self) -> SitePolicy:
        """What the site permits."""
        return self.config.policy

    @property
    def data(self) -> SiteData:
        """The records, with paths that hold from everywhere; raises DataError if there is nothing."""
        own = self.config.data
        train = own.train if own.train.startswith("pkg://") else str(self._place(own.train))
        if train is not own.train and not Path(train).exists():
            raise DataError(f"data.train={own.train}: no such file or folder ({train})")
        return own.model_copy(update={"train": train})

    def model(self, planned: ModelConfig) -> ModelConfig:
        """Return where this site has the model of a plan; raises ModelError if the owner put none there."""
        source = self.config.models.get(planned.source)
        if source is None:
            known = ", ".join(sorted(self.config.models)) or "none"
            raise ModelError(f"model.source={planned.source}: site.yaml permits only these models: {known}")
        place = self._place(source)
        if source.startswith("pkg://"):
            where = source
        elif place.exists():
            where = str(place)
        elif self.config.model_cache is not None and re.fullmatch(HUB_NAME, source):
            where = source
        else:
            raise ModelError(
                f"models: {planned.source}: {source} is no folder here. Put the model there; a hub name needs "
                "model_cache, too."
            )
        return planned.model_copy(update={"source": where})

    def files_digest(self, planned: ModelConfig) -> str:
        """Return the digest of the files of a plan's model, as this site has it; raises ModelError."""
        from fedllm.training.model import files_digest

        path, known = self.folder / "data" / "models.json", dict[str, Any]()
        with contextlib.suppress(OSError, ValueError, TypeError):
            known = dict(json.loads(path.read_bytes()))
        before = dict(known)
        found = files_digest(self.model(planned), known)
        if known != before:
            write_secret(path, json.dumps(known).encode())
        return found

    @property
    def reads(self) -> tuple[Path, ...]:
        """The files and folders that site.yaml names: records and models."""
        cache = [] if self.config.model_cache is None else [self.config.model_cache]
        named = [self.config.data.train, *self.config.models.values(), *cache]
        return tuple(dict.fromkeys(self._place(path) for path in named if not path.startswith("pkg://")))

    @property
    def environment(self) -> dict[str, str]:
        """Variables without which libraries would use the network; set them before anything heavy is imported."""
        quiet = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TQDM_DISABLE": "1"}
        cache = self.config.model_cache
        return quiet if cache is None else {**quiet, "HF_HUB_CACHE": str(self._place(cache))}

    def stamp(self) -> tuple[object, ...]:
        """Return what changes with settings, declaration, grant or keys: all of them are replaced as whole files."""
        files = (self.folder / name for name in ("site.yaml", "declaration.json", "grant.json"))
        keys = sorted(place.name for place in (self.folder / "keys").iterdir() if place.is_dir())
        return (*(file.stat().st_mtime_ns if file.exists() else 0 for file in files), *keys)

    def _place(self, path: str) -> Path:
        return self.folder.absolute() / Path(path).expanduser()


def init_office(folder: Path, name: str) -> Office:
    """Make a site's folder with its first keys and join request. Raises ConfigError, FolderError if it exists."""
    name = check_site_name(name)
    with new_folder(folder) as place:
        keys = _write_keys(place / "keys" / "1")
        write_secret(place / f"{name}.join", _join_request(name, keys, keys))
        write_secret(place / "site.yaml", TEMPLATE.format(name=json.dumps(name, ensure_ascii=False)).encode())
        (place / "data").mkdir(mode=0o700)
    return Office.open(folder)


def read_grant(path: Path) -> bytes:
    """Return the bytes of a grant; raises FolderError if the file cannot be read."""
    return read(path, MAX_DOCUMENT)


def needs_fingerprint(folder: Path, data: bytes) -> bool:
    """Whether a grant can be believed only on the telephone: nobody that this site knows has signed it."""
    office, (_, signers) = Office.open(folder), Grant.open(data)
    return office.grant is None or not set(office.grant.identities) & set(signers)


def install(folder: Path, data: bytes, heard: str | None = None) -> Office:
    """Install a grant: from now on this server, and no other, is believed.

    `heard` is the fingerprint that was told on the telephone; a later grant needs none if it is signed by an
    identity of the server that is known. Raises CryptoError if the grant is not to be believed, or for others.
    """
    grant, _ = Grant.open(data)
    with _changing(folder) as office:
        if grant.site != office.name:
            raise CryptoError(f"this grant is for {grant.site}, and this site is {office.name}.")
        if all(keys.identity.public.fingerprint != grant.site_fingerprint for keys in office.keys):
            raise CryptoError(
                f"this grant was made for other keys of {grant.site} ({grant.site_fingerprint}). Send the server "
                f"{office.join_file}, and install the grant that they make of it."
            )
        if heard is not None:
            if not any(same_fingerprint(heard, identity.fingerprint) for identity in grant.identities):
                raise CryptoError(
                    "the fingerprint does not fit this grant. Hear it once more, on a number that you know; if it "
                    "still differs, somebody replaced the file on its way: ask for it again over another channel."
                )
        elif needs_fingerprint(folder, data):
            raise CryptoError(
                "nobody that this site knows has signed this grant. Hear the server's fingerprint on the telephone "
                "and give it as --fingerprint."
            )
        if grant.made_at > now() + timedelta(days=1):  # it would make every later one look old
            raise CryptoError(
                f"this grant was made on {grant.made_at:%Y-%m-%d}, which is not yet. Set both ends' clocks."
            )
        if office.grant is not None and grant.made_at < office.grant.made_at:
            raise CryptoError(
                f"this grant is of {grant.made_at:%Y-%m-%d %H:%M:%S}, older than the one installed "
                f"({office.grant.made_at:%Y-%m-%d %H:%M:%S}). Ask for a new one: fedllm server grant {office.name}"
            )
        keys = next(each for each in office.keys if each.identity.public.fingerprint == grant.site_fingerprint)
        certificates = ((office.ca_file, grant.ca), *_certificates(keys, grant))
        _hand_over(office, keys)
        for file, certificate in certificates:
            write_secret(file, certificate.encode())  # before the grant, which says that it is there
        write_secret(folder / "grant.json", data)
    return Office.open(folder)


def _certificates(keys: KeySet, grant: Grant) -> list[tuple[Path, str]]:
    """Return where the certificates in a grant belong; raises CryptoError if they are for other keys."""
    placed = []
    for file, certificate in ((keys.link_file, grant.link), (keys.serving_file, grant.serving)):
        if certified_key(certificate.encode()) != key_line(read_secret(file)):
            raise CryptoError(f"this grant has a certificate for another key than {file}. Ask for a new grant.")
        placed.append((file.with_suffix(".pem"), certificate))
    return placed


def _hand_over(office: Office, new: KeySet) -> None:
    """Let the ledger say, signed by the keys in use, that `new` ones sign from now on."""
    if office.grant is not None and new.number != office.in_use.number and office.ledger_file.exists():
        from fedllm.privacy.ledger import LedgerFile

        LedgerFile(office.ledger.file, office.ledger.anchor).hand_over(office.in_use.identity, new.identity)


def rotate(folder: Path) -> Office:
    """Make new keys beside those in use and a join request for them, signed by both.

    They are used when the grant for them is installed. Where new keys are waiting already, their join request is
    made again. Raises FederationError if the site was not admitted yet.
    """
    with _changing(folder) as office:
        if office.grant is None:
            raise FederationError(f"{office.name} was not admitted yet. Send {office.join_file} to the server first.")
        newest = office.keys[-1]
        if newest is office.in_use:
            newest = _write_keys(folder / "keys" / str(newest.number + 1))
        write_secret(office.join_file, _join_request(office.name, newest, office.in_use))
    return Office.open(folder)


def retire(folder: Path) -> Office:
    """Forget keys that are older than those in use: messages sealed to them cannot be opened any more."""
    with _changing(folder) as office:
        with contextlib.suppress(ConfigError):  # a declaration that does not hold is for `site check`
            made = office.declaration
            office.declare(made.tokenizers, made.files)  # by the keys that stay
        for keys in office.keys:
            if keys.number < office.in_use.number:
                place = keys.folder
                leaving = place.with_name(f"{place.name}.leaving")
                try:
                    place.rename(leaving)  # in one step; what is left after a crash goes with the next retirement
                except OSError as error:
                    raise FolderError(f"cannot remove {place}: {error.strerror}. Check its permissions.") from error
        for leaving in (folder / "keys").glob("*.leaving"):
            shutil.rmtree(leaving, ignore_errors=True)
    return Office.open(folder)


@contextlib.contextmanager
def _changing(folder: Path) -> Iterator[Office]:
    """Open the folder to change it; one process at a time."""
    Office.open(folder)  # its errors say more than those of the lock
    with locked(folder):
        yield Office.open(folder)


def _read_keys(folder: Path) -> tuple[KeySet, ...]:
    numbers = sorted(int(place.name) for place in folder.iterdir() if re.fullmatch("[1-9][0-9]{0,8}", place.name))
    if not numbers:
        raise FolderError(f"{folder} holds no keys. Restore them from a backup, or make a new folder: fedllm site init")
    found = []
    for number in numbers:
        place = folder / str(number)
        check_private(place)
        if (place / "node").exists() and not (place / "link").exists():
            raise FolderError(
                f"{place} was made by an earlier version of fedllm, and holds no keys for the link of this one. Make a "
                "new folder: fedllm site init. Copy site.yaml and data/ into it, and be admitted anew."
            )
        try:
            identity = Identity.from_bytes(read_secret(place / "identity"))
            for name in ("link", "serving"):
                key_line(read_secret(place / name))
        except CryptoError as error:
            raise CryptoError(f"{place}: {error}") from None
        found.append(KeySet(number, identity, place))
    return tuple(found)


def _write_keys(folder: Path) -> KeySet:
    identity = Identity.generate()
    with new_folder(folder) as place:
        write_secret(place / "identity", identity.to_bytes())
        for name in ("link", "serving"):
            write_secret(place / name, make_key())
    return KeySet(int(folder.name), identity, folder)


def _own_names() -> tuple[str, ...]:
    """Return by which names others in the house know this machine, as far as it knows."""
    found = []
    for name in (socket.gethostname(), socket.getfqdn()):
        with contextlib.suppress(ValueError):
            found.append(check_host(name))
    return tuple(dict.fromkeys(found))


def _join_request(name: str, new: KeySet, present: KeySet) -> bytes:
    request = JoinRequest(
        site=name,
        identity=new.identity.public.to_text(),
        link_key=key_line(read_secret(new.link_file)),
        serving_key=key_line(read_secret(new.serving_file)),
        hosts=_own_names(),
        made_at=now(),
    )
    return request.sign(*{keys.number: keys.identity for keys in (new, present)}.values())
