"""Attack: a site that is called head-office, so that its trusted key passes for the key that signed the run's log.

Stopped by names that no site may have, and by an audit that checks the log's signer apart from all sites.
"""

from pathlib import Path

import pytest

from client.office import init_office
from fedllm.audit.bundle import verify
from fedllm.audit.evidence import assess
from fedllm.audit.trust import Trust
from fedllm.errors import ChainError, ConfigError
from fedllm.values import HEAD_OFFICE, check_name, check_site_name
from tests.attacks.audits import hand_in
from tests.fedllm.audit.evidence import Federation, make_plan

LIKE_IT = [
    HEAD_OFFICE,
    "Head-Office",
    "\uff48ead-office",
    "head\uff0doffice",
    "head_office",
    "head.office",
]


@pytest.mark.parametrize("name", LIKE_IT, ids=ascii)
@pytest.mark.parametrize("listed", [True, False])
def test_the_key_of_a_site_does_not_stand_for_the_server_s(tmp_path: Path, name: str, listed: bool) -> None:
    federation = Federation(tmp_path, sites=("branch-1", "branch-2", name))
    run = federation.run("run", make_plan(rounds=1))
    keys = {site: [identity.public.fingerprint] for site, identity in federation.identities.items()}
    if listed:
        keys[HEAD_OFFICE] = keys[name]  # nobody trusts who signed the log
    else:
        keys.pop(HEAD_OFFICE, None)
    finding = assess(run, Trust(keys)).finding("keys")
    assert finding.status == "fails"
    assert f"{HEAD_OFFICE}: {federation.head_office.public.fingerprint}" in finding.evidence
    folder = hand_in(run, federation.identities["branch-1"])
    with pytest.raises(ChainError, match=r"^keys: "):
        verify(folder, Trust(keys))


def test_such_a_site_fails_an_audit_even_where_everybody_is_trusted(tmp_path: Path) -> None:
    federation = Federation(tmp_path, sites=("branch-1", "branch-2", "Head-Office"))
    run = federation.run("run", make_plan(rounds=1))
    assert assess(run).finding("keys").status == "fails"
    with pytest.raises(ChainError, match=r"^keys: Head-Office: the server's name, and a site's"):
        verify(hand_in(run, federation.head_office), federation.trust)


@pytest.mark.parametrize("name", LIKE_IT, ids=ascii)
def test_no_site_gets_such_a_name(tmp_path: Path, name: str) -> None:
    for check in (check_name, check_site_name):
        with pytest.raises(ConfigError, match=r"site name .*Give the site another name"):
            check(name)
    with pytest.raises(ConfigError, match="another name"):
        init_office(tmp_path / "site", name)
    assert not (tmp_path / "site").exists()


@pytest.mark.parametrize("name", ["head-office-2", "seoul-head-office", "headoffice", "본점"])
def test_names_that_only_speak_of_one_are_names(name: str) -> None:
    check_name(name)
    assert check_site_name(name) == name
