"""The server's folder: its keys and certificates, and the roster of the sites that it has admitted.

    federation.yaml            name, addresses, ports, lifetimes; yours to edit
    roster.json                who may take part, with public keys, and who no longer may
    grants/SITE.grant          what each site installs; holds no secret
    keys/identity              the keys that sign and open messages; two sets while one replaces the other
    keys/ca.pem  keys/ca.key   the certificate authorities and their keys; two while one replaces the other
    keys/server.pem            the daemon's certificate and its key, in one file so that they cannot disagree
    run/daemon.sock            where the server's own commands and runs reach the daemon

Every step is one atomic write, or a few in an order in which the folder can be opened, and the step repeated, after a
crash between any two. Functions take the folder and not an opened HeadOffice: they must see its present state.
"""

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

from pydantic import Field

from fedllm.crypto.certificates import (
    Certificate,
    certify,
    issued_by,
    make_ca,
    make_server_certificate,
    read_certificates,
    read_pairs,
)
from fedllm.crypto.identity import Identity, PublicIdentity
from fedllm.errors import CryptoError, FederationError, FolderError
from fedllm.files import check_private, check_socket, locked, new_folder, read, read_secret, write_secret
from fedllm.protocol.enrolment import MAX_DOCUMENT, Grant, Host, JoinRequest, Port, now, read_config, same_fingerprint
from fedllm.values import Frozen, address, check_site_name
from server.roster import Roster, RosterEntry

Step = Literal["start", "finish", "retire"]
_WARN = timedelta(days=14)


class FederationFile(Frozen):
    """federation.yaml."""

    name: str = Field(min_length=1, max_length=64)
    """Name of the federation."""
    host: Host
    """Host name or address that sites connect to."""
    names: tuple[Host, ...] = ()
    """Further names and addresses that the server certificate is valid for."""
    listen: str = "0.0.0.0"  # noqa: S104  # sites come from outside; what else listens, listens on 127.0.0.1
    """Address at which the daemon listens for sites."""
    port: Port = 9092
    """Port at which the daemon listens for sites."""
    socket: str | None = None
    """Unix socket where the server's own commands reach the daemon. Null: `run/daemon.sock` in the folder."""
    server_days: int = Field(90, ge=1, le=825)
    """Days for which the server certificate is valid."""
    site_days: int = Field(365, ge=1, le=825)
    """Days for which the certificates of a site are valid."""
    ca_days: int = Field(3650, ge=1, le=10_000)
    """Days for which the certificate authority is valid."""

    @property
    def hosts(self) -> tuple[str, ...]:
        """Every name and address in the server certificate."""
        return tuple(dict.fromkeys((self.host, *self.names, "127.0.0.1", "localhost")))


