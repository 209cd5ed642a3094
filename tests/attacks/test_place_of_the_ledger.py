"""Attack: the ledger, or its anchor, lies where it can be exchanged or vanishes: links, network, memory, containers.

Stopped by fedllm.privacy.ledger_place: links and network file systems are refused, what a restart empties is told.
"""

from pathlib import Path

import pytest

from client.doctor import check
from fedllm.errors import LedgerError
from fedllm.privacy import ledger_place
from fedllm.privacy.ledger import LedgerFile
from tests.attacks.ledgers import Branch


@pytest.mark.parametrize("which", ["file", "anchor"])
@pytest.mark.parametrize("kind", ["symbolic link", "no plain file"])
def test_a_link_is_refused(branch: Branch, tmp_path: Path, which: str, kind: str) -> None:
    branch.spend(1)
    path: Path = getattr(branch.office.ledger, which)
    elsewhere = tmp_path / "elsewhere"
    path.rename(elsewhere)
    path.symlink_to(elsewhere) if kind == "symbolic link" else path.mkdir()
    with pytest.raises(LedgerError, match=kind):
        branch.open()
    with pytest.raises(LedgerError, match=kind):
        LedgerFile(path)


@pytest.mark.parametrize("gone", ["ledger", "anchor"])
def test_a_network_file_system_is_refused(
    branch: Branch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gone: str
) -> None:
    branch.spend(1)
    place = branch.office.ledger
    mounts = tmp_path / "mounts"
    monkeypatch.setattr(ledger_place, "_MOUNTS", mounts)
    where = (place.file if gone == "ledger" else place.anchor).parent
    mounts.write_text(f"/dev/sda / ext4 rw 0 0\nserver:/x {where} nfs4 rw 0 0\n", "utf-8")
    with pytest.raises(LedgerError, match="network file system"):
        branch.open()


@pytest.mark.parametrize(("kind", "said"), [("tmpfs", "in memory"), ("overlay", "in a container")])
def test_what_a_restart_empties_is_told(
    branch: Branch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, said: str
) -> None:
    mounts = tmp_path / "mounts"
    monkeypatch.setattr(ledger_place, "_MOUNTS", mounts)
    mounts.write_text(f"/dev/sda / ext4 rw 0 0\nx {branch.folder / 'data'} {kind} rw 0 0\n", "utf-8")
    for _ in range(2):
        told = [finding.text for finding in check(branch.folder) if finding.level == "warning"]
        assert len(told) == 1
        assert said in told[0]
        branch.spend(1)
    mounts.write_text("/dev/sda / ext4 rw 0 0\n", "utf-8")
    assert not [finding for finding in check(branch.folder) if finding.level == "warning"]


def test_a_folder_that_is_a_link_is_told(branch: Branch, tmp_path: Path) -> None:
    data = branch.folder / "data"
    data.rename(tmp_path / "volume")
    data.symlink_to(tmp_path / "volume")
    branch.spend(1)
    assert any("data is a symbolic link" in text for text in branch.office.ledger.warnings())
