"""The sealed channel: requests to the roster's sites alone, and from each only the answer to its last request."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from flwr.supercore.task_identity import TaskIdentity
from hypothesis import given
from hypothesis import strategies as st

from fedllm.crypto import certificates
from fedllm.crypto.identity import Identity
from fedllm.errors import CryptoError, FedllmError, MessageError
from fedllm.plan import RunPlan
from fedllm.protocol import sealed_envelope
from fedllm.protocol.enrolment import now
from fedllm.protocol.sealed_envelope import Binding
from fedllm.values import parse
from server.channel import Opener, PlainChannel, SealedChannel
from server.roster import Roster, RosterEntry

HEAD, STRANGER = Identity.generate(), Identity.generate()


def plan(run: str = "run-1") -> RunPlan:
    values = {
        "run": run, "seed": 1, "model": {"source": "base"}, "adapter": {}, "training": {},
        "privacy": {"mode": "off", "units_per_site": 10},
    }  # fmt: skip
    return parse(RunPlan, values)


class Office:
    """A site's keys, and how it answers."""

    def __init__(self, name: str, node: int) -> None:
        self.name, self.node, self.identity = name, node, Identity.generate()
        self._keys = [certificates.key_line(certificates.make_key()) for _ in range(2)]

    @property
    def member(self) -> RosterEntry:
        link, serving = self._keys
        return RosterEntry(
            site=self.name, identity=self.identity.public.to_text(), link_key=link, serving_key=serving,
            admitted_at=now(),
        )  # fmt: skip

    def answer(
        self, sealed: bytes, payload: bytes = b"answer", signed_by: Identity | None = None, **other: Any
    ) -> bytes:
        binding, _, sender = sealed_envelope.open_sealed(sealed, self.identity, [HEAD.public, STRANGER.public])
        back = {"direction": "to-head-office", "request": sealed_envelope.digest(sealed), **other}
        return sealed_envelope.seal(payload, binding.model_copy(update=back), signed_by or self.identity, sender)


class Nodes:
    """The part of a Grid that a channel uses."""

    def __init__(self, offices: list[Office]) -> None:
        self.online = {office.node: office.name for office in offices}

    def sites(self) -> dict[int, str]:
        return dict(self.online)

    def get_node_ids(self) -> list[int]:
        return list(self.online)


class World:
    """The server's channel, two admitted sites, and one that is not."""

    def __init__(self, run: str = "run-1") -> None:
        self.seoul, self.busan, self.other = Office("서울", 1), Office("busan", 2), Office("other", 3)
        self.roster = Roster(members=(self.seoul.member, self.busan.member))
        self.grid = Nodes([self.seoul, self.busan, self.other])
        self._openers: dict[int, Opener] = {}
        self.channel = self.another(run)
        self.channel.nodes()

    def another(self, run: str = "run-1") -> SealedChannel:
        grid: Any = self.grid
        return SealedChannel(grid, 1.0, 2, self.grid.sites, HEAD, lambda site: self.roster.find(site), plan(run))

    def seal(self, node: int, round_: int, payload: bytes) -> bytes:
        """Seal by the channel, and open what answers with `open`."""
        sealed, self._openers[node] = self.channel.sealer(node, round_)(payload)
        return sealed

    def open(self, node: int, data: bytes) -> bytes:
        """Open an answer to what was last sealed for a node."""
        return self._openers[node](data)

    def revoke(self, office: Office) -> None:
        self.roster = Roster(
            members=tuple(
                member.model_copy(update={"revoked_at": now()}) if member.site == office.name else member
                for member in self.roster.members
            )
        )


@pytest.fixture
def world() -> World:
    return World()


def test_a_site_that_has_gone_offline_can_still_be_sealed_to(world: World) -> None:
    """A message to it is made again when it is back."""
    del world.grid.online[1]
    assert world.channel.nodes() == {2: "busan"}
    sealed = world.seal(1, 1, b"request")
    assert world.open(1, world.seoul.answer(sealed)) == b"answer"


def test_only_the_rosters_sites_take_part(world: World) -> None:
    assert world.channel.nodes() == {1: "서울", 2: "busan"}
    with pytest.raises(MessageError, match="revoked"):
        world.seal(3, 1, b"request")


