"""How messages reach sites: plain inside one process; over a network signed, sealed, and to the roster alone."""

import time
from collections.abc import Callable
from typing import Protocol

from flwr.serverapp import Grid

from fedllm import envelope
from fedllm.crypto import Identity, PublicIdentity
from fedllm.envelope import Binding
from fedllm.errors import MessageError
from fedllm.plan import RunPlan
from server.federation import Member


def arrived(data: bytes | str) -> bytes:
    """Return an answer; raises MessageError where there is only text that says why there is none."""
    if isinstance(data, str):
        raise MessageError(data)
    return data


class Channel(Protocol):
    """What the round loop needs to know of the way to the sites."""

    sites_may_come_back: bool  # those that are away, or whose service is down: worth waiting for

    def nodes(self) -> dict[int, str | None]:
        """Return the nodes that are online and may take part, and the site behind each where that is certain."""
        ...

    def seal(self, node: int, round_: int, payload: bytes) -> bytes:
        """Return `payload` as it travels to a node."""
        ...

    def open(self, node: int, data: bytes) -> bytes:
        """Return the answer of a node to what was last sealed for it; raises FedllmError where it is not that."""
        ...

    def identities(self, node: int) -> tuple[PublicIdentity, ...] | None:
        """Return who may sign for the site behind a node; None where only its first signature can tell."""
        ...


class PlainChannel:
    """Bytes as they are, every node welcome: for sites in head office's own process."""

    sites_may_come_back = False

    def __init__(self, grid: Grid) -> None:
        self._grid = grid

    def nodes(self) -> dict[int, str | None]:
        return dict.fromkeys(self._grid.get_node_ids())

    def seal(self, node: int, round_: int, payload: bytes) -> bytes:
        del node, round_
        return payload

    def open(self, node: int, data: bytes) -> bytes:
        del node
        return data

    def identities(self, node: int) -> tuple[PublicIdentity, ...] | None:
        del node
        return None


class SealedChannel:
    """Envelopes to the sites of a roster, which is asked anew on every use: a revoked site is out at once."""

    sites_may_come_back = True

    def __init__(
        self,
        online: Callable[[], dict[int, str]],
        identity: Identity,
        member_of: Callable[[str], Member | None],
        plan: RunPlan,
    ) -> None:
        """`online` returns the nodes that are there with the names of their sites.

        `member_of` finds a site in the roster, None where it is not there.
        """
        self._online, self._identity, self._member_of, self._plan = online, identity, member_of, plan
        self._number = 0
        self._sites: dict[int, str] = {}  # of all nodes that were online
        self._sent: dict[int, Binding] = {}  # what an answer of each node must be bound to

    def nodes(self) -> dict[int, str | None]:
        """Return the online nodes of sites in the roster, with the sites' names."""
        online = self._online()
        self._sites |= online
        return {node: site for node, site in online.items() if self._member_of(site) is not None}

    def seal(self, node: int, round_: int, payload: bytes) -> bytes:
        """Seal `payload` to the site behind a node."""
        # grows over restarts of head office too: sites refuse a number that does not
        self._number = max(self._number + 1, time.time_ns())
        binding = Binding(
            direction="to-site", run=self._plan.run, plan=self._plan.digest, round=round_, number=self._number
        )
        sealed = envelope.seal(payload, binding, self._identity, self._member(node).public)
        answer = {"direction": "to-head-office", "request": envelope.digest(sealed)}
        self._sent[node] = binding.model_copy(update=answer)
        return sealed

    def open(self, node: int, data: bytes) -> bytes:
        """Open what a node answered to the last request; raises MessageError or CryptoError where it is not that."""
        expected = self._sent[node]
        binding, payload, _ = envelope.open_sealed(data, self._identity, self._member(node).identities)
        if binding != expected:
            differs = [name for name in Binding.model_fields if getattr(binding, name) != getattr(expected, name)]
            raise MessageError(f"an answer to something else ({', '.join(differs)})")
        return payload

    def identities(self, node: int) -> tuple[PublicIdentity, ...]:
        """Return the identities that the roster holds for the site behind a node."""
        return self._member(node).identities

    def _member(self, node: int) -> Member:
        member = self._member_of(self._sites[node])
        if member is None:
            raise MessageError("the site was revoked")
        return member
