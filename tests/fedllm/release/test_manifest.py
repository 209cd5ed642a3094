"""A release is what was signed: whatever is changed, added, missing or signed by others is named."""

from fedllm.audit.trust import Trust
from fedllm.release.manifest import verify_release
from tests.fedllm.release.conftest import Released


def test_a_release_of_a_run_verifies(release: Released) -> None:
    assert verify_release(release.folder, Trust.read(release.trust)).name == "run"


def test_a_release_made_by_hand_verifies(tiny_release: Released) -> None:
    assert verify_release(tiny_release.folder, Trust.read(tiny_release.trust)) == tiny_release.manifest
