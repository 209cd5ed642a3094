"""A federation that ran twice on the same records, and its audit."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import pytest

from fedllm.audit.bundle import Written, write_audit
from tests.fedllm.audit.evidence import Federation, make_plan


@dataclass
class Audited:
    """A run, its federation and its audit."""

    federation: Federation
    run: Path
    written: Written


@contextmanager
def any_pdf() -> Iterator[None]:
    """Another file in the place of every PDF, whose making takes seconds: no test but one reads any."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedllm.audit.bundle.renderer", nullcontext)
        patch.setattr("fedllm.audit.bundle.rendered", lambda page: b"%PDF-" + page.read_bytes()[:500])
        yield


@pytest.fixture(scope="session")
def audited(tmp_path_factory: pytest.TempPathFactory) -> Audited:
    """The second of two runs, its report in both languages, signed by the server."""
    federation = Federation(tmp_path_factory.mktemp("federation"))
    federation.run("first", make_plan("e" * 32, rounds=2))
    run = federation.run("second", make_plan(rounds=3), declines=["incheon"])
    pages = [("audit", "en"), ("audit.ko", "ko")]
    with any_pdf():
        return Audited(federation, run, write_audit(run, run / "audit", pages, signer=federation.head_office))
