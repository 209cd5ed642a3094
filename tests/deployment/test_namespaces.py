"""A deployment over real links: a network namespace for every site, links that fail, and a look at the wire.

The server and three sites each live in a namespace of their own, joined by a bridge in one more. While a run goes
on, one site's cable is pulled, another's packets vanish without a word and its connection is forgotten by a
firewall, and a third has a slow link. All that passes the server's link is captured.
"""

import base64
import json
import socket
import ssl
import struct
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_ssh_private_key
from numpy.typing import NDArray

from fedllm.errors import CheckpointError
from fedllm.ops.tls_probe import probe_tls
from server.checkpoint import load_checkpoint
from server.events import CHECKPOINT, PLAN, RoundMetrics
from tests.deployment.harness import Branch, HeadOffice, fedllm, records_of, settings, stop_all, until
from tests.deployment.network import HEAD, Network, why_not

pytestmark = [pytest.mark.deployment, pytest.mark.soak, pytest.mark.timeout(600)]

PULLED, SILENT, SLOW = "pulled", "silent", "slow"
OFFICES = {PULLED: "seoul-gangnam", SILENT: "busan-haeundae", SLOW: "seoul-mapo"}
ADDRESS = {HEAD: "10.77.0.1", PULLED: "10.77.0.2", SILENT: "10.77.0.3", SLOW: "10.77.0.4"}
ROUNDS = 40  # more than there is time for: it is stopped when all has been seen
ROUND_TIMEOUT = 30  # seconds: what a round waits for a site that is away
RUN = "over-links"
CANARIES = {  # planted in every site's records
    "question": "CANARY-QUESTION-8f1e 카나리아 질문", "answer": "CANARY-ANSWER-52ac 카나리아 답",
    "customer_id": "CANARY-CUSTOMER-d077",
}  # fmt: skip

# ---- the wire --------------------------------------------------------------------------------------------------------

_ETHERNET, _ETH_P_ALL, _SOL_PACKET, _PACKET_STATISTICS, _SO_RCVBUFFORCE = 14, 3, 263, 6, 33
Flow = tuple[str, int, str, int]  # from address and port, to address and port


@dataclass
class Stream:
    """One direction of a TCP connection."""

    begins: int | None = None  # sequence number of the first byte
    parts: dict[int, bytes] = field(default_factory=dict)

    def data(self) -> bytes:
        """Return the bytes from the beginning, up to the first that did not come by."""
        data = bytearray()
        if self.begins is None:
            return b""
        for offset, part in sorted(((start - self.begins) % (1 << 32), part) for start, part in self.parts.items()):
            if offset > len(data):
                break
            data += part[len(data) - offset :]
        return bytes(data)


class Capture:
    """Everything that passes one interface."""

    def __init__(self, interface: str) -> None:
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETH_P_ALL))
        self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, 64 << 20)
        self._socket.bind((interface, 0))
        self._socket.settimeout(0.2)
        self._over = threading.Event()
        self.packets: list[tuple[float, bytes]] = []
        self.lost = 0
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        while not self._over.is_set():
            try:
                self.packets.append((time.monotonic(), self._socket.recv(1 << 17)))
            except TimeoutError:
                continue

    def stop(self) -> None:
        if self._over.is_set():
            return
        self._over.set()
        self._thread.join()
        self.lost = struct.unpack("II", self._socket.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, 8))[1]
        self._socket.close()

    def streams(self) -> dict[Flow, Stream]:
        """Return both directions of every TCP connection of which the beginning was seen."""
        found: dict[Flow, Stream] = defaultdict(Stream)
        for _, packet in self.packets:
            if packet[12:14] != b"\x08\x00" or packet[23] != 6:  # IPv4, TCP
                continue
            header = _ETHERNET + 4 * (packet[_ETHERNET] & 15)
            end = _ETHERNET + int.from_bytes(packet[16:18], "big")
            ports = struct.unpack_from(">HH", packet, header)
            (sequence,) = struct.unpack_from(">I", packet, header + 4)
            data = packet[header + 4 * (packet[header + 12] >> 4) : end]
            flow = (socket.inet_ntoa(packet[26:30]), ports[0], socket.inet_ntoa(packet[30:34]), ports[1])
            if packet[header + 13] & 2:  # SYN
                found[flow] = Stream((sequence + 1) % (1 << 32))
            elif data and len(data) > len(found[flow].parts.get(sequence, b"")):
                found[flow].parts[sequence] = data
        return {flow: stream for flow, stream in found.items() if stream.begins is not None}


