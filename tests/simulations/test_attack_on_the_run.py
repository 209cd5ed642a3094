"""Sites commit to canaries before the first charge, guess after the last round, and the audit counts again."""

import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import server.run
from client.canaries import SiteCanaries
from client.site import Site
from fedllm.audit.bundle import write_audit
from fedllm.audit.evidence import assess, file_name
from fedllm.audit.model import Audit
from fedllm.audit.summary import RunSummary
from fedllm.config import SimulationConfig
from fedllm.crypto.hash_chain import open_entry
from fedllm.privacy import mechanism
from fedllm.privacy.canaries import Opening, Secret
from fedllm.privacy.ledger import LedgerFile, PrivacyLedger
from fedllm.protocol.messages import TrainRequest, from_bytes
from fedllm.protocol.spending_statement import open_statement
from server.rounds import Coordinator
from server.run_record import RECORD_FILE, key_in
from simulations.simulate import simulate
from tests.fedllm.audit.test_evidence import lie
from tests.simulations.conftest import BRANCHES, Configure, merge
from tests.simulations.test_canary_controls import base  # noqa: F401  # a fixture

ATTACKED: dict[str, Any] = {
    "audit": {"canaries": 8},
    "data": {"samples": 0, "heldout": None},
    "training": {"rounds": 2},
    "federation": {"round_timeout": 60.0},
}


@pytest.fixture(autouse=True)
def _no_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plots and summaries are not what is tested here."""
    monkeypatch.setattr(server.run, "write_outputs", lambda *_: None)


def attacked(configure: Configure, folder: Path, **changes: Any) -> RunSummary:
    config: SimulationConfig = configure(folder, **merge(ATTACKED, changes))
    return simulate(config, lambda *_: None, lambda _: None)


def audit_of(done: RunSummary) -> Audit:
    return write_audit(done.folder, done.folder / "audit", pages=()).audit


def ledger_of(done: RunSummary, site: str) -> LedgerFile:
    return LedgerFile(done.folder / "sites" / file_name(site) / "ledger.db")


def openings(done: RunSummary) -> dict[str, str]:
    found = map(open_entry, (done.folder / RECORD_FILE).read_text("utf-8").splitlines())
    [closing] = [entry.body for entry in found if entry.kind == "closing"]
    return {site: open_statement(line)[0].canaries for site, line in closing["answered"].items()}


@pytest.mark.parametrize("mode", ["local", "distributed"])
def test_canaries_are_committed_to_before_the_first_charge_and_opened_at_the_end(
    tmp_path: Path, configure: Configure, mode: str
) -> None:
    shared: dict[str, Any] = {
        "privacy": {"mode": "distributed", "noise_multiplier": 4.0}, "training": {"rounds": 2, "local_steps": 1},
        "federation": {"quorum": None},
    }  # fmt: skip
    done = attacked(configure, tmp_path, **(shared if mode == "distributed" else {}))
    assert not done.stopped
    for site, text in openings(done).items():
        kinds = [open_entry(line).kind for line in ledger_of(done, site).lines()]
        assert kinds.index("canaries") < kinds.index("reserved")
        assert len(Opening.from_text(text).secret.coins) == 8
    assert len({Opening.from_text(text).secret.seed for text in openings(done).values()}) == len(BRANCHES)
    audit = audit_of(done)
    assert audit.verdict == "within"
    assert audit.attack is not None
    assert (audit.attack.sites, audit.attack.canaries, audit.attack.guesses) == (4, 32, 4 * done.plan.guesses)
    members = sum(len(LedgerFile(ledger_of(done, site).path).overlaps("x", frozenset())) for site in BRANCHES)
    assert members == 0, "canaries are no records: no list of what a data set holds names them"


def test_a_run_without_noise_is_contradicted(
    tmp_path: Path,
    configure: Configure,
    monkeypatch: pytest.MonkeyPatch,
    base: Path,  # noqa: F811  # the fixture
) -> None:
    """The plan claims an epsilon; sites that leave their noise out are found by the attack, and by nothing else."""
    monkeypatch.setattr(mechanism, "float_safe_normals", lambda source, n: np.zeros(n))

    def drawn(cls: type[Secret], run: str, site: str, canaries: int) -> Secret:  # the same in every run of this test
        source = random.Random(f"{site} 4")
        coins = "".join(source.choice("01") for _ in range(canaries))
        return cls(run=run, site=site, nonce=source.randbytes(32).hex(), seed=source.randbytes(32).hex(), coins=coins)

    monkeypatch.setattr(Secret, "draw", classmethod(drawn))
    done = attacked(
        configure, tmp_path, audit={"canaries": 40}, model={"source": str(base)},
        adapter={"rank": 8, "targets": "all-linear"},
        training={"rounds": 6, "local_steps": 1, "learning_rate": 1.0},
        privacy={"epsilon": 0.5, "delta": 1e-6, "noise_multiplier": 30.0, "sampling_rate": 0.5, "clip_norm": 0.1,
                 "self_check": False, "insecure_seed": 1},
    )  # fmt: skip
    audit = audit_of(done)
    assert audit.attack is not None
    assert audit.attack.ceiling > 2
    assert audit.finding("empirical").status == "fails"
    assert audit.verdict == "exceeded"
    assert {f.code for f in audit.findings if f.status == "fails"} == {"empirical", "protected"}  # seeded coins


Tamper = Callable[[Path], None]


def _gone(state: Path) -> None:
    state.unlink()


def _cut(state: Path) -> None:
    state.write_bytes(state.read_bytes()[:-9])


def _of_another(state: Path) -> None:
    _, _, content = state.read_bytes().partition(b"\n")
    head, _, numbers = content.partition(b"\n")
    made = json.loads(head)
    made["secret"] = Secret.draw(made["secret"]["run"], made["secret"]["site"], 8).model_dump()
    content = json.dumps(made, separators=(",", ":"), sort_keys=True).encode() + b"\n" + numbers
    state.write_bytes(hashlib.sha256(content).hexdigest().encode() + b"\n" + content)


@pytest.mark.parametrize("tamper", [_gone, _cut, _of_another])
def test_a_site_that_lost_its_coins_trains_on_and_guesses_nothing(
    tmp_path: Path, configure: Configure, monkeypatch: pytest.MonkeyPatch, tamper: Tamper
) -> None:
    """Whatever became of them after the commitment, other coins never take their place."""
    honest, changed = SiteCanaries.saw, list[str]()

    def saw(self: SiteCanaries, round_: int, *rest: Any) -> None:
        honest(self, round_, *rest)
        if self._site == "busan" and round_ == 1 and not changed:
            tamper(self._path)
            changed.append(self._site)

    monkeypatch.setattr(SiteCanaries, "saw", saw)
    done = attacked(configure, tmp_path)
    assert not done.stopped
    assert changed == ["busan"]
    assert sorted(site for site, text in openings(done).items() if not text) == ["busan"]
    audit = audit_of(done)
    assert audit.attack is not None
    assert (audit.attack.sites, audit.verdict) == (3, "within")
    assert "gives up" in (done.folder / "sites" / "sites.log").read_text("utf-8").replace("given up", "gives up")


def test_coins_that_are_opened_otherwise_than_committed_are_found(
    tmp_path: Path, configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A site that chooses its coins when it knows the guesses would contradict any claim, or none."""
    honest = SiteCanaries.opening

    def cheat(self: SiteCanaries, *arguments: Any) -> Opening:
        opening = honest(self, *arguments)
        coins = "".join("1" if k in (*opening.black, *opening.white) else "0" for k in range(8))
        secret = opening.secret.model_copy(update={"coins": coins})
        return opening.model_copy(update={"secret": secret}) if self._site == "busan" else opening

    monkeypatch.setattr(SiteCanaries, "opening", cheat)
    audit = audit_of(attacked(configure, tmp_path))
    assert audit.finding("statements").status == "fails"
    assert "busan" in audit.finding("statements").evidence[0]
    assert audit.attack is not None
    assert audit.attack.sites == 3