def test_a_request_is_sealed_to_its_site_and_bound_to_run_plan_and_round(world: World) -> None:
    sealed = world.seal(1, 4, b"request")
    binding, payload, sender = sealed_envelope.open_sealed(sealed, world.seoul.identity, [HEAD.public])
    assert (payload, sender) == (b"request", HEAD.public)
    assert (binding.direction, binding.run, binding.plan, binding.round) == ("to-site", "run-1", plan().digest, 4)
    with pytest.raises(CryptoError):
        sealed_envelope.open_sealed(sealed, world.busan.identity, [HEAD.public])


def test_numbers_grow_over_messages_channels_and_a_clock_that_stands(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def number(sealed: bytes) -> int:
        return sealed_envelope.open_sealed(sealed, world.seoul.identity, [HEAD.public])[0].number

    first = number(world.seal(1, 0, b""))
    later = world.another()
    later.nodes()
    second = number(later.sealer(1, 0)(b"")[0])
    monkeypatch.setattr("server.channel.time.time_ns", lambda: 0)
    numbers = [first, second, *(number(later.sealer(1, 0)(b"")[0]) for _ in range(3))]
    assert numbers == sorted(set(numbers))


def test_a_request_that_is_sealed_again_is_the_same_and_another_payload_is_not(world: World) -> None:
    """So a site that is asked again does not work twice; and no key ever meets two plaintexts."""
    sealer = world.channel.sealer(1, 1)
    (first, opened), (again, _), (other, _) = sealer(b"request"), sealer(b"request"), sealer(b"another")
    assert first == again
    fresh_key = slice(4, 4 + 32)
    assert first[fresh_key] != other[fresh_key]
    assert world.channel.sealer(1, 1)(b"request")[0] != first
    assert opened(world.seoul.answer(first)) == b"answer"


def test_the_answer_to_the_last_request_is_opened(world: World) -> None:
    to_seoul, to_busan = world.seal(1, 1, b"request"), world.seal(2, 1, b"request")
    assert world.open(2, world.busan.answer(to_busan, b"b")) == b"b"
    assert world.open(1, world.seoul.answer(to_seoul, b"s")) == b"s"


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"direction": "to-site"}, "direction"), ({"run": "run-2"}, "run"), ({"plan": "0" * 64}, "plan"),
        ({"round": 2}, "round"), ({"number": 1}, "number"), ({"request": ""}, "request"),
        ({"request": sealed_envelope.digest(b"")}, "request"),
    ],
)  # fmt: skip
def test_an_answer_bound_to_anything_else_is_refused_with_what_differs(
    world: World, other: dict[str, Any], said: str
) -> None:
    sealed = world.seal(1, 1, b"request")
    with pytest.raises(MessageError, match=rf"an answer to something else \({said}\)"):
        world.open(1, world.seoul.answer(sealed, **other))


def _of_the_round_before(world: World) -> bytes:
    old = world.seoul.answer(world.seal(1, 1, b"request"))
    world.seal(1, 2, b"request")
    return old


def _to_the_same_round_asked_before(world: World) -> bytes:
    old = world.seoul.answer(world.seal(1, 1, b"request"))
    world.seal(1, 1, b"request")
    return old


def _of_another_run(world: World) -> bytes:
    other = world.another("run-2")
    other.nodes()
    world.seal(1, 1, b"request")
    return world.seoul.answer(other.sealer(1, 1)(b"request")[0])


def _of_another_site(world: World) -> bytes:
    world.seal(1, 1, b"request")
    return world.busan.answer(world.seal(2, 1, b"request"))


def _signed_by_another_site(world: World) -> bytes:
    return world.seoul.answer(world.seal(1, 1, b"request"), signed_by=world.busan.identity)


def _signed_by_a_stranger(world: World) -> bytes:
    return world.seoul.answer(world.seal(1, 1, b"request"), signed_by=STRANGER)


def _signed_by_head_office(world: World) -> bytes:
    return world.seoul.answer(world.seal(1, 1, b"request"), signed_by=HEAD)


def _the_request_sent_back(world: World) -> bytes:
    return world.seal(1, 1, b"request")


def _sealed_to_a_stranger(world: World) -> bytes:
    binding = Binding(direction="to-head-office", run="run-1", plan=plan().digest, round=1, number=1)
    world.seal(1, 1, b"request")
    return sealed_envelope.seal(b"answer", binding, world.seoul.identity, STRANGER.public)


@pytest.mark.parametrize(
    "hostile",
    [
        _of_the_round_before, _to_the_same_round_asked_before, _of_another_run, _of_another_site,
        _signed_by_another_site, _signed_by_a_stranger, _signed_by_head_office, _the_request_sent_back,
        _sealed_to_a_stranger,
    ],
)  # fmt: skip
def test_what_is_not_the_sites_answer_to_its_last_request_is_refused(
    world: World, hostile: Callable[[World], bytes]
) -> None:
    data = hostile(world)
    with pytest.raises((MessageError, CryptoError)):
        world.open(1, data)


