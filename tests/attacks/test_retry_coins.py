"""Attack: one charge buys many timed passes over many samples, by cancelling the request each time (61 for one charge).

Stopped by the reservation: its coins fix the sample, they are given out twice, and after that it is charged anew.
"""

import sqlite3
import threading
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

import client.site
from fedllm.crypto.identity import Identity
from fedllm.errors import BudgetExceeded, Cancelled, CryptoError
from fedllm.privacy.accounting import overrun
from fedllm.privacy.ledger import PrivacyLedger
from fedllm.protocol.messages import TrainReply
from tests.attacks.ledgers import BUDGET, DELTA, EVENT, ROUNDS, Branch
from tests.bug_zoo.invariants import office_of
from tests.client.test_site import read


def sealed(path: Path) -> list[bytes | None]:
    with closing(sqlite3.connect(path)) as db:
        return [row[0] for row in db.execute("SELECT coins FROM entry ORDER BY id")]


def test_a_retry_has_the_same_coins_and_a_second_one_pays_for_new_ones(branch: Branch) -> None:
    most = ROUNDS
    while overrun([EVENT] * (most + 1), DELTA, BUDGET, one_plan=True) is None:
        most += 1
    given = [branch.open().reserve("first", 1, "request", EVENT).coins for _ in range(2 * most)]
    assert [len(coins) for coins in given] == [32] * 2 * most
    assert given[::2] == given[1::2]
    assert len(set(given)) == most
    assert branch.open().events() == [EVENT] * most
    with pytest.raises(BudgetExceeded):
        branch.open().reserve("first", 1, "request", EVENT)
    assert branch.open().events() == [EVENT] * most
    branch.open().file.verify([branch.office.identity.public])


def test_every_round_has_coins_of_its_own(branch: Branch) -> None:
    coins = {branch.open().reserve("first", round_, "request", EVENT).coins for round_ in range(ROUNDS)}
    assert len(coins) == ROUNDS


def test_requests_that_are_cancelled_again_and_again_pay_for_every_second_pass(
    tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    office, passes = office_of(tmp_path, tiny_llama), 0

    def cancelled(*_: Any) -> Any:
        nonlocal passes
        passes += 1
        raise Cancelled("nobody waits")

    monkeypatch.setattr(client.site, "train_round", cancelled)
    request = office.request()
    for number in range(1, 12):
        with pytest.raises(Cancelled):
            office.site.handle(request, threading.Event())
        if number % 3 == 0:
            office.restart()
        assert (passes, len(office.events())) == (number, (number + 1) // 2)


def test_what_has_left_is_sent_again_and_its_coins_are_gone_for_good(branch: Branch) -> None:
    path = branch.office.ledger.file
    ledger = branch.open()
    reservation = ledger.reserve("first", 1, "request", EVENT)
    (stored,) = sealed(path)
    assert stored is not None
    assert stored in path.read_bytes()
    assert reservation.coins not in path.read_bytes(), "a copy of the file shows no coins"
    assert str(reservation.coins) not in repr(reservation), "nor does a log"
    ledger.release(reservation, b"reply")
    again = ledger.reserve("first", 1, "request", EVENT)
    assert (again.reply, again.coins) == (b"reply", b"")
    assert sealed(path) == [None]
    for part in (stored, stored[:40], stored[-40:]):
        assert part not in path.read_bytes(), "overwritten, not only unlinked"
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_coins_are_forgotten_when_they_are_superseded_or_aborted(branch: Branch) -> None:
    path = branch.office.ledger.file
    for _ in range(3):
        branch.open().reserve("first", 1, "request", EVENT)
    assert [each is None for each in sealed(path)] == [True, False]
    branch.owner("abort", "first", 1)
    assert sealed(path) == [None, None]
    assert branch.open().events() == []


def test_only_the_sites_own_keys_open_the_coins(branch: Branch) -> None:
    ledger = branch.open()
    coins = ledger.reserve("first", 1, "request", EVENT).coins
    (stored,) = sealed(branch.office.ledger.file)
    own, stranger = branch.office.identity, Identity.generate()
    assert stored is not None
    assert own.open(stored, [own.public])[0] == coins
    with pytest.raises(CryptoError):
        stranger.open(stored, [own.public])
    other = PrivacyLedger(branch.office.ledger, ledger.epsilon, ledger.delta, stranger)  # after a rotation of keys
    assert other.reserve("first", 1, "request", EVENT).coins != coins
    assert other.events() == [EVENT] * 2, "coins that cannot be read any more are not drawn anew for nothing"


def test_a_retry_that_succeeds_releases_the_round(tmp_path: Path, tiny_llama: Path) -> None:
    office, stop = office_of(tmp_path, tiny_llama), threading.Event()
    request = office.request()
    honest, client_site = client.site.train_round, pytest.MonkeyPatch()
    client_site.setattr(client.site, "train_round", lambda *_: (_ for _ in ()).throw(Cancelled("nobody waits")))
    with pytest.raises(Cancelled):
        office.site.handle(request, stop)
    client_site.undo()
    assert client.site.train_round is honest
    reply = office.restart().handle(request)
    assert isinstance(read(reply), TrainReply)
    assert office.restart().handle(request) == reply
    assert len(office.events()) == 1
