"""`make check` finds the tests of what has changed."""

import sys
from pathlib import Path

import pytest

from tests import quick


def test_a_changed_file_is_tested_by_its_mirror(tmp_path: Path) -> None:
    tests = tmp_path / "tests" / "fedllm" / "crypto"
    tests.mkdir(parents=True)
    for name in (
        "test_hash_chain.py",
        "test_hash_chain_proof.py",
        "test_hash_chained.py",
        "test_shamir.py",
        "conftest.py",
    ):
        (tests / name).touch()

    def found(*changed: str) -> list[str]:
        return [path.name for path in quick.mirror(changed, tmp_path)]

    assert found("fedllm/crypto/hash_chain.py", "fedllm/no_tests.py", "docs/audit.md") == [
        "test_hash_chain.py",
        "test_hash_chain_proof.py",
    ]
    assert found("tests/fedllm/crypto/test_shamir.py", "tests/fedllm/crypto/test_removed.py") == ["test_shamir.py"]
    assert len(found("tests/fedllm/crypto/conftest.py")) == 4
    assert found("tests/conftest.py", "tests/deployment/test_docs.py") == []


def test_what_would_start_a_process_is_skipped() -> None:
    with pytest.raises(pytest.skip.Exception, match="starts a process"):
        quick._no_process("subprocess.Popen", ([sys.executable],))
    quick._no_process("open", ())
