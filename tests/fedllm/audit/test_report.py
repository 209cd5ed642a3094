"""The report: readable in both languages, self-contained, without a record in it, and nothing in it is cut."""

import base64
import contextlib
import gc
import json
import math
import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fedllm.audit import bundle, report
from fedllm.audit.accountants import CROSS_CHECKS
from fedllm.audit.bundle import Written, write_audit
from fedllm.audit.evidence import assess
from fedllm.audit.model import Attack, Audit, Empirical, Point, SiteScore, Utility
from fedllm.audit.pdf import render_pdf, rendered, renderer
from fedllm.audit.report import LANGUAGES, Language, Section, render_html
from fedllm.audit.trust import Trust
from fedllm.cli.main import app
from fedllm.errors import FolderError
from fedllm.files import write_secret
from fedllm.privacy.canaries import EACH
from fedllm.privacy.one_run import epsilon_lower_bound
from tests.fedllm.audit.conftest import Audited, any_pdf
from tests.fedllm.audit.evidence import SITES, Federation, make_plan
from tests.korean import english_words

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
WORDS: dict[str, list[str]] = json.loads((Path(report.__file__).parent / "templates" / "words.json").read_text("utf-8"))


class Page(HTMLParser):
    """What a browser would load, run or show."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.handlers: list[str] = []
        self.text: list[str] = []
        self._style = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._style = tag == "style"
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "action", "data", "srcset"):
                self.links.append(value or "")
            if name == "id":
                self.ids.append(value or "")
            if name.startswith("on"):
                self.handlers.append(name)

    def handle_data(self, data: str) -> None:
        if not self._style:
            self.text.append(data)


def scored(audit: Audit, rounds: int = 3, mode: str = "local", unit: str = "person", kept: int | None = None) -> Audit:
    """Return an audit of a run whose sites scored the adapter after every round."""
    scores = tuple(
        SiteScore(round=n, metrics={
            "units": (838.2, 834.6, 841.3), "loss": (0.7 / (1 + n), 0.5 / (1 + n), 0.9 / (1 + n)),
            **({"exact_match": (0.25, 0.125, 0.375)} if n else {}),
        })
        for n in range(rounds)
    )  # fmt: skip
    claim = audit.claim.model_copy(
        update={"scores": rounds, "score_epsilon": 1.5, "score_noise": 9.45, "mode": mode, "unit": unit}
    )
    return audit.model_copy(update={"claim": claim, "scores": scores, "kept": kept})


def attacked(
    audit: Audit, lower: float = 0.0, ceiling: float = 3.27, claim: float | None = 8.0, canaries: int = 40
) -> Audit:
    """Return an audit of a run that was attacked; the verdict stays as it is."""
    attack = Empirical(
        sites=2, canaries=80, guesses=14, black=Attack(right=7, lower=0.0), white=Attack(right=11, lower=lower),
        ceiling=ceiling, claim=claim,
    )  # fmt: skip
    contradicted = claim is not None and lower > claim
    status = "fails" if contradicted else "holds" if claim is not None and ceiling > claim else "unverified"
    findings = tuple(
        f.model_copy(update={"status": status, "evidence": ("2 / 3: ε ≥ 0",)}) if f.code == "empirical" else f
        for f in audit.findings
    )
    said = audit.claim.model_copy(update={"canaries": canaries})
    return audit.model_copy(update={"claim": said, "attack": attack, "findings": findings})


def large(audit: Audit, sites: int, rounds: int) -> Audit:
    """Return an audit of many sites and rounds, with long names and all kinds of trouble."""
    base = audit.sites[0]
    many = tuple(
        base.model_copy(update={
            "name": f"지점-{i:03d}-" + "아주긴이름" * (8 if i == 3 else 1), "answered": rounds,
            "charged": 8.0 * (i + 1) / sites,
            "spent": 7.0 * (i + 1) / sites, "run": 5.0, "budget": None if i % 7 == 0 else 8.0,
            "budget_known": i % 7 != 0, "left": 0.0, "ledger": ("verified", "broken", "missing")[i % 3],
            "reasons": ("budget", "internal"), "declined": 12,
        })
        for i in range(sites)
    )  # fmt: skip
    points = tuple(
        Point(site=site.name, at="2026-09-21 14:14", run=audit.run.name, round=n * rounds // 24,
              charge=n * rounds // 24 + 1, epsilon=(site.charged or 0) * (n + 1) / 24)
        for site in many for n in range(24)
    )  # fmt: skip
    steps = tuple(Utility(round=i, loss=2 / (1 + i), perplexity=None, accuracy=None) for i in range(rounds + 1))
    findings = tuple(
        f.model_copy(update={"status": "fails", "evidence": tuple(f"{'x' * 90} #{i}" for i in range(12)), "more": 990})
        if f.code in ("budget", "epsilon") else f for f in audit.findings
    )  # fmt: skip
    many_rounds = scored(attacked(audit, lower=9.0, canaries=1000), rounds + 1, kept=rounds // 2 + 1)
    return many_rounds.model_copy(update={
        "sites": many, "timeline": points, "utility": steps, "findings": findings, "verdict": "unverifiable",
    })  # fmt: skip


@pytest.fixture(scope="module", params=LANGUAGES)
def language(request: pytest.FixtureRequest) -> Language:
    chosen: Language = request.param
    return chosen


@pytest.fixture(scope="module")
def html(audited: Audited, language: Language) -> str:
    return render_html(audited.written.audit, language)


@pytest.fixture(scope="module")
def html_of_many(audited: Audited, language: Language) -> str:
    return render_html(large(audited.written.audit, 100, 1000), language)


def test_the_page_runs_nothing_and_loads_nothing(html: str) -> None:
    page = Page(html)
    assert not {"script", "iframe", "object", "embed", "link", "img", "form"} & set(page.tags)
    assert page.handlers == []
    assert all(link.startswith("#") for link in page.links)
    without_names = re.sub(r'xmlns(:\w+)?="[^"]*"', "", html)
    assert "http" not in without_names
    loaded = [url for url in re.findall(r"url\(([^)]*)\)", html) if not url.startswith("#")]
    assert [url[:22] for url in loaded] == ["data:font/woff;base64,"]
    assert "@import" not in html


def test_ids_are_unique_and_every_reference_is_to_one_of_them(html: str) -> None:
    page = Page(html)
    assert len(page.ids) == len(set(page.ids))
    assert {link[1:] for link in page.links if link} <= set(page.ids)
    assert set(re.findall(r"url\(#([^)]+)\)", html)) <= set(page.ids)


def test_the_page_holds_no_word_that_promises_too_much(html: str) -> None:
    text = " ".join(Page(html).text).casefold()
    for word in ("anonym", "익명", "gdpr compliant", "fully private", "완전히 안전"):
        assert word not in text


def test_korean_is_korean_and_english_is_english() -> None:
    for key, (english, korean) in WORDS.items():
        assert not re.search("[가-힣]", english), key
        assert re.search("[가-힣εδ]", korean) or key in {"accountants.rdp", "accountants.pld"}, key
        assert english_words(re.sub(r"{\w+}", "", korean)) == set(), key
        assert set(re.findall(r"{(\w+)}", english)) >= set(re.findall(r"{(\w+)}", korean)), key


def test_nothing_on_a_korean_page_is_english_but_names(audited: Audited, html: str, language: Language) -> None:
    if language == "en":
        assert {"Within", "budget", "released", "policy"} <= english_words(html)
        return
    assert "지점 정책" in html  # a site declined
    assert english_words(html, audited.federation.sites) == set()


def words_of(audit: Audit, language: Language) -> str:
    """Return what a page says, with single spaces; one in Korean says it in Korean."""
    with pytest.MonkeyPatch.context() as patch:  # what takes the time
        patch.setattr(
            report, "_plots", lambda audit, say: dict.fromkeys(("tradeoff", "timeline", "utility", "scores"), "")
        )
        patch.setattr(report, "font_face", lambda page: "")
        page = render_html(audit, language)
    if language == "ko":
        assert english_words(page, SITES) == set()
    return " ".join(" ".join(Page(page).text).split())


def said(language: Language, key: str, **values: object) -> str:
    return " ".join(WORDS[key][LANGUAGES.index(language)].format(**values).split())


@pytest.mark.parametrize(("mode", "unit"), [("local", "person"), ("distributed", "record"), ("off", "person")])
def test_a_score_at_the_sites_is_told_with_its_interval_and_what_it_is_of(
    audited: Audited, language: Language, mode: str, unit: str
) -> None:
    page = words_of(scored(audited.written.audit, mode=mode, unit=unit), language)
    for figure in ("0.700 (0.500–0.900)", "0.233 (0.167–0.300)", "25.0 % (12.5–37.5)", "838 (835–841)"):
        assert figure in page
    for key in ("scores.interval", f"scores.intro.{unit}"):
        assert said(language, key) in page
    assert said(language, f"scores.noise.{mode}", noise=9.45) in page
    assert (said(language, "claim.scores.text", count=3, epsilon="1.5", delta=1e-5) in page) == (mode != "off")


def test_both_accounts_of_a_site_are_in_the_report(audited: Audited, language: Language) -> None:
    audit = scored(audited.written.audit)
    account = audit.sites[0].accounts[0].model_copy(update={"training": 2.25, "evaluation": 1.125, "charged": 2.25})
    sites = (audit.sites[0].model_copy(update={"accounts": (account,)}), *audit.sites[1:])
    page = words_of(audit.model_copy(update={"sites": sites}), language)
    assert f"{sites[0].name} {account.name} 2.25 1.12 2.25" in page
    assert said(language, "scores.accounts", delta=1e-5) in page


def test_the_report_says_which_adapter_was_kept(audited: Audited, language: Language) -> None:
    audit = audited.written.audit
    kept = scored(audit, kept=1).model_copy(update={
        "utility": tuple(Utility(round=n, loss=4.0 - n, perplexity=None, accuracy=None) for n in range(3))
    })  # fmt: skip
    page = words_of(kept, language)
    assert said(language, "scores.kept", kept=1) in page
    assert said(language, "utility.text", before="4", after="3") in page
    last = words_of(scored(audit), language)
    assert said(language, "scores.kept", kept=1)[-30:] not in last


def test_a_run_that_nobody_scored_or_attacked_says_so(audited: Audited, language: Language) -> None:
    audit = audited.written.audit
    page = words_of(audit, language)
    for key in ("scores.unplanned", "attack.unplanned"):
        assert said(language, key) in page
    assert page.count(said(language, "find.empirical")) == 2  # on the first screen, and among the checks
    planned = audit.claim.model_copy(update={"scores": 4, "canaries": 40})
    page = words_of(audit.model_copy(update={"claim": planned}), language)
    assert said(language, "scores.unread", count=4) in page
    assert said(language, "attack.unopened", canaries=40) in page
    assert page.count(said(language, "find.empirical.unopened")) == 2


@pytest.mark.parametrize(
    ("outcome", "values"),
    [
        ("contradicted", {"lower": 8.5, "ceiling": 9.25}),
        ("could", {"lower": 1.5, "ceiling": 9.25}),
        ("could_not", {"lower": 1.5}),
        ("off", {"lower": 1.5, "claim": None}),
    ],
)
def test_what_an_attack_says_of_the_claim_is_in_its_section_and_its_row(
    audited: Audited, language: Language, outcome: str, values: dict[str, Any]
) -> None:
    audit = attacked(audited.written.audit, **values)
    assert audit.attack is not None
    page = words_of(audit, language)
    ceiling, proved = f"{audit.attack.ceiling:.3g}", f"{audit.attack.white.lower:.3g}"
    claim = "∞" if audit.attack.claim is None else f"{audit.attack.claim:.3g}"
    assert said(language, f"attack.result.{outcome}", claim=claim, ceiling=ceiling) in page
    assert said(language, "attack.proved", right=11, guesses=14, lower=proved) in page
    assert said(language, "attack.nothing", right=7, guesses=14) in page
    assert said(language, "attack.ceiling.text", ceiling=ceiling) in page
    row = said(language, f"find.empirical.{outcome}", proved=proved, ceiling=ceiling, claim=claim)
    attention = audit.finding("empirical").status != "holds"
    assert page.count(row) == 1 + attention
    assert (said(language, "protects.contradicted") in page) == (outcome == "contradicted")


def test_what_a_perfect_attack_proves_is_what_the_report_says_of_it() -> None:
    for guesses, figure in ((100, 3.3), (1000, 5.6)):
        assert epsilon_lower_bound(guesses, guesses, guesses, 1e-9, EACH) == pytest.approx(figure, abs=0.05)
        for text in WORDS["attack.result.could_not"]:
            assert re.search(rf"\b{guesses:,}\D.*?\b{figure}(?!\d)", text)


def test_an_attack_that_contradicts_the_claim_comes_first_on_the_first_screen(
    audited: Audited, language: Language
) -> None:
    first = render_html(attacked(audited.written.audit, lower=8.5, ceiling=9.25), language).partition("<h2>")[0]
    items = re.findall(r"<li><span class=\"badge (\w+)\">.*?</span> (.*?)</li>", first)
    assert items[0] == ("fails", said(language, "find.empirical.contradicted", proved="8.5", claim="8"))
    assert len(items) <= 7


@pytest.mark.parametrize("privacy", [{}, {"mode": "off"}, {"insecure_seed": 3}], ids=["private", "off", "seeded"])
def test_a_korean_page_says_in_korean_what_is_wrong(tmp_path: Path, privacy: dict[str, Any]) -> None:
    """No end, a missing ledger, one that is not of this run, one that was cut, one that was altered."""
    federation = Federation(tmp_path, budget=math.inf)
    run = federation.run("run", make_plan(rounds=2, **privacy), declines=["incheon"], ended=False)
    ledgers = [run / "ledgers" / f"{name}.jsonl" for name in federation.sites]
    shutil.copyfile(ledgers[2], run / "ledgers" / "another.jsonl")
    ledgers[2].unlink()
    lines = ledgers[0].read_text("utf-8").splitlines()
    ledgers[0].write_text("".join(f"{line}\n" for line in lines[:-2]), "utf-8")
    ledgers[1].write_text("".join(f"{line}\n" for line in ledgers[1].read_text("utf-8").splitlines()[2:]), "utf-8")
    audit = assess(run)
    page = render_html(audit.model_copy(update={"run": audit.run.model_copy(update={"stopped": "too few"})}), "ko")
    assert english_words(page, [*federation.sites, "another"]) == set()
    for said in ("정족수 미달", "미제출", "이번 실행에 없는 지점", "종료 항목 없음", "직전 항목에 이어지지 않음"):
        assert said in page, said
    assert ("프라이버시 보호 미적용" in page) == bool(privacy)


def test_a_section_from_outside_is_a_title_and_what_it_says_of_an_audit(audited: Audited, language: Language) -> None:
    mine = Section(
        title={"en": "Whose sites these are", "ko": "지점 목록"},
        body=lambda audit, language: ", ".join(f"<{site.name}>" for site in audit.sites) + f" ({language})",
    )
    page = render_html(audited.written.audit, language, [mine])
    text = " ".join(Page(page).text)
    assert f"<h2>{mine.title[language]}</h2>" in page
    assert f"<부산-해운대> ({language})" in text  # escaped
    assert text.index(mine.title[language]) < text.index(WORDS["findings"][LANGUAGES.index(language)])
    assert f'content="fedllm {report.renderer()}"' not in page  # whoever verifies it is not told that it was altered


def test_every_text_is_used() -> None:
    source = "".join(
        (Path(report.__file__).parent / name).read_text("utf-8")
        for name in ("report.py", "summary.py", "templates/audit.html.j2")
    )
    for key in WORDS:
        stem = key.rpartition(".")[0]
        assert f'"{key}"' in source or f'"{stem}."' in source or f'"{stem}.{{' in source or "." not in key, key


def test_every_sign_of_a_page_is_in_the_embedded_font(html: str, tmp_path: Path) -> None:
    from fontTools.ttLib import TTFont

    data = re.search(r"data:font/woff;base64,([^)]+)\)", html)
    assert data is not None
    (tmp_path / "font.woff").write_bytes(base64.b64decode(data.group(1)))
    known = set(TTFont(tmp_path / "font.woff").getBestCmap())
    shown = {ord(sign) for sign in "".join(Page(html).text) if not sign.isspace()}
    assert {chr(code) for code in shown - known} <= {"✓", "✕"}  # the browser's own


def test_a_hundred_sites_and_a_thousand_rounds_fit_on_few_pages(html_of_many: str) -> None:
    assert len(html_of_many) < 3_000_000
    assert 12 <= html_of_many.count("838 (835–841)") <= 13
    first = html_of_many.partition("<h2>")[0]
    assert first.count('class="bar"') == 8


@pytest.mark.parametrize("many", [False, True], ids=["few", "many"])
def test_on_paper_no_word_leaves_its_page(audited: Audited, language: Language, many: bool) -> None:
    """Also where a word is longer than its column; words that are shorter are not cut in two."""
    audit = large(audited.written.audit, 20, 100) if many else audited.written.audit
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        weasyprint = pytest.importorskip("weasyprint", exc_type=(ImportError, OSError))
        pages = weasyprint.HTML(string=render_html(audit, language)).render().pages
    assert len(pages) > 5
    words = set()
    for page in pages:
        box: Any = page._page_box
        for each in box.descendants():
            if type(each).__name__ == "TextBox":
                words.add(each.text.strip())
                assert each.position_x >= 0, each.text
                assert each.position_x + each.width <= page.width - box.margin_right + 1, each.text
    headings = [WORDS[key][LANGUAGES.index(language)] for key in ("col.declined", "col.charged", "col.ledger")]
    assert {*headings, WORDS["verified"][LANGUAGES.index(language)]} <= words


def test_a_pdf_is_made_or_one_clear_instruction_given(audited: Audited, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(render_html(audited.written.audit, "ko"), "utf-8")  # once: it takes seconds
    with renderer(page) as process:
        try:
            pdf = rendered(process)
        except FolderError as error:
            assert "apt-get install libpango" in str(error)  # noqa: PT017  # either is right
            return
    assert pdf.startswith(b"%PDF-")
    assert len(pdf) > 40_000  # with its glyphs


def test_where_weasyprint_lacks_a_library_the_instruction_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "weasyprint", None)
    with pytest.raises(FolderError, match=r"libpango-1\.0-0 libpangoft2-1\.0-0 libharfbuzz-subset0"):
        render_pdf("<p>x</p>")


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Return a function that puts a module in WeasyPrint's place, in the processes that render."""

    def put(source: str) -> None:
        (tmp_path / "libraries").mkdir()
        (tmp_path / "libraries" / "weasyprint.py").write_text(source, "utf-8")
        monkeypatch.syspath_prepend(tmp_path / "libraries")

    return put


