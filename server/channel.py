"""How messages reach sites: plain inside one process; over a network signed, sealed, and to the roster alone."""

import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING

from fedllm.crypto.identity import Identity, PublicIdentity
from fedllm.crypto.primitives import KEY, random_bytes
from fedllm.errors import CryptoError, MessageError
from fedllm.plan import RunPlan
from fedllm.protocol import sealed_envelope
from fedllm.protocol.messages import ENVELOPE_KEY, ENVELOPE_RECORD
from fedllm.protocol.sealed_envelope import Binding
from server.roster import RosterEntry

if TYPE_CHECKING:
    from flwr.app import RecordDict
    from flwr.serverapp import Grid

PATIENCE = 15.0  # seconds for latecomers, where enough are there
_POLL, _POLL_MAX = 0.005, 0.05  # seconds between looks at the transport's inbox
Opener = Callable[[bytes], bytes]
Sealer = Callable[[bytes], tuple[bytes, Opener]]


def arrived(data: bytes | str) -> bytes:
    """Return an answer; raises MessageError if there is only text that says why there is none."""
    if isinstance(data, str):
        raise MessageError(data)
    return data


class Channel(ABC):
    """The way to the sites over a Flower Grid, which the round loop knows nothing of."""

    sites_may_come_back: bool  # those that are away, or whose service is down: worth waiting for

    def __init__(self, grid: "Grid", timeout: float, expected_sites: int) -> None:
        """No answer is waited for longer than `timeout` seconds."""
        self._grid, self._timeout, self.expected_sites = grid, timeout, expected_sites

    @abstractmethod
    def nodes(self) -> dict[int, str | None]:
        """Return the nodes that are online and may take part, and the site behind each where that is certain."""

    @abstractmethod
    def identities(self, node: int) -> tuple[PublicIdentity, ...] | None:
        """Return who may sign for the site behind a node; None if only its first signature can tell."""

    @abstractmethod
    def sealer(self, node: int, round_: int) -> Sealer:
        """Return what makes a payload as it travels to a node, and what opens the answer to it; the same each time.

        Making raises MessageError if the node may have none; opening raises FedllmError if it is not that answer.
        """

    def exchange(
        self, payloads: Mapping[int, bytes], kind: str, round_: int, enough: int | None = None
    ) -> Iterator[tuple[int, bytes | str] | None]:
        """Send every node its payload and yield (node, answer) as answers come in; text says why there is none.

        A payload is looked up when it is sent, perhaps again, and from another thread. Once `enough` have answered, the
        others have little time left. Yields None before every look at the inbox: there is time for something else.
        """
        from flwr.app import Message  # late: who reads what runs have left needs no Flower

        from server.grid import OneRunGrid, Request, envelope

        waiting, openers, silent = dict[str, int](), dict[int, Opener](), dict.fromkeys(payloads, "no answer in time")

        def sealed(node: int, sealer: Sealer) -> bytes:
            data, openers[node] = sealer(payloads[node])
            return data

        for node in payloads:
            try:
                self.identities(node)
                make = partial(sealed, node, self.sealer(node, round_))
                message = (
                    Request(make, node, kind, self._timeout)
                    if isinstance(self._grid, OneRunGrid)
                    else Message(envelope(make()), node, kind, ttl=self._timeout)
                )
            except MessageError as error:  # revoked a moment ago
                silent[node] = str(error)
                continue
            waiting.update(dict.fromkeys(self._grid.push_messages([message]), node))
        deadline, pause = time.monotonic() + self._timeout, _POLL
        answered = 0
        try:
            while waiting and time.monotonic() < deadline:
                yield None
                replies = deque(self._grid.pull_messages(list(waiting)))
                pause = _POLL if replies else min(1.5 * pause, _POLL_MAX)
                while replies:
                    reply = replies.popleft()  # and with it goes what it holds
                    node = waiting.pop(reply.metadata.reply_to_message_id)
                    del silent[node]
                    answered += 1
                    if answered == enough:
                        deadline = min(deadline, time.monotonic() + PATIENCE)
                    yield node, self._fault(node) if reply.has_error() else _open(openers.pop(node), reply.content)
                time.sleep(pause if waiting else 0)
        finally:
            if isinstance(self._grid, OneRunGrid):
                self._grid.forget(waiting)
        yield from silent.items()

    def _fault(self, node: int) -> str:
        """Return why there is an error instead of an answer; its own text may be anything, and is not used."""
        try:
            self.identities(node)
        except MessageError as error:  # revoked since it was asked
            return str(error)
        return "a fault at the site"


