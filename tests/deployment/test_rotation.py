"""Every key is replaced while sites are connected and a run goes on; no round is lost and nothing is paid twice."""

from pathlib import Path

import pytest

from client import office as site_folder
from fedllm.crypto import certificates
from fedllm.ops.tls_probe import probe_tls
from server import federation as head_folder
from tests.deployment.conftest import Federation
from tests.deployment.harness import Branch, HeadOffice, until
from tests.deployment.test_survival import SLOW_ROUNDS, begun

pytestmark = [pytest.mark.deployment, pytest.mark.soak]


def install(head: HeadOffice, branch: Branch) -> None:
    """Carry a site's grant to it. It is signed by an identity that is known, so nobody has to telephone."""
    branch.install((head.home / "grants" / f"{branch.name}.grant").read_bytes())


def shows(head: HeadOffice, ca: Path, fingerprint: str) -> bool:
    """Whether the daemon shows the certificate of this fingerprint, to who believes the authorities in `ca`."""
    try:
        return certificates.read_certificates(probe_tls("127.0.0.1", head.port, ca))[0].fingerprint == fingerprint
    except OSError:
        return False


@pytest.mark.timeout(1800)
def test_every_key_is_replaced_while_a_run_goes_on(federation: Federation) -> None:
    federation.ready()
    head, branches = federation.head, federation.branches
    mapo, everyone = branches["서울-마포"], sorted(branches)
    before, old_site = head_folder.HeadOffice.open(head.home), mapo.office.identity.public

    head.begin("rotation", 4, **SLOW_ROUNDS, **{"federation.round_timeout": 240, "federation.quorum": 3})
    run = head.plan("rotation").run
    begun(head, "rotation", 1)
    # both ends announce what is to come, and every site installs its new grant
    head_folder.rotate_ca(head.home, "start")
    head_folder.rotate_identity(head.home, "start")
    new = site_folder.rotate(mapo.home)
    head_folder.admit(head.home, new.join_file.read_bytes(), new.keys[-1].identity.public.fingerprint)
    for branch in branches.values():
        install(head, branch)
    # and the server begins to use it: the daemon at once, the identity with the next run
    head_folder.rotate_ca(head.home, "finish")
    head_folder.rotate_identity(head.home, "finish")
    assert head.ended("rotation").state == "completed"
    assert [record.round for record in head.rounds("rotation")] == [0, 1, 2, 3, 4]
    assert all(record.answered == everyone for record in head.rounds("rotation")[1:])
    assert all(sorted(branch.ledger(run)) == [1, 2, 3, 4] for branch in branches.values())

    # the daemon shows a certificate of the new authority, and the sites are back by themselves
    after = head_folder.HeadOffice.open(head.home)
    assert after.issuer > 0
    shown = certificates.read_certificates(after.server.certificate)[0].fingerprint
    until(lambda: shows(head, after.ca_file, shown), what="the new certificate")
    federation.ready()
    assert after.identity.public != before.identity.public

    # the next run is asked for by the new identity and answered with the site's new keys
    head_folder.retire(head.home, mapo.name)
    head_folder.rotate_ca(head.home, "retire")
    head_folder.rotate_identity(head.home, "retire")
    site_folder.retire(mapo.home)
    for branch in branches.values():
        install(head, branch)
    head.begin("rotated", 1, **{"federation.quorum": 3, "federation.round_timeout": 180})
    assert head.ended("rotated").state == "completed"
    assert head.rounds("rotated")[1].answered == everyone
    office = mapo.office
    assert len(office.keys) == 1
    assert office.identity.public != old_site
    now = head_folder.HeadOffice.open(head.home)
    member = now.roster.find(mapo.name)
    assert member is not None
    assert member.identities == (office.identity.public,)
    assert member.link_keys == (member.link_key,)
    assert len(now.authorities) == len(now.identities) == 1