def tls_records(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield type and content of every whole TLS record (RFC 8446, 5.1)."""
    place = 0
    while place + 5 <= len(data):
        kind, version, length = struct.unpack_from(">BHH", data, place)
        assert kind in (20, 21, 22, 23), f"no TLS record at byte {place}"
        assert version in (0x0301, 0x0303), f"no TLS record at byte {place}"
        assert length <= (1 << 14) + 256, f"no TLS record at byte {place}"
        if place + 5 + length > len(data):
            return
        yield kind, data[place + 5 : place + 5 + length]
        place += 5 + length


def hello_extensions(message: bytes, kind: int) -> dict[int, bytes]:
    """Return the extensions of a ClientHello (kind 1) or ServerHello (kind 2) (RFC 8446, 4.1.2 and 4.1.3)."""
    assert message[0] == kind
    place = 4 + 2 + 32
    place += 1 + message[place]  # session id
    if kind == 1:
        place += 2 + int.from_bytes(message[place : place + 2], "big")  # cipher suites
        place += 1 + message[place]  # compression methods
    else:
        place += 3  # cipher suite, compression method
    end = place + 2 + int.from_bytes(message[place : place + 2], "big")
    place += 2
    found = {}
    while place < end:
        number, length = struct.unpack_from(">HH", message, place)
        found[number] = message[place + 4 : place + 4 + length]
        place += 4 + length
    return found


# ---- what happens ----------------------------------------------------------------------------------------------------


@dataclass
class Story:
    """What was done, and what can be looked at afterwards."""

    network: Network
    head: HeadOffice
    branches: dict[str, Branch]
    capture: Capture
    slowed: bool = False
    forgotten: bool = False
    before: int = 0  # the last round before two sites were cut off
    healed: int = 0  # the last round before they could come back
    adapters: list[NDArray[np.float32]] = field(default_factory=list)  # as the server had them during the run
    listening: dict[str, set[str]] = field(default_factory=dict)

    def rounds(self) -> list[RoundMetrics]:
        return self.head.rounds(RUN)

    def round(self) -> int:
        return self.rounds()[-1].round if self.rounds() else -1

    def look(self) -> None:
        """Keep the adapter of now: the next round carries it."""
        try:
            adapter = load_checkpoint(self.head.run(RUN) / CHECKPOINT).adapter
        except CheckpointError:
            return
        if not any(np.array_equal(adapter, other) for other in self.adapters):
            self.adapters.append(adapter)

    def wait(self, come_about: Callable[[], Any], what: str, seconds: float = 180.0) -> None:
        def reached() -> bool:
            self.look()
            assert self.head.status(RUN).open, f"{what}: {self.head.status(RUN)}"
            return bool(come_about())

        until(reached, seconds, what)


def _listening(network: Network, name: str) -> set[str]:
    return {line.split()[3].replace("[::ffff:", "").replace("]", "") for line in network.sockets(name, "-Hltn")}


def _with_canaries(path: Path, like: str) -> Path:
    records_of(like, path)
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    rows += [{**row, **CANARIES} for row in rows[:4]]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    if reason := why_not():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("n")
    with Network(ADDRESS) as network:
        head = HeadOffice(folder, ADDRESS[HEAD], network.prefix(HEAD), port=9092)
        branches = {}
        for name, like in OFFICES.items():
            records = _with_canaries(folder / f"{name}.jsonl", like)
            branches[name] = Branch(folder, name, records, network.prefix(name))
            branches[name].join(head)
        capture = network.inside(HEAD, lambda: Capture("eth0"))
        told = Story(network, head, branches, capture)
        try:
            head.start()
            for branch in branches.values():
                branch.start()
            told.slowed = network.slow_down(SLOW, "2mbit")
            _tell(told)
            yield told
        finally:
            stop_all([branch.program for branch in branches.values()])
            head.stop()
            capture.stop()


def _tell(story: Story) -> None:
    more = {"federation.quorum": 1, "federation.round_timeout": ROUND_TIMEOUT, "privacy.noise_multiplier": 2.0}
    done = story.head.submit(*settings(RUN, ROUNDS, **more), "--detach")
    assert done.returncode == 0, done.stdout + done.stderr
    story.wait(lambda: story.rounds() and set(story.rounds()[-1].answered) == set(OFFICES), "a round of all", 240)
    story.listening = {name: _listening(story.network, name) for name in ADDRESS}

    story.before = story.round()
    story.network.unplug(PULLED)
    story.network.silence(SILENT)
    gone = {PULLED, SILENT}
    story.wait(lambda: not gone & set(story.rounds()[-1].answered), "a round without the two")
    story.healed = story.round()
    story.forgotten = story.network.forget(SILENT)
    story.network.plug(PULLED)
    story.network.heal(SILENT)
    back = f"{PULLED} and {SILENT} again"
    story.wait(lambda: gone <= set(story.rounds()[-1].answered), back)
    stopped = fedllm("stop", RUN, "--home", str(story.head.home), prefix=story.network.prefix(HEAD))
    assert stopped.returncode == 0, stopped.stderr
    story.capture.stop()


def test_a_run_over_links_goes_on_above_the_quorum_while_two_offices_are_cut_off(story: Story) -> None:
    rounds = story.rounds()
    assert set(rounds[story.before].answered) == set(OFFICES)
    assert story.healed > story.before
    cut = rounds[story.healed]
    assert cut.answered == [SLOW]
    assert {PULLED, SILENT} <= set(cut.failed)


def test_offices_that_were_cut_off_come_back_by_themselves_and_their_ledgers_are_right(story: Story) -> None:
    assert {PULLED, SILENT} <= set(story.rounds()[-1].answered)
    for name, branch in story.branches.items():
        answered = sum(name in record.answered for record in story.rounds()[1:])
        # the round that was stopped, and one whose answer the cut took with it, were paid for too
        assert answered <= len(branch.charged()) <= story.round() + 1, name


def test_a_connection_that_a_firewall_has_forgotten_is_given_up(story: Story) -> None:
    if not story.forgotten:
        pytest.skip("nft is not installed (package nftables)")
    assert story.branches[SILENT].log.count("connected to the server") >= 2
    assert story.branches[SLOW].log.count("connected to the server") == 1


def test_an_office_with_a_slow_link_takes_part(story: Story) -> None:
    if not story.slowed:
        pytest.skip("this kernel cannot limit the rate of a link (tc tbf)")
    assert sum(SLOW in record.answered for record in story.rounds()[1:]) >= 2


def test_one_port_listens_at_head_office_and_nothing_at_an_office(story: Story) -> None:
    assert story.listening == {name: {f"{ADDRESS[HEAD]}:9092"} if name == HEAD else set() for name in ADDRESS}


def test_every_connection_is_tls_1_3_with_alpn_h2_and_carries_nothing_else(story: Story) -> None:
    assert story.capture.lost == 0
    streams = story.capture.streams()
    clients = {flow: stream.data() for flow, stream in streams.items() if flow[2:] == (ADDRESS[HEAD], 9092)}
    assert {flow[0] for flow in clients} == {ADDRESS[name] for name in OFFICES}
    assert {flow for flow in streams if 9092 not in (flow[1], flow[3])} == set()  # nothing goes another way
    seen = 0
    for flow, up in clients.items():
        back = streams.get((*flow[2:], *flow[:2]))
        if not (up and back and back.data()):  # cut before a handshake
            continue
        down = back.data()
        asked, answered = list(tls_records(up)), list(tls_records(down))
        hello, reply = hello_extensions(asked[0][1], 1), hello_extensions(answered[0][1], 2)
        assert b"\x02h2" in hello[16]  # RFC 7301
        assert reply[43] == b"\x03\x04"  # RFC 8446, 4.2.1
        for records in (asked, answered):
            assert [kind for kind, _ in records].count(22) == 1  # from the hello on, all is encrypted
            assert {kind for kind, _ in records[1:]} <= {20, 23}
        seen += len(up) + len(down)
    carried = sum(record.bytes_up + record.bytes_down for record in story.rounds() if not record.failed)
    assert seen > carried


def test_head_office_answers_nothing_older_than_tls_1_3_and_chooses_h2(story: Story) -> None:
    ca = story.head.office.ca_file
    story.network.inside(SLOW, lambda: probe_tls(ADDRESS[HEAD], 9092, ca))  # raises where h2 is not chosen

    def old() -> None:
        context = ssl.create_default_context(cafile=str(ca))
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        with socket.create_connection((ADDRESS[HEAD], 9092), timeout=10) as plain:
            context.wrap_socket(plain, server_hostname=ADDRESS[HEAD]).close()

    with pytest.raises(OSError, match=r"(?i)version|handshake|eof|reset"):
        story.network.inside(SLOW, old)


def _secrets(file: Path) -> list[bytes]:
    """Return the secret numbers in a key file."""
    data = file.read_bytes()
    if file.name == "identity":  # hex: the key that signs, the key that opens
        words = [word for word in data.decode("ascii").split() if len(word) >= 64]
        return [bytes.fromhex(word[start : start + 64]) for word in words for start in range(0, len(word) - 63, 64)]
    found = []
    for block in data.split(b"-----BEGIN ")[1:]:
        pem = b"-----BEGIN " + block
        if b"PRIVATE KEY" in pem:
            load = load_ssh_private_key if b"OPENSSH" in pem else load_pem_private_key
            key = load(pem, None)
            assert isinstance(key, EllipticCurvePrivateKey)
            found.append(key.private_numbers().private_value.to_bytes(48, "big"))
    return found


def _as_text(number: bytes) -> list[bytes]:
    """Return a number in every form in which it could be found: raw, hex, and what of its base64 does not depend on
    what stands around it, at each of three places."""
    encoded = [base64.b64encode(number[skip : skip + 24]) for skip in range(3)]
    return [number[:32], number.hex().encode()[:64], number.hex().upper().encode()[:64], *encoded]


def _markers(story: Story) -> dict[str, bytes]:
    """Return what must be found nowhere, by what it is."""
    found = {f"canary {name}": text.encode() for name, text in CANARIES.items()}
    found |= {f"canary {name}, escaped": json.dumps(text).encode()[1:-1] for name, text in CANARIES.items()}
    assert len(story.adapters) >= 2
    for number, adapter in enumerate(story.adapters):
        for start in {0, int(np.flatnonzero(adapter)[0]) if adapter.any() else 0, len(adapter) // 2}:
            for wire in ("<f4", "<f2"):
                data = adapter[start : start + 64].astype(wire).tobytes()[:64]
                if any(data):
                    found[f"adapter {number} from {start} as {wire}"] = data
    assert any("<f2" in what for what in found)
    for place in [story.head.home, *(branch.home for branch in story.branches.values())]:
        numbers = {file: _secrets(file) for pattern in ("keys/*", "keys/*/*") for file in place.glob(pattern)
                   if file.is_file()}  # fmt: skip
        assert sum(map(len, numbers.values())) >= 3  # two of the identity, and the node's or those of certificates
        for file, secrets in numbers.items():
            found |= {
                f"{file} {which}.{form}": text
                for which, number in enumerate(secrets)
                for form, text in enumerate(_as_text(number))
            }
    plan = json.loads((story.head.run(RUN) / PLAN).read_text("utf-8"))
    found |= {"run": plan["run"].encode(), "model": plan["model"]["source"].encode(), "message": b'"plan_digest"'}
    return found


def _clear_of(markers: dict[str, bytes], data: bytes, where: str) -> None:
    assert [what for what, marker in markers.items() if marker in data] == [], where


def test_the_wire_holds_none_of_the_records_adapters_keys_or_plans(story: Story) -> None:
    markers = _markers(story)
    streams = {flow: stream.data() for flow, stream in story.capture.streams().items()}
    assert any(b"\x02h2" in data for data in streams.values())  # what is plain would be found
    for flow, data in streams.items():
        _clear_of(markers, data, str(flow))
    _clear_of(markers, b"".join(packet for _, packet in story.capture.packets), "packets")


def test_the_daemon_notes_nothing_but_who_came_and_went(story: Story) -> None:
    data = (story.head.home / "log" / "server.log").read_bytes()
    assert f"{SLOW} is connected".encode() in data
    _clear_of(_markers(story), data, "server.log")


def test_a_round_takes_no_more_of_a_link_than_docs_firewall_says(story: Story) -> None:
    size, minutes = {"down": 0, "up": 0}, (story.capture.packets[-1][0] - story.capture.packets[0][0]) / 60
    for _, packet in story.capture.packets:
        if packet[12:14] == b"\x08\x00" and ADDRESS[SLOW] in (found := _ends(packet)):
            size["up" if found[0] == ADDRESS[SLOW] else "down"] += len(packet)
    rounds, dimension = len(story.rounds()) - 1, len(story.adapters[0])  # and perhaps one that was stopped
    assert 4 * dimension * rounds < size["down"] < (4 * dimension + 12_000) * (rounds + 1) + 3_000 * (minutes + 1)
    assert 2 * dimension * rounds < size["up"] < (2 * dimension + 12_000) * (rounds + 1) + 3_000 * (minutes + 1)


def _ends(packet: bytes) -> tuple[str, str]:
    return socket.inet_ntoa(packet[26:30]), socket.inet_ntoa(packet[30:34])