def report_of(audited: Audited, folder: Path, *languages: str) -> Written:
    return write_audit(audited.run, folder, [(f"audit.{each}", each) for each in languages])


def test_where_weasyprint_cannot_be_loaded_the_report_says_once_that_it_has_no_pdf(
    audited: Audited, tmp_path: Path, stand_in: Callable[[str], None]
) -> None:
    stand_in("raise OSError('cannot load library libpango')")
    written = report_of(audited, tmp_path / "audit", *LANGUAGES)
    assert [problem[:25] for problem in written.problems] == ["audit.pdf was not written"]
    assert "apt-get install" in written.problems[0]
    assert {file.name for file in written.folder.glob("audit.*.*")} == {"audit.en.html", "audit.ko.html"}


def test_a_renderer_that_fails_costs_the_pdf_and_not_the_report(
    audited: Audited, tmp_path: Path, stand_in: Callable[[str], None]
) -> None:
    stand_in("print('Fontconfig warning')\nHTML = None")
    written = report_of(audited, tmp_path / "audit", "en")
    assert written.problems == (
        "audit.pdf was not written: its renderer failed: TypeError: 'NoneType' object is not callable",
    )
    assert (written.folder / "audit.en.html").exists()
    assert not (written.folder / "audit.en.pdf").exists()


