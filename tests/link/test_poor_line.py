"""A round over a poor line: 200 ms of delay, 1 % of the packets lost, 5 Mbit/s."""

import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from fedllm import crypto
from fedllm.crypto import Identity
from fedllm.files import write_secret
from fedllm.messages import KEY, RECORD
from fedllm.provision import now
from server import federation
from server.federation import Member, Roster
from server.grpc_grid import GrpcGrid, look, node_of
from tests.deployment.harness import HeadOffice, until
from tests.deployment.network import HEAD, Network, why_not

pytestmark = [pytest.mark.soak, pytest.mark.timeout(1800)]

OFFICE, VALUES = "office", 1_000_000
ADDRESSES = {HEAD: "10.78.0.1", OFFICE: "10.78.0.2"}
EXCHANGES = ((20_000, 5_000), (4 * VALUES, 2 * VALUES), (2_000, 2_000))  # bytes down and up: prepare, train, reveal
BITS = 5_000_000  # a second


def test_a_round_of_a_million_values_completes_over_a_poor_line(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    if reason := why_not():
        pytest.skip(reason)
    with Network(ADDRESSES) as network:
        # the delay one way, so that it is that of a round trip, too; loss and rate both ways
        if reason := network.make_poor(OFFICE, "delay", "100ms", "loss", "1%", "rate", "5mbit"):
            pytest.skip(f"this kernel has no netem: {reason}")
        head = HeadOffice(tmp_path, ADDRESSES[HEAD], network.prefix(HEAD), port=9092)
        key = tmp_path / "link"
        write_secret(key, crypto.make_key())
        line = crypto.key_line(key.read_bytes())
        issued = crypto.certify(head.office.authorities[0], line, OFFICE, 30)
        write_secret(key.with_suffix(".pem"), issued)
        identity = Identity.generate().public.to_text()
        member = Member(site=OFFICE, identity=identity, link_key=line, serving_key=line, admitted_at=now())
        federation._write_roster(head.home, Roster(members=(member,)))
        site = [*network.prefix(OFFICE), sys.executable, "-m", "tests.link.poor_site"]
        place = [f"{ADDRESSES[HEAD]}:9092", str(head.office.ca_file), str(key)]
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
                    record = RecordDict({RECORD: ConfigRecord({KEY: data})})
                    [reply] = grid.send_and_receive([Message(record, node_of(OFFICE), "query", ttl=1200)], timeout=1200)
                    assert not reply.has_error()
                    found = reply.content.config_records[RECORD][KEY]
                    assert isinstance(found, bytes)
                    assert found == (data[8:] * 2)[:up]
                seconds = time.monotonic() - began
                assert look(head.socket).connected[0].since == since, "one connection was enough"
        finally:
            if process is not None:
                process.terminate()
                process.wait(60)
            head.stop()
    least = 8 * sum(down + up for down, up in EXCHANGES) / BITS
    record_property("seconds", round(seconds, 1))
    record_property("seconds at the line's rate", round(least, 1))
    sys.stderr.write(f"a round of {VALUES:,} values: {seconds:.1f} s; at the line's rate {least:.1f} s\n")