@dataclass(frozen=True)
class HeadOffice:
    """The server's folder, read and checked."""

    folder: Path
    config: FederationFile
    identities: tuple[Identity, ...]  # the first signs; every one of them opens
    switched: bool  # of two identities: whether the new one signs already
    authorities: tuple[Certificate, ...]  # oldest first
    server: Certificate
    issuer: int  # which authority issued the server's certificate
    roster: Roster

    @classmethod
    def open(cls, folder: Path) -> "HeadOffice":
        """Read the folder; raises FolderError, ConfigError or CryptoError with the remedy."""
        if not folder.is_dir():
            raise FolderError(f"{folder}: no such folder. Make it: fedllm init-federation federation.yaml")
        keys = folder / "keys"
        for place in (folder, keys):
            check_private(place)
        server = _read_pairs(keys / "server.pem", keys / "server.pem")[0]
        authorities = _read_pairs(keys / "ca.pem", keys / "ca.key")
        identities, switched = _read_identities(keys / "identity")
        roster = Roster.load(folder / "roster.json")  # before the settings: of a folder of before it says more
        return cls(
            folder=folder,
            config=read_config(FederationFile, folder / "federation.yaml"),
            identities=identities,
            switched=switched,
            authorities=tuple(authorities),
            server=server,
            issuer=issued_by(server.certificate, [pair.certificate for pair in authorities]),
            roster=roster,
        )

    @property
    def identity(self) -> Identity:
        """The identity that signs and seals."""
        return self.identities[0]

    @property
    def ca_file(self) -> Path:
        """PEM, every authority that is in force."""
        return self.folder / "keys" / "ca.pem"

    @property
    def server_certificate_file(self) -> Path:
        """PEM; the key is in the same file."""
        return self.folder / "keys" / "server.pem"

    @property
    def socket(self) -> Path:
        """Where the daemon listens for the server's own; raises ConfigError if the path is too long."""
        own = self.config.socket
        return check_socket(Path(own) if own else self.folder / "run" / "daemon.sock", "federation.yaml")

    @property
    def roster_file(self) -> Path:
        """Read it again to learn of admissions and revocations."""
        return self.folder / "roster.json"

    def readiness(self) -> str:
        """Return whether sites can connect to the server's port, once it is open, and where."""
        ends = read_certificates(self.server.certificate)[0].ends
        if ends <= datetime.now(UTC):
            return (
                f"no site can connect: the server certificate ended on {ends:%Y-%m-%d}. "
                "Make a new one: fedllm server rotate certificate"
            )
        return f"ready: sites connect to {address(self.config.host, self.config.port)}"

    def warnings(self) -> list[str]:
        """Return what the operator must see to before long, each with its remedy."""
        found, soon = [], datetime.now(UTC) + _WARN
        facts = read_certificates(self.server.certificate)[0]
        missing = sorted(set(self.config.hosts) - set(facts.hosts))
        if facts.ends <= soon:
            found.append(f"the server certificate ends on {facts.ends:%Y-%m-%d}: fedllm server rotate certificate")
        if missing:
            found.append(f"the server certificate is not good for {missing[0]}: fedllm server rotate certificate")
        for number, pair in enumerate(self.authorities):
            ends = read_certificates(pair.certificate)[0].ends
            newest = number == len(self.authorities) - 1
            # an authority must outlive what it issues, and sites need time to install what names the next one
            if newest and ends <= soon + timedelta(days=self.config.server_days):
                found.append(f"the certificate authority ends on {ends:%Y-%m-%d}: fedllm server rotate ca")
        return found

    def grant(self, member: RosterEntry) -> bytes:
        """Return the document by which a site knows the server, and is known by it."""
        newest, days, site = self.authorities[-1], self.config.site_days, member.site
        # never a name by which sites find the server: with that certificate a site could pass for it
        head = (self.config.host, *self.config.names)
        serves = [host for host in dict.fromkeys((*member.hosts, "localhost", "127.0.0.1")) if host not in head]
        return Grant(
            federation=self.config.name,
            site=member.site,
            site_fingerprint=member.public.fingerprint,
            host=self.config.host,
            port=self.config.port,
            ca=b"".join(pair.certificate for pair in self.authorities).decode(),
            link=certify(newest, member.link_key, site, days).decode(),
            serving=certify(newest, member.serving_key, site, days, serves).decode(),
            coordinators=tuple(identity.public.to_text() for identity in self.identities),
            made_at=now(),
        ).sign(self.identities)


def init_federation(settings: Path, folder: Path) -> HeadOffice:
    """Make the server's folder from a federation.yaml. Raises ConfigError, or FolderError if it exists."""
    config, text = read_config(FederationFile, settings), read(settings)
    with new_folder(folder) as place:
        authority = make_ca(config.name, config.ca_days)
        _write_authorities(place, [authority])
        _write_server(place, make_server_certificate(authority, config.hosts, config.server_days))
        _write_identities(place, [("signs", Identity.generate())])
        _write_roster(place, Roster())
        write_secret(place / "federation.yaml", text)
    return HeadOffice.open(folder)


# ---- sites ---------------------------------------------------------------------------------------------------------


def read_join_request(path: Path) -> bytes:
    """Return the bytes of a join request; raises FolderError if the file cannot be read."""
    return read(path, MAX_DOCUMENT)


def admit(folder: Path, join: bytes, heard: str) -> Path:
    """Admit the site that made a join request, or its new keys, and return the path of its grant.

    `heard` is the fingerprint that the operator was told on the telephone. A name that is in the roster is admitted
    again only if its present keys signed the request; both sets are then accepted until the old is retired.
    Raises CryptoError or FederationError.
    """
    request, signers = JoinRequest.open(join)
    if not same_fingerprint(heard, request.public.fingerprint):
        raise CryptoError(
            f"the fingerprint does not fit this join request of {request.site}. Hear it once more on a number that you "
            "know, from the person at the site; if it still differs, somebody replaced the file on its way: ask "
            "for it again over another channel."
        )
    with _changing(folder) as office:
        member = office.roster.find(request.site)
        if member is None or (member.identity, member.link_key) != (request.identity, request.link_key):
            _write_roster(folder, _admitted(office.roster, member, request, signers))
        return _write_grant(folder, request.site)


