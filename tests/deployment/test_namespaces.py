"""A deployment over real links: a network namespace for every office, links that fail, and a look at the wire.

Head office and three offices each live in a namespace of their own, joined by a bridge in one more. While a run goes
on, one office's cable is pulled, another's packets vanish without a word and its connection is forgotten by a
firewall, and a third has a slow link. All that passes head office's link is captured.
"""

import base64
import ctypes
import json
import os
import shutil
import socket
import ssl
import struct
import subprocess
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_ssh_private_key
from numpy.typing import NDArray

from fedllm.errors import CheckpointError
from fedllm.reach import reach
from server.checkpoint import load_checkpoint
from server.rounds import CHECKPOINT, PLAN, RoundRecord
from tests.deployment.harness import Branch, HeadOffice, fedllm, records_of, settings, until

pytestmark = [pytest.mark.deployment, pytest.mark.soak, pytest.mark.timeout(600)]

T = TypeVar("T")
HEAD, PULLED, SILENT, SLOW = "head", "pulled", "silent", "slow"
OFFICES = {PULLED: "seoul-gangnam", SILENT: "busan-haeundae", SLOW: "seoul-mapo"}
ADDRESS = {HEAD: "10.77.0.1", PULLED: "10.77.0.2", SILENT: "10.77.0.3", SLOW: "10.77.0.4"}
ROUNDS = 40  # more than there is time for: it is stopped when all has been seen
ROUND_TIMEOUT = 30  # seconds: what a round waits for an office that is away
RUN = "over-links"
CANARIES = {  # planted in every office's records
    "question": "CANARY-QUESTION-8f1e 카나리아 질문", "answer": "CANARY-ANSWER-52ac 카나리아 답",
    "customer_id": "CANARY-CUSTOMER-d077",
}  # fmt: skip

# Time namespaces leave the clock of the day alone, so the SuperNode's own Python is made to misread it
_MISREAD = """
import datetime, os, sys

if any(each.endswith("flower-supernode") for each in sys.orig_argv):
    class Misread(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return super().now(tz) + datetime.timedelta(seconds=float(os.environ["SECONDS_AHEAD"]))

    datetime.datetime = Misread
"""


# ---- the network -----------------------------------------------------------------------------------------------------


