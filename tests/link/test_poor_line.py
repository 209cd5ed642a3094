"""A round over a poor line: 200 ms for a round trip, 1 % of the packets lost, 5 Mbit/s.

The line is made here, between two TUN devices: few kernels have tc-netem(8).
"""

import fcntl
import heapq
import os
import random
import secrets
import select
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from fedllm.crypto import certificates
from fedllm.crypto.identity import Identity
from fedllm.files import write_secret
from fedllm.protocol.enrolment import now
from fedllm.protocol.messages import ENVELOPE_KEY, ENVELOPE_RECORD
from server import federation
from server.grpc_grid import GrpcGrid, look, node_of
from server.roster import Roster, RosterEntry
from tests.deployment.harness import HeadOffice, until
from tests.deployment.network import HEAD, Network, do, why_not

pytestmark = [pytest.mark.soak, pytest.mark.timeout(1800)]

OFFICE, VALUES = "office", 1_000_000
ADDRESSES = {HEAD: "10.78.0.1", OFFICE: "10.78.0.2"}
POOR = {HEAD: "10.79.0.1", OFFICE: "10.79.0.2"}  # of the same machines, over the poor line
EXCHANGES = ((20_000, 5_000), (4 * VALUES, 2 * VALUES), (2_000, 2_000))  # bytes down and up: prepare, train, reveal
DELAY, LOSS, BITS, QUEUE = 0.1, 0.01, 5_000_000, 1000  # seconds one way; share; a second; packets
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000  # linux/if_tun.h


class PoorLine(threading.Thread):
    """Carries packets between the devices of two namespaces as a poor line would."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self._over, self._ends = threading.Event(), [network.inside(name, _tun) for name in POOR]
        for name, address in POOR.items():
            ip = network.prefix(name)
            do(*ip, "ip", "address", "add", f"{address}/24", "dev", "poor")
            do(*ip, "ip", "link", "set", "poor", "up")
        self.start()

    def run(self) -> None:
        free, waiting, number = [0.0, 0.0], Counter[int](), 0
        under_way: list[tuple[float, int, int, bytes]] = []
        while not self._over.is_set():
            pause = under_way[0][0] - time.monotonic() if under_way else 0.1
            ready, _, _ = select.select(self._ends, [], [], min(0.1, max(0.0, pause)))
            now = time.monotonic()
            for end in ready:
                packet, side = os.read(end, 1 << 16), self._ends.index(end)
                if random.random() >= LOSS and waiting[side] < QUEUE:
                    free[side] = max(now, free[side]) + 8 * len(packet) / BITS
                    number, waiting[side] = number + 1, waiting[side] + 1
                    heapq.heappush(under_way, (free[side] + DELAY, number, side, packet))
            while under_way and under_way[0][0] <= now:
                _, _, side, packet = heapq.heappop(under_way)
                waiting[side] -= 1
                os.write(self._ends[1 - side], packet)

    def stop(self) -> None:
        self._over.set()
        self.join()
        for end in self._ends:
            os.close(end)


def _tun() -> int:
    device = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH22x", b"poor", _IFF_TUN | _IFF_NO_PI))
    return device


def test_a_round_of_a_million_values_completes_over_a_poor_line(tmp_path: Path) -> None:
    if reason := why_not():
        pytest.skip(reason)
    if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        pytest.skip("this machine has no TUN devices")
    with Network(ADDRESSES) as network:
        line = PoorLine(network)
        head = HeadOffice(tmp_path, POOR[HEAD], network.prefix(HEAD), port=9092)
        key = tmp_path / "link"
        write_secret(key, certificates.make_key())
        own = certificates.key_line(key.read_bytes())
        issued = certificates.certify(head.office.authorities[0], own, OFFICE, 30)
        write_secret(key.with_suffix(".pem"), issued)
        identity = Identity.generate().public.to_text()
        member = RosterEntry(site=OFFICE, identity=identity, link_key=own, serving_key=own, admitted_at=now())
        federation._write_roster(head.home, Roster(members=(member,)))
        site = [*network.prefix(OFFICE), sys.executable, "-m", "tests.link.poor_site"]
        place = [f"{POOR[HEAD]}:9092", str(head.office.ca_file), str(key)]
        process = None
        try:
            head.start()
            process = subprocess.Popen([*site, *place], cwd=Path(__file__).parents[2], env=dict(os.environ))
            with GrpcGrid(head.socket, 1 << 28) as grid:
                until(lambda: node_of(OFFICE) in grid.get_node_ids(), what="the connection")
                since = look(head.socket).connected[0].since
                began = time.monotonic()
                for down, up in EXCHANGES:
                    data = up.to_bytes(8, "big") + secrets.token_bytes(down - 8)
                    record = RecordDict({ENVELOPE_RECORD: ConfigRecord({ENVELOPE_KEY: data})})
                    [reply] = grid.send_and_receive([Message(record, node_of(OFFICE), "query", ttl=1200)], timeout=1200)
                    assert not reply.has_error()
                    found = reply.content.config_records[ENVELOPE_RECORD][ENVELOPE_KEY]
                    assert isinstance(found, bytes)
                    assert found == (data[8:] * 2)[:up]
                seconds = time.monotonic() - began
                assert look(head.socket).connected[0].since == since, "one connection was enough"
        finally:
            if process is not None:
                process.terminate()
                process.wait(60)
            head.stop()
            line.stop()
    least = 8 * sum(down + up for down, up in EXCHANGES) / BITS
    sys.stderr.write(f"a round of {VALUES:,} values: {seconds:.1f} s; at the line's rate {least:.1f} s\n")