def test_the_pages_are_rendered_at_once_and_in_processes_of_their_own(
    audited: Audited, tmp_path: Path, stand_in: Callable[[str], None]
) -> None:
    """Each waits here until the other has begun."""
    stand_in(f"""
import os, pathlib, time
begun = pathlib.Path({str(tmp_path / "begun")!r})
class HTML:
    def __init__(self, string):
        begun.mkdir(exist_ok=True)
        (begun / str(os.getpid())).touch()
    def write_pdf(self):
        limit = time.monotonic() + 300
        while len(list(begun.iterdir())) < 2 and time.monotonic() < limit:
            time.sleep(0.01)
        return b"%PDF-" if len(list(begun.iterdir())) == 2 else b"alone"
""")
    written = report_of(audited, tmp_path / "audit", *LANGUAGES)
    assert not written.problems
    assert [(written.folder / f"audit.{each}.pdf").read_bytes() for each in LANGUAGES] == [b"%PDF-", b"%PDF-"]
    assert str(os.getpid()) not in {file.name for file in (tmp_path / "begun").iterdir()}


def test_a_folder_that_the_user_works_in_is_no_place_for_the_renderers_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("weasyprint.py", "fedllm.py", "logging.py"):
        (tmp_path / name).write_text("raise SystemExit('ran what lay there')", "utf-8")
    (tmp_path / "page.html").write_text("<p>x</p>", "utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("")
    with renderer(tmp_path / "page.html") as process:
        try:
            assert rendered(process).startswith(b"%PDF-")
        except FolderError as error:
            assert "apt-get install libpango" in str(error)  # noqa: PT017  # either is right


def test_no_renderer_outlives_what_asked_for_it(tmp_path: Path, stand_in: Callable[[str], None]) -> None:
    stand_in("import time\ntime.sleep(3600)")
    with pytest.raises(KeyError), renderer(tmp_path / "page.html") as process:
        raise KeyError("another page")
    assert process.returncode is not None


def test_a_page_of_another_layout_is_held_against_its_signature_alone(
    audited: Audited, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An audit outlives the template that its page was made from."""
    monkeypatch.setattr(bundle, "renderer", contextlib.nullcontext)
    monkeypatch.setattr(bundle, "rendered", lambda page: b"%PDF-")
    with monkeypatch.context() as earlier:
        earlier.setattr(report, "_words", lambda: {**WORDS, "title": ["Before", "예전"]})
        earlier.setattr(report, "renderer", lambda: "0.1.0 0badcafe")
        signer = audited.federation.head_office
        write_audit(audited.run, tmp_path / "audit", [("audit", "en")], signer=signer)
    trust = Trust.read(audited.federation.write_trust(tmp_path / "keys.txt"))
    _, left = bundle.verify(tmp_path / "audit", trust)
    assert any(line.startswith("audit.html") and "made by other versions" in line for line in left)
    assert re.fullmatch(r"\S+ [0-9a-f]{8} matplotlib \S+ jinja2 \S+ fonttools \S+", report.renderer())


def test_an_audit_is_verified_without_the_libraries_of_training(audited: Audited, tmp_path: Path) -> None:
    keys = audited.federation.write_trust(tmp_path / "keys.txt")
    code = """
import sys
from fedllm.cli.main import main
try:
    main()
finally:
    print("loaded:", *sorted({name.partition('.')[0] for name in sys.modules}))
"""
    command = [sys.executable, "-c", code, "audit", "verify", str(audited.written.folder), "--trust", str(keys),
               "--allow-uncompared"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    shown, _, loaded = done.stdout.rpartition("loaded:")
    assert "verified: within budget" in shown, done.stderr
    assert not set(loaded.split()) & {"torch", "transformers", "datasets", "flwr", "hydra", "opacus", "weasyprint"}


def test_the_commands_write_a_report_in_one_language_and_verify_it(
    audited: Audited, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = audited.federation.write_trust(tmp_path / "keys.txt")
    signing = tmp_path / "identity"
    write_secret(signing, audited.federation.head_office.to_bytes())
    monkeypatch.delitem(CROSS_CHECKS, "prv")
    out = tmp_path / "out"
    command = ["audit", "report", str(audited.run), "--lang", "ko", "--key", str(signing), "--out", str(out)]
    with any_pdf():
        done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert "within budget" in done.output
    assert '<html lang="ko">' in (out / "audit.html").read_text("utf-8")
    verify = ["audit", "verify", str(out), "--trust", str(keys)]
    assert CliRunner().invoke(app, [*verify, "--allow-uncompared"]).exit_code == 0
    (out / "metrics.jsonl").write_text("", "utf-8")
    failed = CliRunner().invoke(app, verify)
    assert failed.exit_code == 1
    assert "metrics" in str(failed.exception)


# ---- in a browser ----------------------------------------------------------------------------------------------------

# Reports every element whose content is wider than itself, or that leaves the page; only the test runs this script.
MEASURE = """<script>
window.onload = function () {
  var wrong = [], page = document.documentElement.clientWidth;
  document.querySelectorAll("main *").forEach(function (e) {
    if (e.closest("svg")) return;
    var box = e.getBoundingClientRect();
    var name = e.tagName + "." + e.className + ": " + e.textContent.trim().slice(0, 40);
    if (box.right > page + 1 || box.left < -1) wrong.push("outside " + name);
    var inline = getComputedStyle(e).display === "inline";
    if (!inline && e.clientWidth && e.scrollWidth > e.clientWidth + 1) wrong.push("cut " + name);
  });
  document.body.textContent = "MEASURED " + page + " [" + wrong.slice(0, 10).join(" | ") + "]";
};
</script>"""


needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")


def browse(*arguments: str) -> str:
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


@needs_chromium
@pytest.mark.parametrize(
    "size",
    [
        pytest.param("1200,900", id="desk"),
        pytest.param("820,1180", id="tablet", marks=pytest.mark.soak),
        pytest.param("500,900", id="narrow"),
    ],
)
@pytest.mark.parametrize("many", [False, True], ids=["few", "many"])
def test_nothing_overflows_or_is_cut(html: str, html_of_many: str, tmp_path: Path, size: str, many: bool) -> None:
    file = tmp_path / "page.html"
    file.write_text((html_of_many if many else html).replace("</head>", MEASURE + "</head>"), "utf-8")
    shown = browse(f"--window-size={size}", "--dump-dom", file.as_uri())
    found = re.search(r"MEASURED (\d+) \[(.*?)\]", shown, re.DOTALL)
    assert found is not None
    assert found.group(2) == ""
    assert int(found.group(1)) == int(size.partition(",")[0])


@needs_chromium
def test_the_first_screen_is_drawn(html: str, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(html, "utf-8")
    shot = tmp_path / "shot.png"
    browse("--window-size=1200,900", f"--screenshot={shot}", (tmp_path / "page.html").as_uri())
    assert shot.stat().st_size > 50_000  # an empty page has less than 10,000


@pytest.fixture(scope="module")
def html_of_a_thousand(audited: Audited, language: Language) -> str:
    return render_html(large(audited.written.audit, 1000, 10), language)


def test_a_thousand_sites_come_in_groups_that_open_and_each_is_found_by_its_name(
    html_of_a_thousand: str, language: Language
) -> None:
    page = Page(html_of_a_thousand)
    assert len(html_of_a_thousand) < 4_000_000
    assert len(page.ids) == len(set(page.ids))
    assert {link[1:] for link in page.links if link} <= set(page.ids)
    assert len(set(re.findall(r'href="#(site-\d+)"', html_of_a_thousand))) == 1000
    of_scope = html_of_a_thousand.split('<table class="sites">')
    assert len(of_scope) == 21, "20 groups of 50"
    assert html_of_a_thousand.count('<details class="group" open>') == 3, "of scope, accounts and proof the first"
    worst = re.findall(r"지점-(\d{3,})-", of_scope[1].partition("</table>")[0])
    assert len(worst) == 50
    assert all(int(number) % 3 for number in worst), "whose ledger is broken or missing comes before all others"
    assert WORDS["group.intro"][LANGUAGES.index(language)] in html_of_a_thousand


def test_a_few_sites_are_listed_at_once_by_name(html: str, html_of_many: str) -> None:
    for page in (html, html_of_many):
        assert "details" not in Page(page).tags
        assert page.count('<table class="sites">') == 1


def test_on_paper_there_is_the_first_group_of_many_sites(audited: Audited) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        weasyprint = pytest.importorskip("weasyprint", exc_type=(ImportError, OSError))
        page = render_html(large(audited.written.audit, 151, 10), "en")
        pages = weasyprint.HTML(string=page).render().pages
    words = " ".join(b.text for p in pages for b in p._page_box.descendants() if type(b).__name__ == "TextBox")
    del pages
    gc.collect()  # what weasyprint keeps in a folder goes with its cycles
    assert len(set(re.findall(r"지점-\d+-", words))) < 60, "50, and the first screen's"
    assert "only the first 50 of 151 sites are listed" in words
    assert "All 151 sites by name" not in words