def _open(opener: Opener, content: "RecordDict") -> bytes | str:
    """Return the answer, taken out of a transport's envelope; text says why it cannot be used."""
    record = content.config_records.get(ENVELOPE_RECORD)
    # taken out: Flower's records are in a cycle of references, which may be there for long
    value = record.pop(ENVELOPE_KEY, None) if record is not None else None
    try:
        return opener(value if isinstance(value, bytes) else b"")
    except (MessageError, CryptoError) as error:
        return str(error)


class PlainChannel(Channel):
    """Bytes as they are, every node welcome: for sites in the server's own process."""

    sites_may_come_back = False

    def nodes(self) -> dict[int, str | None]:
        """Return all nodes that are there."""
        return dict.fromkeys(self._grid.get_node_ids())

    def identities(self, node: int) -> tuple[PublicIdentity, ...] | None:
        """Return nothing: who signs first for a site goes on signing."""
        del node
        return None

    def sealer(self, node: int, round_: int) -> Sealer:
        """Return what leaves a payload as it is; the answer, too."""
        del node, round_
        return lambda payload: (payload, bytes)


class SealedChannel(Channel):
    """Envelopes to the sites of a roster, which is asked anew on every use: a revoked site is out at once."""

    sites_may_come_back = True

    def __init__(
        self, grid: "Grid", timeout: float, expected_sites: int, online: Callable[[], dict[int, str]],
        identity: Identity, member_of: Callable[[str], RosterEntry | None], plan: RunPlan,
    ) -> None:  # fmt: skip
        """`online` returns the nodes that are there with the names of their sites.

        `member_of` finds a site in the roster, None if it is not there.
        """
        super().__init__(grid, timeout, expected_sites)
        self._online, self._identity, self._member_of, self._plan = online, identity, member_of, plan
        self._number = 0
        self._sites: dict[int, str] = {}  # of all nodes that were online

    def nodes(self) -> dict[int, str | None]:
        """Return the online nodes of sites in the roster, with the sites' names."""
        online = self._online()
        self._sites |= online
        return {node: site for node, site in online.items() if self._member_of(site) is not None}

    def identities(self, node: int) -> tuple[PublicIdentity, ...]:
        """Return the identities that the roster holds for the site behind a node."""
        return self._member(node).identities

    def sealer(self, node: int, round_: int) -> Sealer:
        """Return what seals to the site behind a node; only what that site answers to it is opened.

        Sealed again, the same payload gives the same bytes, which the site takes for the same request: it works once.
        """
        # grows over restarts of the server too: sites refuse a number that does not
        number = self._number = max(self._number + 1, time.time_ns())
        binding = Binding(direction="to-site", run=self._plan.run, plan=self._plan.digest, round=round_, number=number)
        return partial(self._seal, node, binding, random_bytes(KEY))

    def _seal(self, node: int, binding: Binding, seed: bytes, payload: bytes) -> tuple[bytes, Opener]:
        sealed = sealed_envelope.seal(payload, binding, self._identity, self._member(node).public, seed)
        answer = {"direction": "to-head-office", "request": sealed_envelope.digest(sealed)}
        expected = binding.model_copy(update=answer)

        def opened(data: bytes) -> bytes:
            found, plain, _ = sealed_envelope.open_sealed(data, self._identity, self._member(node).identities)
            if found != expected:
                differs = [name for name in Binding.model_fields if getattr(found, name) != getattr(expected, name)]
                raise MessageError(f"an answer to something else ({', '.join(differs)})")
            return plain

        return sealed, opened

    def _member(self, node: int) -> RosterEntry:
        member = self._member_of(self._sites[node])
        if member is None:
            raise MessageError("the site was revoked")
        return member