def _admitted(
    roster: Roster, member: RosterEntry | None, request: JoinRequest, signers: list[PublicIdentity]
) -> Roster:
    for known in roster.members:
        if request.public in known.identities or {request.link_key, request.serving_key} & {
            *known.link_keys,
            known.serving_key,
        }:
            state = "were revoked" if known.revoked_at else "are in the roster"
            raise FederationError(
                f"these keys {state}, as those of {known.site}. The site makes new ones: fedllm site rotate, or "
                "fedllm site init in a new folder."
            )
    fresh = RosterEntry(**request.model_dump(exclude={"kind", "made_at"}), admitted_at=now())
    if member is None:
        return Roster(members=(*roster.members, fresh))
    if member.public not in signers:
        raise FederationError(
            f"site {member.site} is in the roster, and its present keys did not sign this request. If it is another "
            f"site, it takes another name. If it is the same one and has lost its keys: fedllm revoke {member.site}, "
            "then admit it again."
        )
    overlap = {
        "previous_identities": (member.identity, *member.previous_identities),
        "previous_link_keys": (member.link_key, *member.previous_link_keys),
    }
    return _replaced(roster, member, fresh.model_copy(update=overlap))


def renew_grant(folder: Path, site: str) -> Path:
    """Write a site's grant again and return its path; raises FederationError if the site is not in the roster."""
    with _changing(folder) as office:
        return _write_grant(folder, _member(office, site).site)


def retire(folder: Path, site: str) -> RosterEntry:
    """Accept only the present keys of a site; raises FederationError if the site is not in the roster."""
    with _changing(folder) as office:
        member = _member(office, site)
        only = member.model_copy(update={"previous_identities": (), "previous_link_keys": ()})
        _write_roster(folder, _replaced(office.roster, member, only))
        return only


def revoke(folder: Path, site: str) -> RosterEntry:
    """Accept no key of a site any more; raises FederationError if the site is not in the roster."""
    with _changing(folder) as office:
        member = _member(office, site)
        revoked = member.model_copy(update={"revoked_at": now()})
        _write_roster(folder, _replaced(office.roster, member, revoked))
        with contextlib.suppress(OSError):
            _grant_file(folder, member.site).unlink()  # the keys in it are public; this is tidiness
        return revoked


def _member(office: HeadOffice, site: str) -> RosterEntry:
    member = office.roster.find(check_site_name(site))
    if member is None:
        known = ", ".join(found.site for found in office.roster.active) or "nobody yet"
        raise FederationError(f"site {site} is not in the roster, which holds {known}")
    return member


def _replaced(roster: Roster, old: RosterEntry, new: RosterEntry) -> Roster:
    return Roster(members=tuple(new if member is old else member for member in roster.members))


# ---- the server's own keys ------------------------------------------------------------------------------------------


def rotate_server_certificate(folder: Path) -> HeadOffice:
    """Make a new server certificate, from the authority of the present one; sites need do nothing."""
    with _changing(folder) as office:
        _write_server(folder, _server_certificate(office, office.issuer))
    return HeadOffice.open(folder)


def rotate_ca(folder: Path, step: Step) -> list[Path]:
    """Replace the certificate authority, in three steps, and return the grants that sites must install after it.

    start: a new authority stands beside the old one, and grants carry both. finish, when every site has installed
    its grant: the server's certificate comes from the new one. retire: the old one is forgotten. A step that was taken
    may be repeated; raises FederationError if it is not its turn.
    """
    with _changing(folder) as office:
        old, new = office.authorities[0], office.authorities[-1]
        _check_turn("ca", step, len(office.authorities) == 2, office.issuer > 0)
        if step == "start" and old is new:
            _write_authorities(folder, [old, make_ca(office.config.name, office.config.ca_days)])
        elif step == "finish" and office.issuer == 0:
            _write_server(folder, _server_certificate(office, -1))
        elif step == "retire":
            _write_authorities(folder, [new])
        return [] if step == "finish" else _write_grants(folder)


