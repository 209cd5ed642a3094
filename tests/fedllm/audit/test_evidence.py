"""The audit believes nothing that it can check: every lie by anybody is found, and named."""

import base64
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedllm.audit.bundle import verify, write_audit
from fedllm.audit.evidence import assess, file_name
from fedllm.audit.model import Audit, Code, json_schema
from fedllm.audit.risk import risk_of
from fedllm.audit.trust import Trust
from fedllm.crypto.identity import Identity
from fedllm.errors import ChainError, ConfigError, FedllmError
from fedllm.privacy.accounting import AccountingEvent, counted, deltas, spent
from tests.fedllm.audit.conftest import Audited, any_pdf
from tests.fedllm.audit.evidence import DELTA, SITES, Chain, Federation, make_plan, resign

ROOT = Path(__file__).parents[3]


# ---- what holds ------------------------------------------------------------------------------------------------------


def test_an_honest_run_is_within_budget_and_verified_by_who_knows_the_keys(audited: Audited) -> None:
    audit, _ = verify(audited.run / "audit", audited.federation.trust)
    assert audit.verdict == "within"
    assert [f.code for f in audit.findings if f.status == "fails"] == []
    assert audit.finding("keys").status == "holds"


def test_the_report_itself_claims_nothing_that_it_could_not_check(audited: Audited) -> None:
    unverified = {f.code for f in audited.written.audit.findings if f.status == "unverified"}
    assert unverified == {"keys", "site_software", "unit", "one_site_a_person", "empirical"}


def test_spending_is_that_of_all_runs_on_the_same_records(audited: Audited) -> None:
    site = next(site for site in audited.written.audit.sites if site.name == "seoul-gangnam")
    event = make_plan().mechanism.event(2)
    assert site.charged == pytest.approx(spent([event] * 5, DELTA).epsilon, abs=1e-6)
    assert site.run == pytest.approx(spent([event] * 3, DELTA).epsilon, abs=1e-6)
    assert site.budget == audited.federation.budget
    [account] = site.accounts
    several = counted([event] * 5, DELTA, audited.federation.budget, one_plan=False)  # which is what the site goes by
    assert (account.name, account.decides, account.counted) == ("site", "RDP", pytest.approx(several))
    assert site.left == pytest.approx(audited.federation.budget - several, abs=1e-6)
    assert {point.run for point in audited.written.audit.timeline} == {"e" * 32, "f" * 32}


def test_with_noise_of_each_sites_own_a_person_at_two_pays_twice(audited: Audited) -> None:
    event = make_plan().mechanism.event(2)  # three of them are of this run
    (two, epsilon), *_ = audited.written.audit.accountants.several_sites
    assert (two, epsilon) == (2, pytest.approx(spent([event] * 6, DELTA).epsilon, abs=1e-6))


def test_a_reservation_that_was_never_released_is_shown_as_reserved(tmp_path: Path) -> None:
    federation = Federation(tmp_path)
    plan = make_plan(rounds=2)
    run = federation.run("run", plan)
    federation.ledger(SITES[0]).reserve("another", 1, "request", plan.mechanism.event(2))
    federation.export(run)
    site = next(site for site in assess(run).sites if site.name == SITES[0])
    assert (site.charged or 0) > (site.spent or 0) > 0


def test_audit_json_fits_the_published_schema(audited: Audited) -> None:
    published = json.loads((ROOT / "fedllm/audit/audit.schema.json").read_text("utf-8"))
    assert published == json_schema(), "write it again: see docs/audit.md"
    jsonschema.Draft202012Validator.check_schema(published)
    content = json.loads((audited.run / "audit" / "audit.json").read_text("utf-8"))
    jsonschema.validate(content, published)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**content, "verdict": "fine"}, published)


