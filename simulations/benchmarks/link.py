"""What an exchange over the link costs: the real daemon, real keys and certificates, and sites that answer at once.

    python -m simulations.benchmarks.link 3 100000        sites, bytes each way
    python -m simulations.benchmarks.link 1000 0          nothing is sent: what idle links cost

Prints the time of an exchange with all sites, and the processor time and memory of the daemon and of the run's process.
"""

import asyncio
import json
import os
import secrets
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import typer
from flwr.app import ConfigRecord, Message, RecordDict

from client.link import SiteLink, outside
from fedllm.crypto import certificates
from fedllm.crypto.identity import Identity
from fedllm.files import write_secret
from fedllm.ops.tls_probe import ONLY_TLS_1_3
from fedllm.protocol.enrolment import now
from fedllm.protocol.messages import ENVELOPE_KEY, ENVELOPE_RECORD
from server import federation
from server.grpc_grid import GrpcGrid, node_of
from server.roster import Roster, RosterEntry

_EXCHANGES, _IDLE = 15, 30.0  # how many are timed; seconds of watching idle links
_LINKS_A_PROCESS = 250
Answer = Callable[[bytes, threading.Event], bytes]


def make(folder: Path, sites: int) -> Path:
    """Make the server's folder with a roster of so many sites, and for each its identity, key and certificate."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = folder / "federation.yaml"
    settings.write_text(json.dumps({"name": "benchmark", "host": "127.0.0.1", "listen": "127.0.0.1", "port": port}))
    office = federation.init_federation(settings, folder / "head")
    members = []
    for number in range(sites):
        key, identity = certificates.make_key(), Identity.generate()
        write_secret(folder / f"{number}.identity", identity.to_bytes())
        line, place = certificates.key_line(key), folder / f"{number}"
        write_secret(place, key)
        write_secret(place.with_suffix(".pem"), certificates.certify(office.authorities[0], line, f"site-{number}", 30))
        members.append(RosterEntry(
            site=f"site-{number}", identity=identity.public.to_text(), link_key=line, serving_key=line,
            admitted_at=now(),
        ))  # fmt: skip
    write_secret(office.roster_file, Roster(members=tuple(members)).model_dump_json().encode())
    return office.folder


async def answering(folder: Path, address: str, first: int, count: int, answer_of: Callable[[int], Answer]) -> None:
    """Keep the links of so many sites from the first on; `answer_of` says how a site answers, by its number."""
    ca, stop = folder / "head" / "keys" / "ca.pem", asyncio.Event()
    links = [
        SiteLink(*outside(address, ca, folder / f"{n}"), answer_of(n), 1 << 30, folder / f"{n}.json")
        for n in range(first, first + count)
    ]
    await asyncio.gather(*(link.run(stop) for link in links))


def _echo(_: int) -> Answer:
    return lambda request, stop: request


def used(*processes: psutil.Process) -> float:
    """Return the processor time that processes have used so far, seconds."""
    return sum(times.user + times.system for times in (process.cpu_times() for process in processes))


@dataclass(frozen=True)
class Running:
    """A daemon, and the processes of the links."""

    office: federation.HeadOffice
    daemon: psutil.Process
    links: list[psutil.Process]


@contextmanager
def running(folder: Path, sites: int, module: str, links_a_process: int) -> Iterator[Running]:
    """Make a federation and run its daemon; `python -m module links ...` are the sites, some to a process."""
    office = federation.HeadOffice.open(make(folder, sites))
    commands = [["fedllm.cli", "server", "start", "--home", str(office.folder)]]
    for first in range(0, sites, links_a_process):
        count = min(links_a_process, sites - first)
        commands.append([module, "links", str(folder), f"127.0.0.1:{office.config.port}", str(first), str(count)])
    started = [subprocess.Popen([sys.executable, "-m", *words], stdout=subprocess.DEVNULL) for words in commands]
    try:
        daemon, *links = (psutil.Process(process.pid) for process in started)
        yield Running(office, daemon, links)
    finally:
        for process in started:
            process.terminate()
        for process in started:
            process.wait()


def connected(grid: GrpcGrid, sites: int) -> None:
    """Wait until so many sites are connected."""
    while len(grid.sites()) < sites:
        time.sleep(0.2)


def measure(sites: int, size: int) -> dict[str, float]:
    """Return what an exchange of `size` bytes each way with all sites costs; of idle links where it is 0."""
    with (
        tempfile.TemporaryDirectory() as name,
        running(Path(name), sites, "simulations.benchmarks.link", _LINKS_A_PROCESS) as made,
        GrpcGrid(made.office.socket, 1 << 30) as grid,
    ):
        daemon, me = made.daemon, psutil.Process()
        connected(grid, sites)
        if not size:
            before = used(daemon)
            time.sleep(_IDLE)
            core = (used(daemon) - before) / _IDLE
            return {"daemon, share of a core": core, "daemon, MB": daemon.memory_info().rss / 1e6}
        seconds, daemon_s, run_s = [], [], []
        for _ in range(_EXCHANGES):
            content = [
                RecordDict({ENVELOPE_RECORD: ConfigRecord({ENVELOPE_KEY: secrets.token_bytes(size)})})
                for _ in range(sites)
            ]
            messages = [Message(each, node_of(f"site-{n}"), "query", ttl=600) for n, each in enumerate(content)]
            began, before, mine = time.monotonic(), used(daemon), used(me)
            replies = list(grid.send_and_receive(messages))
            seconds.append(time.monotonic() - began)
            daemon_s.append(used(daemon) - before)
            run_s.append(used(me) - mine)
            if any(reply.has_error() for reply in replies):
                raise RuntimeError("an exchange had no answer")
        return {
            "exchange, s": statistics.median(seconds), "most, s": max(seconds),
            "daemon, CPU s": statistics.median(daemon_s), "daemon, MB": daemon.memory_info().rss / 1e6,
            "run's process, CPU s": statistics.median(run_s), "run's process, MB": me.memory_info().rss / 1e6,
        }  # fmt: skip


def main(sites: int, size: int) -> None:
    """Measure and print."""
    for what, value in measure(sites, size).items():
        print(f"{what:<24}{value:10.4f}")


if __name__ == "__main__":
    os.umask(0o077)
    os.environ.update(ONLY_TLS_1_3)
    if sys.argv[1] == "links":
        asyncio.run(answering(Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]), int(sys.argv[5]), _echo))
    else:
        typer.run(main)