def rotate_identity(folder: Path, step: Step) -> list[Path]:
    """Replace the server's identity, in three steps, and return the grants that sites must install after it.

    start: grants announce a new identity beside the present one. finish, when every site has installed its grant:
    the new one signs. retire: the old one is forgotten. A step that was taken may be repeated; raises FederationError
    if it is not its turn.
    """
    with _changing(folder) as office:
        signs, other = office.identities[0], office.identities[-1]
        _check_turn("identity", step, len(office.identities) == 2, office.switched)
        if step == "start" and signs is other:
            _write_identities(folder, [("signs", signs), ("announced", Identity.generate())])
        elif step == "finish" and not office.switched:
            _write_identities(folder, [("signs", other), ("leaving", signs)])
        elif step == "retire":
            _write_identities(folder, [("signs", signs)])
        return [] if step == "finish" else _write_grants(folder)


def _check_turn(what: str, step: Step, two: bool, switched: bool) -> None:
    """Raise FederationError unless the step is the next one, or the last that was taken."""
    if step == "start" and two and switched:
        raise FederationError(f"the last rotation is not over yet. First: fedllm server rotate {what} --retire")
    if step == "finish" and not two:
        raise FederationError(f"no rotation has begun. First: fedllm server rotate {what}")
    if step == "retire" and two and not switched:
        raise FederationError(
            f"the new {what} is announced, but not in use. First, when every site has installed its new grant: "
            f"fedllm server rotate {what} --finish"
        )


def _server_certificate(office: HeadOffice, authority: int) -> Certificate:
    return make_server_certificate(office.authorities[authority], office.config.hosts, office.config.server_days)


# ---- reading and writing ---------------------------------------------------------------------------------------------


@contextmanager
def _changing(folder: Path) -> Iterator[HeadOffice]:
    """Open the folder to change it; one process at a time."""
    HeadOffice.open(folder)  # its errors say more than those of the lock
    with locked(folder):
        yield HeadOffice.open(folder)


def _read_pairs(certificates: Path, keys: Path) -> list[Certificate]:
    try:
        return read_pairs(read_secret(certificates), read_secret(keys))
    except CryptoError as error:
        raise CryptoError(f"{certificates}: {error}") from None


def _write_authorities(folder: Path, authorities: list[Certificate]) -> None:
    keys, certificates = folder / "keys" / "ca.key", folder / "keys" / "ca.pem"
    present = [] if not certificates.exists() else _read_pairs(certificates, keys)
    # a key without its certificate does no harm, so keys come first and go last
    write_secret(keys, b"".join(dict.fromkeys(pair.key for pair in (*present, *authorities))))
    write_secret(certificates, b"".join(pair.certificate for pair in authorities))
    write_secret(keys, b"".join(pair.key for pair in authorities))


def _write_server(folder: Path, server: Certificate) -> None:
    write_secret(folder / "keys" / "server.pem", server.certificate + server.key)


_Role = Literal["signs", "announced", "leaving"]


def _read_identities(path: Path) -> tuple[tuple[Identity, ...], bool]:
    """Return the identities, the one that signs first, and whether the second is the one that leaves."""
    lines = [line.partition(b" ") for line in read_secret(path).splitlines()]
    if [role for role, _, _ in lines] not in ([b"signs"], [b"signs", b"announced"], [b"signs", b"leaving"]):
        raise CryptoError(f"{path} is not the server's identity. Restore it from a backup.")
    try:
        return tuple(Identity.from_bytes(key) for _, _, key in lines), lines[-1][0] == b"leaving"
    except CryptoError as error:
        raise CryptoError(f"{path}: {error}") from None


def _write_identities(folder: Path, identities: list[tuple[_Role, Identity]]) -> None:
    lines = [role.encode() + b" " + identity.to_bytes() for role, identity in identities]
    write_secret(folder / "keys" / "identity", b"".join(lines))


def _write_roster(folder: Path, roster: Roster) -> None:
    write_secret(folder / "roster.json", roster.model_dump_json(indent=2).encode() + b"\n")


def _grant_file(folder: Path, site: str) -> Path:
    return folder / "grants" / f"{site}.grant"


def _write_grant(folder: Path, site: str) -> Path:
    """Write a site's grant, from what the folder holds now."""
    office = HeadOffice.open(folder)
    path = _grant_file(folder, site)
    write_secret(path, office.grant(_member(office, site)))
    return path


def _write_grants(folder: Path) -> list[Path]:
    return [_write_grant(folder, member.site) for member in HeadOffice.open(folder).roster.active]