def _do(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout


class Network:
    """Namespaces joined by a bridge; everything is named after this process and removed at the end."""

    def __init__(self) -> None:
        self._tag = f"fl{os.getpid()}"
        self._made: list[str] = []

    def __enter__(self) -> Self:
        try:
            wan = self._namespace("wan")
            _do("ip", "-n", wan, "link", "add", "name", "lan", "type", "bridge")
            _do("ip", "-n", wan, "link", "set", "lan", "up")
            for name, address in ADDRESS.items():
                home = self._namespace(name)
                _do("ip", "-n", wan, "link", "add", "name", name, "type", "veth", "peer", "name", "eth0", "netns", home)
                _do("ip", "-n", home, "address", "add", f"{address}/24", "dev", "eth0")
                for device in ("lo", "eth0"):
                    _do("ip", "-n", home, "link", "set", device, "up")
                self.heal(name)
                self.plug(name)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for name in reversed(self._made):  # what is inside goes with it
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True, timeout=60)

    def _namespace(self, name: str) -> str:
        _do("ip", "netns", "add", f"{self._tag}-{name}")
        self._made.append(f"{self._tag}-{name}")
        return f"{self._tag}-{name}"

    def prefix(self, name: str) -> list[str]:
        """Put before a command, it runs in the namespace."""
        return ["ip", "netns", "exec", f"{self._tag}-{name}"]

    def unplug(self, name: str) -> None:
        """Pull the cable: the other end notices."""
        _do("ip", "-n", f"{self._tag}-wan", "link", "set", name, "down")

    def plug(self, name: str) -> None:
        _do("ip", "-n", f"{self._tag}-wan", "link", "set", name, "up")

    def silence(self, name: str) -> None:
        """Let all packets vanish; neither end is told."""
        _do("ip", "-n", f"{self._tag}-wan", "link", "set", name, "nomaster")

    def heal(self, name: str) -> None:
        _do("ip", "-n", f"{self._tag}-wan", "link", "set", name, "master", "lan")

    def slow_down(self, name: str, rate: str) -> bool:
        """Limit a link in both directions; False where this kernel cannot."""
        limit = ["root", "tbf", "rate", rate, "burst", "16kb", "latency", "500ms"]
        try:
            _do(*self.prefix(name), "tc", "qdisc", "add", "dev", "eth0", *limit)
            _do(*self.prefix("wan"), "tc", "qdisc", "add", "dev", name, *limit)
        except (OSError, subprocess.CalledProcessError):
            return False
        return True

    def forget(self, name: str) -> bool:
        """Drop at head office, for ever, what belongs to an office's present connections, as a firewall does that has
        forgotten them; new ones pass. False where there is no nft."""
        if shutil.which("nft") is None:
            return False
        head = self.prefix(HEAD)
        ports = self.ports_to_head(name)
        assert ports
        _do(*head, "nft", "add table inet gone; add chain inet gone in { type filter hook input priority 0; }")
        for port in ports:
            _do(*head, "nft", f"add rule inet gone in ip saddr {ADDRESS[name]} tcp sport {port} drop")
        return True

    def sockets(self, name: str, *options: str) -> list[str]:
        return _do(*self.prefix(name), "ss", *options).splitlines()

    def ports_to_head(self, name: str) -> set[int]:
        """The local ports of an office's connections to head office."""
        lines = [line.split() for line in self.sockets(name, "-Htn")]
        return {int(line[3].rpartition(":")[2]) for line in lines if ADDRESS[HEAD] in line[4]}  # it may be ::ffff:

    def inside(self, name: str, call: Callable[[], T]) -> T:
        """Call a function in a thread that lives in the namespace; its sockets stay there."""
        found: list[T] = []
        failed: list[BaseException] = []

        def run() -> None:
            try:
                with Path(f"/run/netns/{self._tag}-{name}").open("rb") as place:
                    if ctypes.CDLL(None, use_errno=True).setns(place.fileno(), 0) != 0:
                        raise OSError(ctypes.get_errno(), "setns")
                found.append(call())
            except BaseException as error:
                failed.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        if failed:
            raise failed[0]
        return found[0]


