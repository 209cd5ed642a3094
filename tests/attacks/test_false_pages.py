"""Attack: the server hands in pages that say something else than the evidence, and signs them.

Stopped by `fedllm audit verify`: files that it does not know are refused, pages are rendered again, and what it did not
compare it says, with an error.
"""

import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedllm.audit.bundle import verify
from fedllm.cli.main import app
from fedllm.errors import ChainError
from tests.attacks.audits import federation_of, hand_in, sign
from tests.fedllm.audit.evidence import Federation


@pytest.fixture(scope="module")
def true(tmp_path_factory: pytest.TempPathFactory) -> tuple[Federation, Path]:
    """A federation and an audit of it that is true."""
    federation, run = federation_of(tmp_path_factory.mktemp("true"), ("seoul", "busan"), rounds=1)
    return federation, hand_in(run, federation.head_office, pages=True)


@pytest.fixture
def audit(true: tuple[Federation, Path], tmp_path: Path) -> Path:
    copy = tmp_path / "audit"
    shutil.copytree(true[1], copy)
    return copy


def command(federation: Federation, audit: Path, *more: str) -> tuple[int, str]:
    keys = federation.write_trust(audit.parent / "keys.txt")
    done = CliRunner().invoke(app, ["audit", "verify", str(audit), "--trust", str(keys), *more])
    return done.exit_code, f"{done.output}{done.exception or ''}"


def test_a_true_audit_is_verified(true: tuple[Federation, Path], audit: Path) -> None:
    code, said = command(true[0], audit)
    assert code == 0, said
    assert "verified: within budget; 2 sites, 1 rounds" in said
    assert "not compared" not in said


def test_a_page_that_claims_another_version_and_says_another_epsilon_is_not_verified(
    true: tuple[Federation, Path], audit: Path
) -> None:
    federation, page = true[0], audit / "audit.html"
    text = page.read_text("utf-8")
    stated = f"{verify(audit, federation.trust)[0].accountants.pld:.3g}"
    assert stated in text
    text = text.replace('content="fedllm ', 'content="fedllm 9.').replace(stated, "0.01")
    page.write_text(text.replace("</body>", "<script>document.title = 'ε 0.01'</script></body>"), "utf-8")
    sign(audit, federation.head_office)
    code, said = command(federation, audit)
    assert code == 1
    assert "not compared: audit.html" in said
    assert "verified" not in said
    code, said = command(federation, audit, "--out", str(audit.parent / "mine"), "--allow-uncompared")
    assert code == 0, said
    assert "not compared: audit.html" in said
    mine = (audit.parent / "mine" / "audit.html").read_text("utf-8")
    assert stated in mine
    assert "<script" not in mine
    assert "0.01" not in mine.partition("<body>")[2].partition("<svg")[0]


def test_pages_of_ones_own_go_only_into_an_empty_folder(true: tuple[Federation, Path], audit: Path) -> None:
    code, said = command(true[0], audit, "--out", str(audit))
    assert code == 1
    assert "Nothing was overwritten" in said


@pytest.mark.parametrize("name", ["audit.html", "audit.ko.html"])
def test_a_page_of_this_version_that_says_something_else_is_found(
    true: tuple[Federation, Path], audit: Path, name: str
) -> None:
    page = audit / name
    page.write_bytes(page.read_bytes().replace(b"</body>", b" </body>"))
    sign(audit, true[0].head_office)
    with pytest.raises(ChainError, match=r"it does not say what audit\.json says"):
        verify(audit, true[0].trust)


def test_a_pdf_is_never_taken_for_compared(true: tuple[Federation, Path], audit: Path) -> None:
    (audit / "audit.pdf").write_bytes(b"%PDF-1.7 epsilon 0.01")
    sign(audit, true[0].head_office)
    code, said = command(true[0], audit)
    assert code == 1
    assert "not compared: audit.pdf" in said


NAMES = ["audit.htm", "AUDIT.HTML", "audit.en.html", "index.html", "audit.html.pdf", ".audit.html", "ledgers/x.html",
         "pages/audit.html", "audit.json.md", "audit.svg"]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("pages", [True, False])
def test_a_file_that_is_no_part_of_an_audit_is_refused(
    true: tuple[Federation, Path], audit: Path, name: str, pages: bool
) -> None:
    if not pages:
        for page in audit.glob("*.html"):
            page.unlink()
    file = audit / name
    file.parent.mkdir(exist_ok=True)
    file.write_text("<p>epsilon 0.01", "utf-8")
    sign(audit, true[0].head_office)
    with pytest.raises(ChainError, match=r"no part of an audit|no site of this run"):
        verify(audit, true[0].trust)


@pytest.mark.parametrize("name", ["audit.html", "record.jsonl", "ledgers"])
def test_a_link_is_refused(true: tuple[Federation, Path], audit: Path, name: str) -> None:
    """What it leads to may be something else when it is read."""
    (audit / name).rename(audit.parent / "elsewhere")
    (audit / name).symlink_to(audit.parent / "elsewhere")
    sign(audit, true[0].head_office)
    with pytest.raises(ChainError, match="no part of an audit"):
        verify(audit, true[0].trust)


def test_small_numbers_are_compared_as_exactly_as_large_ones(true: tuple[Federation, Path], audit: Path) -> None:
    """Delta 1e-12 is within 1e-5 of delta 1e-5."""
    file = audit / "audit.json"
    text = file.read_text("utf-8")
    assert '"delta": 0.00001' in text or '"delta": 1e-05' in text or '"delta": 1e-5' in text
    for digits in ("0.00001", "1e-05", "1e-5"):
        text = text.replace(f'"delta": {digits}', '"delta": 1e-12')
    file.write_text(text, "utf-8")
    sign(audit, true[0].head_office)
    with pytest.raises(ChainError, match=r"delta states 1e-12"):
        verify(audit, true[0].trust)
