"""Every key is replaced while offices are connected and a run goes on; no round is lost and nothing is paid twice."""

from pathlib import Path

import pytest
from server.superlink import Control

from client import office as site_folder
from fedllm import crypto
from fedllm.reach import reach
from server import federation as head_folder
from tests.deployment.conftest import Federation
from tests.deployment.harness import Branch, HeadOffice, until
from tests.deployment.test_survival import begun

pytestmark = [pytest.mark.deployment, pytest.mark.soak]


def install(head: HeadOffice, branch: Branch) -> None:
    """Carry a site's grant to it. It is signed by an identity that is known, so nobody has to telephone."""
    grant = head.home / "grants" / f"{branch.name}.grant"
    site_folder.install(branch.home, grant.read_bytes())


def certificate_of(head: HeadOffice, ca: Path) -> str:
    """The fingerprint of the certificate that the SuperLink shows."""
    return crypto.read_certificates(reach("127.0.0.1", head.port, ca))[0].fingerprint


@pytest.mark.timeout(1800)
def test_every_key_is_replaced_while_a_run_goes_on(federation: Federation) -> None:
    federation.ready()
    head, branches = federation.head, federation.branches
    mapo, everyone = branches["서울-마포"], sorted(branches)
    before = head_folder.HeadOffice.open(head.home)
    old_site, old_node = mapo.office.identity.public, before.roster.find(mapo.name)
    assert old_node is not None
    links = head.program.text().count("SuperLink started")

    head.begin("rotation", 3, **{"federation.round_timeout": 120})
    run = head.plan("rotation").run
    begun(head, "rotation", 1)
    # both ends announce what is to come, and every office installs its new grant
    head_folder.rotate_ca(head.home, "start")
    head_folder.rotate_identity(head.home, "start")
    new = site_folder.rotate(mapo.home)
    head_folder.admit(head.home, new.join_file.read_bytes(), new.keys[-1].identity.public.fingerprint)
    for branch in branches.values():
        install(head, branch)
    # and head office begins to use it: the SuperLink when the run is over, the identity with the next run
    head_folder.rotate_ca(head.home, "finish")
    head_folder.rotate_identity(head.home, "finish")
    assert head.ended("rotation", 600).state == "completed"
    rounds = head.rounds("rotation")
    assert [record.round for record in rounds] == [0, 1, 2, 3]
    for name, branch in branches.items():
        used = {record.round for record in rounds if name in record.answered}
        assert used <= set(branch.ledger(run)) <= {1, 2, 3}

    # the SuperLink shows a certificate of the new authority, and the offices are back by themselves
    after = head_folder.HeadOffice.open(head.home)
    shown = crypto.read_certificates(after.server.certificate)[0].fingerprint
    until(lambda: head.program.text().count("SuperLink started") > links, what="a new SuperLink")
    until(lambda: _shows(head, after.ca_file, shown), what="the new certificate")
    until(Control(after).reachable, what="the new SuperLink's answer")
    assert after.identity.public != before.identity.public

    # the next run is asked for by the new identity and answered with the office's new keys
    head_folder.retire(head.home, mapo.name)
    head_folder.rotate_ca(head.home, "retire")
    head_folder.rotate_identity(head.home, "retire")
    site_folder.retire(mapo.home)
    head.begin("rotated", 1, **{"federation.quorum": 3, "federation.round_timeout": 180})
    assert head.ended("rotated").state == "completed"
    assert head.rounds("rotated")[1].answered == everyone
    office = site_folder.Office.open(mapo.home)
    assert len(office.keys) == 1
    assert office.identity.public != old_site
    now = head_folder.HeadOffice.open(head.home)
    member = now.roster.find(mapo.name)
    assert member is not None
    assert member.identities == (office.identity.public,)
    assert len(now.authorities) == len(now.identities) == 1
    assert "node that is no longer in the roster was unregistered" in head.program.text()


def _shows(head: HeadOffice, ca: Path, fingerprint: str) -> bool:
    try:
        return certificate_of(head, ca) == fingerprint
    except OSError:
        return False