def test_verification_needs_no_torch(audited: Audited, tmp_path: Path) -> None:
    keys = audited.federation.write_trust(tmp_path / "keys.txt")
    code = f"""
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "flwr", "opacus", "transformers", "peft", "datasets"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Missing())
sys.argv = ["fedllm", "audit", "verify", {str(audited.run / "audit")!r}, "--trust", {str(keys)!r}, "--allow-uncompared"]
from fedllm.cli.main import main
main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "verified: within budget; 3 sites, 3 rounds" in done.stdout


# ---- what does not ---------------------------------------------------------------------------------------------------


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every leaf of a JSON value; a DSSE payload is opened."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        yield path
        return
    for key, item in items:
        if key == "payload":
            yield from leaves(json.loads(base64.b64decode(item)), (*path, "payload"))
        else:
            yield from leaves(item, (*path, key))


def other(leaf: Any) -> Any:
    """Return another value of the same kind."""
    if isinstance(leaf, bool) or leaf is None:
        return not leaf
    if isinstance(leaf, int):
        return leaf + 1
    if isinstance(leaf, float):
        return leaf * 1.01 + 0.01
    return (chr(ord(leaf[0]) ^ 1) + leaf[1:]) if leaf else "x"


def changed(value: Any, path: tuple[Any, ...]) -> Any:
    if not path:
        return other(value)
    if path[0] == "payload":
        inside = changed(json.loads(base64.b64decode(value["payload"])), path[1:])
        text = json.dumps(inside, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return {**value, "payload": base64.b64encode(text.encode()).decode()}
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = changed(value[path[0]], path[1:])
    return copy


Leaf = tuple[int, tuple[Any, ...]]  # number of the document, path in it
Choice = Callable[[list[Leaf]], list[Leaf]]


def pieces(file: Path) -> list[Leaf]:
    """Return every leaf in a file of JSON, or of lines of JSON."""
    return [(number, path) for number, value in enumerate(documents(file)) for path in leaves(value)]


def each_kind(found: list[Leaf]) -> list[Leaf]:
    """Return of every kind of leaf the first, the second and the last. Every finding is a kind of its own."""
    kinds: dict[tuple[Any, ...], list[Leaf]] = {}
    for number, path in found:
        kind = path if "findings" in path else tuple(key for key in path if isinstance(key, str))
        kinds.setdefault(kind, []).append((number, path))
    return [each for some in kinds.values() for each in dict.fromkeys([*some[:2], some[-1]])]


of_leaves = pytest.mark.parametrize("of", [each_kind, pytest.param(list, marks=pytest.mark.soak)], ids=["kinds", "all"])


def documents(file: Path) -> list[Any]:
    text = file.read_text("utf-8")
    return [json.loads(line) for line in text.splitlines()] if file.suffix == ".jsonl" else [json.loads(text)]


def write(file: Path, values: list[Any]) -> None:
    compact = file.suffix == ".jsonl"
    lines = [json.dumps(v, ensure_ascii=False, separators=(",", ":") if compact else None) for v in values]
    file.write_text("\n".join(lines) + "\n" if compact else lines[0], "utf-8")


def contradicts(folder: Path, trust: Trust) -> bool:
    """Whether verification ends with one clear error."""
    try:
        verify(folder, trust)
    except FedllmError:
        return True
    return False


FILES = ["audit.json", "audit.sig", "record.jsonl", "plan.json", "metrics.jsonl", "ledgers/부산-해운대.jsonl"]


@of_leaves
@pytest.mark.parametrize("name", FILES)
def test_no_leaf_of_any_file_can_be_altered(audited: Audited, tmp_path: Path, name: str, of: Choice) -> None:
    copy = tmp_path / "audit"
    shutil.copytree(audited.run / "audit", copy)
    file = copy / name
    original, values = file.read_bytes(), documents(file)
    for number, path in of(pieces(file)):
        write(file, [changed(v, path) if n == number else v for n, v in enumerate(values)])
        assert file.read_bytes() != original
        assert contradicts(copy, audited.federation.trust), f"{path} of document {number}"


@of_leaves
def test_no_leaf_of_the_report_can_be_altered_by_its_own_signer(audited: Audited, tmp_path: Path, of: Choice) -> None:
    """The server signs what it likes; the evidence still says what it says. Only when it was made is its own word."""
    copy = tmp_path / "audit"
    shutil.copytree(audited.run / "audit", copy)
    for page in (*copy.glob("*.html"), *copy.glob("*.pdf")):
        page.unlink()
    file = copy / "audit.json"
    [value] = documents(file)
    unnoticed = []
    for _, path in of(pieces(file)):
        write(file, [changed(value, path)])
        sign_again(copy, audited.federation.head_office)
        if not contradicts(copy, audited.federation.trust):
            unnoticed.append(path)
    assert unnoticed == [("made",)]


@pytest.mark.parametrize("name", [name for name in FILES if name.endswith(".jsonl")])
def test_no_line_of_evidence_can_be_left_out_doubled_or_exchanged(audited: Audited, tmp_path: Path, name: str) -> None:
    copy = tmp_path / "audit"
    shutil.copytree(audited.run / "audit", copy)
    file = copy / name
    lines = file.read_text("utf-8").splitlines()
    for number in range(len(lines)):
        others = [*lines[:number], *lines[number + 1 :]]
        doubled = [*lines[: number + 1], *lines[number:]]
        moved = [*others[: number - 1], lines[number], *others[number - 1 :]] if number else [*others, lines[0]]
        for wrong in (others, doubled, moved, lines[:number]):
            file.write_text("".join(f"{line}\n" for line in wrong), "utf-8")
            sign_again(copy, audited.federation.head_office)
            assert contradicts(copy, audited.federation.trust), f"line {number}: {len(wrong)} of {len(lines)} lines"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(data=st.data())
def test_evidence_contradicts_itself_wherever_it_was_altered_without_any_signature_on_the_report(
    audited: Audited, tmp_path: Path, data: st.DataObject
) -> None:
    name = data.draw(st.sampled_from(["record.jsonl", "plan.json", *(f"ledgers/{file_name(s)}.jsonl" for s in SITES)]))
    copy = tmp_path / "evidence"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(audited.run / "audit", copy)
    number, path = data.draw(st.sampled_from(pieces(copy / name)))
    write(copy / name, [changed(v, path) if n == number else v for n, v in enumerate(documents(copy / name))])
    assert verdict_on(copy) == "unverifiable"


def verdict_on(folder: Path) -> str:
    """Return the verdict; without a readable record there is nothing to report on, and nothing is verified either."""
    try:
        return assess(folder).verdict
    except ChainError:
        return "unverifiable"


@pytest.mark.parametrize("earlier", [1, 2])
def test_a_report_of_an_earlier_format_is_said_to_be_one(audited: Audited, tmp_path: Path, earlier: int) -> None:
    copy = tmp_path / "audit"
    shutil.copytree(audited.run / "audit", copy)
    content = json.loads((copy / "audit.json").read_text("utf-8"))
    (copy / "audit.json").write_text(json.dumps({**content, "format": earlier}), "utf-8")
    with pytest.raises(ChainError, match=f"format {earlier}, made by an earlier version of fedllm; expected 3"):
        verify(copy, audited.federation.trust)


@pytest.mark.parametrize("name", ["audit.html", "audit.ko.html", "audit.pdf", "audit.ko.pdf", "ledgers/incheon.jsonl"])
def test_a_file_that_is_altered_missing_or_new_is_found(audited: Audited, tmp_path: Path, name: str) -> None:
    copy = tmp_path / "audit"
    shutil.copytree(audited.run / "audit", copy)
    file = copy / name
    if not file.exists():
        pytest.skip("no PDF here: the libraries of WeasyPrint are missing")
    content = file.read_bytes()
    for wrong in (content + b"\n", content[:-200], None):
        file.unlink() if wrong is None else file.write_bytes(wrong)
        with pytest.raises(ChainError, match=r"altered|missing|entry|verdict|evidence|signed"):
            verify(copy, audited.federation.trust)
    file.write_bytes(content)
    (copy / "notes.txt").write_text("x")
    with pytest.raises(ChainError, match=r"notes\.txt: no part of an audit"):
        verify(copy, audited.federation.trust)


def test_a_page_that_says_something_else_is_found_even_where_head_office_signed_it(tmp_path: Path) -> None:
    federation = Federation(tmp_path, sites=SITES[:2])
    run = federation.run("run", make_plan(rounds=1))
    with any_pdf():
        folder = write_audit(run, run / "audit", [("audit", "en")], signer=federation.head_office).folder
    page = folder / "audit.html"
    page.write_text(page.read_text("utf-8").replace("unverified", "holds"), "utf-8")
    sign_again(folder, federation.head_office)
    with pytest.raises(ChainError, match=r"audit\.html: it does not say what audit\.json says"):
        verify(folder, federation.trust)


def sign_again(folder: Path, signer: Identity) -> None:
    from fedllm.audit import bundle

    payload = json.dumps({"files": bundle._digests(folder)}, sort_keys=True).encode()
    (folder / "audit.sig").write_text(bundle.sign_envelope(payload, bundle.SIGNATURE_TYPE, signer), "utf-8")


def lie(run: Path, head_office: Identity, change: Callable[[list[dict[str, Any]]], None]) -> None:
    """Let the server write another record, with its own good signatures."""
    from fedllm.crypto.hash_chain import open_entry

    entries = [open_entry(line) for line in (run / "record.jsonl").read_text("utf-8").splitlines()]
    bodies = [{"kind": entry.kind, **entry.body} for entry in entries]
    change(bodies)
    chain = Chain(head_office)
    for body in bodies:
        chain.add(str(body.pop("kind")), body)
    (run / "record.jsonl").write_text("".join(f"{line}\n" for line in chain.lines), "utf-8")


def failing(run: Path, trust: Trust | None = None) -> set[Code]:
    return {finding.code for finding in assess(run, trust).findings if finding.status == "fails"}


@pytest.fixture
def small(tmp_path: Path) -> tuple[Federation, Path]:
    federation = Federation(tmp_path, sites=SITES[:2])
    return federation, federation.run("run", make_plan(rounds=3))


def test_a_site_that_states_too_little_is_found(small: tuple[Federation, Path]) -> None:
    federation, run = small
    site = SITES[0]

    def change(bodies: list[dict[str, Any]]) -> None:
        answered = bodies[6]["answered"]  # the last round: nobody has signed for what comes after
        answered[site] = resign(answered[site], {"epsilon": 0.1}, federation.identities[site])

    lie(run, federation.head_office, change)
    assert failing(run) == {"epsilon"}


@pytest.mark.parametrize(("cut", "status"), [(1, "unverified"), (2, "fails"), (3, "fails"), (4, "fails")])
def test_a_ledger_that_was_cut_at_its_end_is_found(small: tuple[Federation, Path], cut: int, status: str) -> None:
    _, run = small
    path = run / "ledgers" / f"{SITES[0]}.jsonl"
    path.write_text("".join(f"{line}\n" for line in path.read_text("utf-8").splitlines()[:-cut]), "utf-8")
    audit = assess(run)
    assert audit.finding("ledger_complete").status == status
    assert audit.verdict == "unverifiable"


def test_a_ledger_that_was_written_anew_by_its_own_site_is_found(small: tuple[Federation, Path]) -> None:
    federation, run = small
    shutil.rmtree(federation.folder / "offices")
    federation.run("again", make_plan(rounds=1))
    shutil.copy(federation.folder / "again" / "ledgers" / f"{SITES[0]}.jsonl", run / "ledgers")
    assert {"ledger_complete", "charged_before_release"} <= failing(run)


def test_a_ledger_signed_by_a_stranger_is_found(small: tuple[Federation, Path]) -> None:
    federation, run = small
    stranger = Federation(federation.folder / "elsewhere", sites=SITES[:2])
    copy = stranger.run("run", make_plan(rounds=3))
    shutil.copy(copy / "ledgers" / f"{SITES[0]}.jsonl", run / "ledgers")
    assert "ledger_chain" in failing(run)


def test_a_statement_put_under_another_sites_name_or_round_is_found(small: tuple[Federation, Path]) -> None:
    federation, run = small

    def swap(bodies: list[dict[str, Any]]) -> None:
        bodies[2]["answered"][SITES[1]] = bodies[2]["answered"][SITES[0]]

    lie(run, federation.head_office, swap)
    assert "statements" in failing(run)


def test_a_round_left_out_by_head_office_is_found(small: tuple[Federation, Path]) -> None:
    federation, run = small
    lie(run, federation.head_office, lambda bodies: bodies.pop(4) and None)
    assert {"rounds", "countersigned"} <= failing(run)


@pytest.mark.parametrize(("quorum", "found"), [(2, set()), (3, {"rounds"})])
def test_a_round_of_fewer_sites_than_the_plan_promised_is_found(tmp_path: Path, quorum: int, found: set[Code]) -> None:
    federation = Federation(tmp_path)
    plan = make_plan(rounds=2).model_copy(update={"quorum": quorum})
    assert failing(federation.run("run", plan, declines=["incheon"])) == found


def test_another_plan_is_found(small: tuple[Federation, Path]) -> None:
    federation, run = small

    def change(bodies: list[dict[str, Any]]) -> None:
        plan = make_plan(rounds=3, noise_multiplier=5.0)
        bodies[0].update(plan=plan.model_dump(mode="json"), plan_digest=plan.digest)

    lie(run, federation.head_office, change)
    assert {"plan", "statements"} <= failing(run)


def test_keys_that_the_reader_does_not_know_are_named(small: tuple[Federation, Path]) -> None:
    federation, run = small
    stranger = Identity.generate().public.fingerprint
    trust = Trust({"head-office": [stranger], **{s: [i.public.to_text()] for s, i in federation.identities.items()}})
    finding = assess(run, trust).finding("keys")
    assert finding.status == "fails"
    assert finding.evidence == (f"head-office: {federation.head_office.public.fingerprint}",)
    assert assess(run, trust).verdict == "unverifiable"


def test_without_a_ledger_nothing_can_be_verified(small: tuple[Federation, Path]) -> None:
    federation, run = small
    (run / "ledgers" / f"{SITES[0]}.jsonl").unlink()
    folder = write_audit(run, run / "audit", [], signer=federation.head_office).folder
    audit, _ = verify(folder, federation.trust)
    assert audit.verdict == "unverifiable"
    assert {site.name: site.ledger for site in audit.sites} == {SITES[0]: "missing", SITES[1]: "verified"}


def test_more_than_the_budget_is_exceeded(tmp_path: Path) -> None:
    federation = Federation(tmp_path, sites=SITES[:2])
    federation.run("before", make_plan("e" * 32, rounds=2))
    federation.budget = 10.0
    run = federation.run("run", make_plan(rounds=3))
    federation.budget = 0.3  # what the site permits now
    federation.export(run)
    audit = assess(run)
    assert audit.verdict == "exceeded"
    assert audit.finding("budget").status == "fails"


@pytest.mark.parametrize("privacy", [{"insecure_seed": 7}, {"mode": "off", "noise_multiplier": None}])
def test_a_run_that_protects_nobody_is_never_within(tmp_path: Path, privacy: dict[str, Any]) -> None:
    federation = Federation(tmp_path, sites=SITES[:2], budget=float("inf"))
    audit = assess(federation.run("run", make_plan(rounds=1, **privacy)))
    assert audit.verdict == "exceeded"
    assert audit.risk.advantage == audit.risk.tpr_at_1_percent == 1.0


def test_a_resumed_run_is_followed(small: tuple[Federation, Path]) -> None:
    federation, run = small

    def change(bodies: list[dict[str, Any]]) -> None:
        end = bodies.pop()
        again = [dict(each) for each in bodies[5:7]]
        bodies += [{"kind": "resumed", "round": 2, "adapter": f"{2:064x}"}, *again, end]

    lie(run, federation.head_office, change)
    federation.export(run)
    audit = assess(run)
    assert audit.verdict == "within"
    assert audit.run.rounds == 3


@pytest.mark.parametrize(
    "text", ["", "head-office", "head-office zz", "# only a comment", "head-office " + "a" * 39], ids=repr
)
def test_a_file_of_keys_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "keys").write_text(text, "utf-8")
    with pytest.raises(ConfigError):
        Trust.read(tmp_path / "keys")
    with pytest.raises(ConfigError):
        Trust.read(tmp_path / "missing")


# ---- risk ------------------------------------------------------------------------------------------------------------


def test_the_trade_off_of_a_full_batch_is_that_of_the_gaussian_mechanism() -> None:
    """Dong, Roth and Su 2022, Theorem 2.7: sensitivity 1, noise sigma is 1/sigma-GDP."""
    from statistics import NormalDist

    normal, sigma = NormalDist(), 2.0
    events = [AccountingEvent(1.0, sigma, 1)]
    cost = spent(events, DELTA)
    risk = risk_of(events, cost.epsilon, cost.grid)
    for rate, hit in risk.curve[1:-1]:
        exact = normal.cdf(normal.inv_cdf(rate) + 1 / sigma)
        assert exact - 1e-4 <= hit <= exact + 0.02  # never better for the reader than it is
    assert risk.advantage == pytest.approx(2 * normal.cdf(1 / (2 * sigma)) - 1, abs=1e-3)


def test_more_steps_never_help_the_defender() -> None:
    rate, noise, steps = 0.2, 3.0, 4

    def at(count: int) -> tuple[float, float, list[float]]:
        events = [AccountingEvent(rate, noise, count)]
        cost = spent(events, DELTA)
        risk = risk_of(events, cost.epsilon, cost.grid)
        return risk.advantage, risk.tpr_at_1_percent, [hit for _, hit in risk.curve]

    one, two = at(steps), at(2 * steps)
    assert one[0] <= two[0]
    assert one[2] == sorted(one[2])
    assert all(0 <= hit <= 1 for hit in one[2])
    assert deltas([AccountingEvent(rate, noise, steps)], [0.0], 1e-4)[0] == pytest.approx(one[0], abs=1e-5)


def test_nothing_released_means_no_advantage() -> None:
    risk = risk_of([], 0.0, None)
    assert risk.advantage == 0
    assert risk.tpr_at_1_percent == 0.01


def test_an_audit_reads_back_as_it_was_written(audited: Audited) -> None:
    content = (audited.run / "audit" / "audit.json").read_bytes()
    assert Audit.model_validate_json(content) == audited.written.audit


def test_a_statement_on_another_adapter_than_the_record_names_is_found(small: tuple[Federation, Path]) -> None:
    """A server could have another adapter scored, or attacked, than the one it says it trained."""
    federation, run = small

    def change(bodies: list[dict[str, Any]]) -> None:
        answered = next(body["answered"] for body in bodies if body["kind"] == "round")
        site = min(answered)
        answered[site] = resign(answered[site], {"adapter": "f" * 64}, federation.identities[site])

    lie(run, federation.head_office, change)
    assert "statements" in failing(run)