def test_an_opening_that_the_server_hides_leaves_the_attack_unverified(tmp_path: Path, configure: Configure) -> None:
    """It knows who guessed well before it writes who has answered."""
    done = attacked(configure, tmp_path)
    audit_of(done)  # hands in the ledgers

    def hide(bodies: list[dict[str, Any]]) -> None:
        closing = next(body for body in bodies if body["kind"] == "closing")
        del closing["answered"]["busan"]
        closing["failed"]["busan"] = "no answer"

    lie(done.folder / "audit", key_in(done.folder), hide)
    audit = assess(done.folder / "audit")
    assert audit.attack is not None
    assert audit.attack.sites == 3
    assert audit.finding("empirical").status == "unverified"
    assert "busan" in audit.finding("empirical").evidence[0]


def test_an_attack_on_an_adapter_before_the_last_leaves_it_unverified(
    tmp_path: Path, configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server has the canaries opened after the first round, when next to nothing is to be seen, and trains on."""
    honest, close = Coordinator._round, Coordinator._close

    def early(self: Coordinator, number: int) -> None:
        if number == 2:
            close(self, self.plan.training.rounds + 1)
        honest(self, number)

    monkeypatch.setattr(Coordinator, "_round", early)
    monkeypatch.setattr(Coordinator, "_close", lambda *_: None)
    audit = audit_of(attacked(configure, tmp_path))
    assert audit.attack is not None
    assert audit.finding("empirical").status == "unverified"


def test_a_commitment_after_the_first_charge_is_no_commitment(
    tmp_path: Path, configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PrivacyLedger, "commit", lambda self, run, commitment: True)  # notes nothing
    audit = audit_of(attacked(configure, tmp_path))
    assert audit.attack is None
    assert audit.finding("statements").status == "fails"


def test_canaries_that_were_opened_before_the_last_round_are_found(
    tmp_path: Path, configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that asks for the closing exchange first knows the coins, and trains on with that."""
    honest, early = Site.handle, list[str]()

    def handle(self: Site, request: bytes, stop: Any = None) -> bytes:
        if b'"kind":"train"' in request[:40] and self.name not in early:
            asked = from_bytes(request, TrainRequest, TrainRequest)
            if asked.round == 2:  # in the first, no step was seen yet, and the site has nothing to guess by
                early.append(self.name)
                honest(self, asked.model_copy(update={"round": asked.plan.exchanges}).to_bytes())
        return honest(self, request, stop)

    monkeypatch.setattr(Site, "handle", handle)
    audit = audit_of(attacked(configure, tmp_path))
    assert len(early) == len(BRANCHES)
    assert audit.finding("empirical").status == "unverified"


def test_a_site_takes_part_in_an_attack_only_if_its_policy_allows(
    tmp_path: Path, configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = Site.__init__

    def strict(self: Site, name: str, policy: Any, *rest: Any, **more: Any) -> None:
        honest(self, name, policy.model_copy(update={"canaries": 7}), *rest, **more)

    monkeypatch.setattr(Site, "__init__", strict)
    done = attacked(configure, tmp_path)
    assert "policy" in done.stopped
    for site in BRANCHES:
        path = done.folder / "sites" / file_name(site) / "ledger.db"
        assert not path.exists() or not LedgerFile(path).charges()
