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
from pathlib import Path

import psutil
import typer
from flwr.app import ConfigRecord, Message, RecordDict

from client.link import SiteLink, outside
from fedllm import crypto
from fedllm.crypto import Identity
from fedllm.files import write_secret
from fedllm.messages import KEY, RECORD
from fedllm.provision import now
from fedllm.reach import ONLY_TLS_1_3
from server import federation
from server.federation import Member, Roster
from server.grpc_grid import GrpcGrid, node_of

_EXCHANGES, _IDLE = 15, 30.0  # how many are timed; seconds of watching idle links
_LINKS_A_PROCESS = 250


def make(folder: Path, sites: int) -> Path:
    """Make head office's folder with a roster of so many sites, and for each a key and its certificate."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = folder / "federation.yaml"
    settings.write_text(json.dumps({"name": "benchmark", "host": "127.0.0.1", "listen": "127.0.0.1", "port": port}))
    office = federation.init_federation(settings, folder / "head")
    members = []
    for number in range(sites):
        key = crypto.make_key()
        line, place = crypto.key_line(key), folder / f"{number}"
        write_secret(place, key)
        write_secret(place.with_suffix(".pem"), crypto.certify(office.authorities[0], line, f"site-{number}", 30))
        members.append(Member(
            site=f"site-{number}", identity=Identity.generate().public.to_text(), link_key=line, serving_key=line,
            admitted_at=now(),
        ))  # fmt: skip
    write_secret(office.roster_file, Roster(members=tuple(members)).model_dump_json().encode())
    return office.folder


async def _links(folder: Path, address: str, first: int, count: int) -> None:
    ca = folder / "head" / "keys" / "ca.pem"

    def answer(request: bytes, stop: threading.Event) -> bytes:
        del stop
        return request

    stop = asyncio.Event()
    links = [
        SiteLink(*outside(address, ca, folder / f"{number}"), answer, 1 << 30, folder / f"{number}.json")
        for number in range(first, first + count)
    ]
    await asyncio.gather(*(link.run(stop) for link in links))


def _used(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


def measure(sites: int, size: int) -> dict[str, float]:
    """Return what an exchange of `size` bytes each way with all sites costs; of idle links where it is 0."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        home = make(folder, sites)
        office = federation.HeadOffice.open(home)
        address = f"127.0.0.1:{office.config.port}"
        command = [sys.executable, "-m", "fedllm.cli", "server", "start", "--home", str(home)]
        own = [sys.executable, "-m", "simulations.benchmarks.link"]
        started = [subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)]
        for first in range(0, sites, _LINKS_A_PROCESS):
            words = ["links", str(folder), address, str(first), str(min(_LINKS_A_PROCESS, sites - first))]
            started.append(subprocess.Popen([*own, *words], stdout=subprocess.DEVNULL))
        daemon, me = psutil.Process(started[0].pid), psutil.Process()
        try:
            with GrpcGrid(office.socket, 1 << 30) as grid:
                while len(grid.sites()) < sites:
                    time.sleep(0.2)
                if not size:
                    before = _used(daemon)
                    time.sleep(_IDLE)
                    core = (_used(daemon) - before) / _IDLE
                    return {"daemon, share of a core": core, "daemon, MB": daemon.memory_info().rss / 1e6}
                seconds, daemon_s, run_s = [], [], []
                for _ in range(_EXCHANGES):
                    content = [
                        RecordDict({RECORD: ConfigRecord({KEY: secrets.token_bytes(size)})}) for _ in range(sites)
                    ]
                    messages = [Message(each, node_of(f"site-{n}"), "query", ttl=600) for n, each in enumerate(content)]
                    began, used, mine = time.monotonic(), _used(daemon), _used(me)
                    replies = list(grid.send_and_receive(messages))
                    seconds.append(time.monotonic() - began)
                    daemon_s.append(_used(daemon) - used)
                    run_s.append(_used(me) - mine)
                    if any(reply.has_error() for reply in replies):
                        raise RuntimeError("an exchange had no answer")
                return {
                    "exchange, s": statistics.median(seconds), "most, s": max(seconds),
                    "daemon, CPU s": statistics.median(daemon_s), "daemon, MB": daemon.memory_info().rss / 1e6,
                    "run's process, CPU s": statistics.median(run_s), "run's process, MB": me.memory_info().rss / 1e6,
                }  # fmt: skip
        finally:
            for process in started:
                process.terminate()
            for process in started:
                process.wait()


def main(sites: int, size: int) -> None:
    """Measure and print."""
    for what, value in measure(sites, size).items():
        print(f"{what:<24}{value:10.4f}")


if __name__ == "__main__":
    os.umask(0o077)
    os.environ.update(ONLY_TLS_1_3)
    if sys.argv[1] == "links":
        asyncio.run(_links(Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]), int(sys.argv[5])))
    else:
        typer.run(main)