def test_an_answer_is_of_no_use_to_another_node(world: World) -> None:
    answer = world.seoul.answer(world.seal(1, 1, b"request"))
    world.seal(2, 1, b"request")
    with pytest.raises(CryptoError):
        world.open(2, answer)
    assert world.open(1, answer) == b"answer"


def test_a_site_that_is_revoked_during_the_round_is_out_at_once(world: World) -> None:
    answer = world.seoul.answer(world.seal(1, 1, b"request"))
    world.revoke(world.seoul)
    with pytest.raises(MessageError, match="the site was revoked"):
        world.open(1, answer)
    with pytest.raises(MessageError, match="the site was revoked"):
        world.seal(1, 2, b"request")
    assert world.channel.nodes() == {2: "busan"}


def test_a_site_that_is_revoked_before_its_request_is_sent_gives_no_answer_and_ends_nothing(world: World) -> None:
    world.revoke(world.seoul)
    assert list(world.channel.exchange({1: b"request"}, "train", 1)) == [(1, "the site was revoked")]


def test_while_a_site_rotates_its_keys_answers_of_both_are_used_and_requests_go_to_the_new(world: World) -> None:
    old, new = world.seoul.identity, Identity.generate()
    before = world.seal(1, 1, b"request")
    member = world.seoul.member.model_copy(
        update={"identity": new.public.to_text(), "previous_identities": (old.public.to_text(),)}
    )
    world.roster = Roster(members=(member, world.busan.member))
    assert world.open(1, world.seoul.answer(before)) == b"answer"
    sealed = world.seal(1, 2, b"request")
    with pytest.raises(CryptoError):
        sealed_envelope.open_sealed(sealed, old, [HEAD.public])
    world.seoul.identity = new
    assert world.open(1, world.seoul.answer(sealed)) == b"answer"


@given(st.binary(max_size=400))
def test_hostile_bytes_are_one_kind_of_error(data: bytes) -> None:
    world = _WORLD
    world.seal(1, 1, b"request")
    with pytest.raises(FedllmError):
        world.open(1, data)


_WORLD = World()


@given(st.data())
def test_an_altered_answer_is_refused(data: st.DataObject) -> None:
    answer = bytearray(_WORLD.seoul.answer(_WORLD.seal(1, 1, b"request")))
    answer[data.draw(st.integers(0, len(answer) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(FedllmError):
        _WORLD.open(1, bytes(answer))


@given(st.binary(max_size=200))
def test_whatever_a_known_site_signs_is_its_answer_or_refused(plain: bytes) -> None:
    _WORLD.seal(1, 1, b"request")
    with pytest.raises(MessageError):
        _WORLD.open(1, _WORLD.seoul.identity.seal(plain, HEAD.public))


def test_in_one_process_bytes_travel_as_they_are(world: World) -> None:
    grid: Any = world.grid
    plain = PlainChannel(grid, 1.0, 3)
    assert plain.nodes() == {1: None, 2: None, 3: None}
    sent, opened = plain.sealer(1, 1)(b"bytes")
    assert (sent, opened(b"answer")) == (b"bytes", b"answer")
    assert not plain.sites_may_come_back
    assert world.channel.sites_may_come_back


@pytest.mark.parametrize(("revoked", "said"), [(False, "a fault at the site"), (True, "the site was revoked")])
def test_an_error_of_the_transport_says_no_more_than_is_known_here(
    world: World, monkeypatch: pytest.MonkeyPatch, revoked: bool, said: str
) -> None:
    """Its own words may be anything, and do not enter the run's record."""
    grid: Any = world.grid
    for name in ("_run_id", "_task_id", "_node_id"):  # as a Grid of Flower sets it
        monkeypatch.setattr(TaskIdentity, name, 1)

    def push(messages: list[Any]) -> list[str]:
        if revoked:
            world.revoke(world.seoul)
        return ["id" for _ in messages]

    failed = SimpleNamespace(has_error=lambda: True, metadata=SimpleNamespace(reply_to_message_id="id"))
    grid.push_messages, grid.pull_messages = push, lambda _: [failed]
    assert [each for each in world.channel.exchange({1: b"request"}, "train", 1) if each] == [(1, said)]
