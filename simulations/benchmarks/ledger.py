"""What the privacy ledger costs a round: a budget check and a reservation with a long history, on this disk.

python -m simulations.benchmarks.ledger --events 10000
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from fedllm.crypto.identity import Identity
from fedllm.errors import BudgetExceeded
from fedllm.privacy.accounting import AccountingEvent
from fedllm.privacy.ledger import PrivacyLedger, fingerprint
from fedllm.privacy.ledger_place import LedgerPlace

_EVENT = AccountingEvent(0.01, 4.0, 1)
_RUNS = 20  # that the events come from: RDP decides


def measure(
    events: Annotated[int, typer.Option(min=1, help="Rounds in the ledger before anything is timed.")] = 10_000,
    repeats: Annotated[int, typer.Option(min=2, help="Calls to time.")] = 100,
    records: Annotated[int, typer.Option(min=1, help="Records of the data set.")] = 10_000,
    folder: Annotated[
        Path | None, typer.Option(help="Where the ledger lies; a folder on the disk in question.")
    ] = None,
) -> None:
    """Fill a ledger with charges, then time checks, refusals, reservations and releases."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        data = fingerprint(b"record %d" % number for number in range(records))
        where, signer = LedgerPlace(Path(place) / "ledger.db", Path(place) / "keys" / "anchor"), Identity.generate()
        ledger = PrivacyLedger(where, 1e6, 1e-5, signer)
        ledger.compare(data)
        _fill(ledger, events)
        small = PrivacyLedger(where, 0.5, 1e-5, signer)

        def refuse(number: int) -> None:
            try:
                small.check(f"another {number}", _EVENT)
            except BudgetExceeded:
                return
            raise RuntimeError("the budget should be gone")

        table = Table(title=f"{events:,} events in the ledger, {repeats} calls, milliseconds")
        for column in ("call", "median", "5 % to 95 %", "most", "CPU, median"):
            table.add_column(column, justify="left" if column == "call" else "right")
        _row(table, "budget check, admitted", repeats, lambda number: ledger.check(f"another {number}", _EVENT))
        _row(table, "budget check, refused", repeats, refuse)
        _row(table, "reservation, on disk", repeats, lambda n: ledger.reserve("timed", n, "request", _EVENT))
        reserved = [ledger.reserve("timed", number, "request", _EVENT) for number in range(repeats)]
        _row(table, "release, on disk", repeats, lambda number: ledger.release(reserved[number], bytes(100_000)))
        began = time.perf_counter()
        ledger.file.verify([signer.public])
        Console().print(table)
        print(f"verification of all {ledger.file.head().number + 1:,} entries: {time.perf_counter() - began:.1f} s")


def _fill(ledger: PrivacyLedger, events: int) -> None:
    """Charge `events` rounds by the ledger's own steps, in one transaction: only the time differs."""
    with ledger.file.transaction() as db:
        for number in range(events):
            run, round_ = f"run {number % _RUNS}", number // _RUNS + 1
            ledger.charge(db, run, round_, "request", _EVENT)


def _row(table: Table, name: str, repeats: int, call: Callable[[int], object]) -> None:
    times, work = [], []
    for number in range(repeats):
        began, busy = time.perf_counter(), time.process_time()
        call(number)
        times.append(1000 * (time.perf_counter() - began))
        work.append(1000 * (time.process_time() - busy))
    cuts = statistics.quantiles(times, n=20, method="inclusive")
    median, cpu = (f"{statistics.median(values):.1f}" for values in (times, work))
    table.add_row(name, median, f"{cuts[0]:.1f} to {cuts[-1]:.1f}", f"{max(times):.1f}", cpu)


if __name__ == "__main__":
    typer.run(measure)