def _why_not() -> str | None:
    """Why there can be no network here, None where there can."""
    if os.geteuid() != 0:
        return "only root may make network namespaces"
    missing = [tool for tool in ("ip", "ss") if shutil.which(tool) is None]
    if missing:
        return f"{missing[0]} is not installed (package iproute2)"
    probe = f"fl{os.getpid()}-probe"
    try:
        _do("ip", "netns", "add", probe)
        _do("ip", "-n", probe, "link", "add", "name", "one", "type", "veth", "peer", "name", "two")
        _do("ip", "-n", probe, "link", "add", "name", "lan", "type", "bridge")
    except (OSError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip()
        return f"this machine permits no network namespaces with bridges: {said}"
    finally:
        subprocess.run(["ip", "netns", "delete", probe], check=False, capture_output=True, timeout=60)
    return None


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
    before: int = 0  # the last round before two offices were cut off
    healed: int = 0  # the last round before they could come back
    adapters: list[NDArray[np.float32]] = field(default_factory=list)  # as head office had them during the run
    listening: dict[str, set[str]] = field(default_factory=dict)
    seconds_until_back: float = 0.0

    def rounds(self) -> list[RoundRecord]:
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
    if reason := _why_not():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("n")
    with Network() as network:
        head = HeadOffice(folder, ADDRESS[HEAD], network.prefix(HEAD), fleet_port=9092, control_port=9000)
        branches = {}
        for name, like in OFFICES.items():
            records = _with_canaries(folder / f"{name}.jsonl", like)
            branches[name] = Branch(folder, name, records, network.prefix(name))
            branches[name].join(head)
        capture = network.inside(HEAD, lambda: Capture("eth0"))
        told = Story(network, head, branches, capture)
        programs = [head.program, *(branch.program for branch in branches.values())]
        try:
            head.start()
            for branch in branches.values():
                branch.start()
            told.slowed = network.slow_down(SLOW, "2mbit")
            _tell(told)
            yield told
        finally:
            for program in programs:
                program.stop()
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
    healed = time.monotonic()
    back = f"{PULLED} and {SILENT} again"
    story.wait(lambda: gone <= set(story.rounds()[-1].answered), back)
    story.seconds_until_back = time.monotonic() - healed
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
    text = story.branches[SILENT].program.text()
    assert "SuperNode is started again: head office can be reached, but its connection is dead" in text
    assert "started again" not in story.branches[SLOW].program.text()


def test_an_office_with_a_slow_link_takes_part(story: Story) -> None:
    if not story.slowed:
        pytest.skip("this kernel cannot limit the rate of a link (tc tbf)")
    assert sum(SLOW in record.answered for record in story.rounds()[1:]) >= 2


def test_only_the_fleet_api_listens_on_an_address_that_others_can_reach(story: Story) -> None:
    fleet = f"{ADDRESS[HEAD]}:9092"
    assert fleet in story.listening[HEAD]
    assert "127.0.0.1:9000" in story.listening[HEAD]
    for name, addresses in story.listening.items():
        outside = {address for address in addresses if not address.startswith(("127.0.0.1:", "[::1:"))}
        assert outside == ({fleet} if name == HEAD else set()), name


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
    story.network.inside(SLOW, lambda: reach(ADDRESS[HEAD], 9092, ca))  # raises where h2 is not chosen

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


def test_the_superlink_learns_nothing_but_sizes(story: Story) -> None:
    markers = _markers(story) | {"name of the run": RUN.encode()}
    markers |= {f"name of {name}": f'"{name}"'.encode() for name in OFFICES}
    places = [*(story.head.home / "flower").glob("state.db*"), story.head.home / "log" / "superlink.log"]
    found = {path.name: path.read_bytes() for path in places}
    assert b"FLS1" in b"".join(found.values())  # the sealed messages are there: what is plain would be found
    for name, data in found.items():
        _clear_of(markers, data, name)


def test_a_round_takes_no_more_of_a_link_than_docs_firewall_says(story: Story) -> None:
    size, minutes = {"down": 0, "up": 0}, (story.capture.packets[-1][0] - story.capture.packets[0][0]) / 60
    for _, packet in story.capture.packets:
        if packet[12:14] == b"\x08\x00" and ADDRESS[SLOW] in (found := _ends(packet)):
            size["up" if found[0] == ADDRESS[SLOW] else "down"] += len(packet)
    rounds, dimension = len(story.rounds()) - 1, len(story.adapters[0])  # and perhaps one that was stopped
    assert 4 * dimension * rounds < size["down"] < (4 * dimension + 10_000) * (rounds + 1) + 30_000 * (minutes + 1)
    assert 2 * dimension * rounds < size["up"] < (2 * dimension + 10_000) * (rounds + 1) + 30_000 * (minutes + 1)


def _ends(packet: bytes) -> tuple[str, str]:
    return socket.inet_ntoa(packet[26:30]), socket.inet_ntoa(packet[30:34])


@pytest.mark.parametrize(("seconds_ahead", "welcome"), [(20, False), (-60, True)])
def test_a_clock_that_is_ahead_keeps_an_office_out_and_one_a_little_behind_does_not(
    story: Story, tmp_path: Path, seconds_ahead: int, welcome: bool
) -> None:
    branch = story.branches[PULLED]
    program, log = branch.program, branch.home / "log" / "supernode.log"
    program.stop()
    said, logged = len(program.text()), len(log.read_text("utf-8"))
    (tmp_path / "sitecustomize.py").write_text(_MISREAD, "utf-8")
    program.env = {"PYTHONPATH": str(tmp_path), "SECONDS_AHEAD": str(seconds_ahead)}
    program.start()
    try:
        until(lambda: "SuperNode ID" in log.read_text("utf-8")[logged:] or "SuperNode ended" in program.text()[said:])
        assert ("SuperNode ID" in log.read_text("utf-8")[logged:]) is welcome
    finally:
        program.stop()
        program.env = {}
