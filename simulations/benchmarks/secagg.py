"""One round of secure aggregation, fedllm's and Flower's SecAgg, side by side in one process.

python -m simulations.benchmarks.secagg --sites 16,64,100 --parameters 1000000 --dropouts 0,0.1

*fedllm* plays the whole round: every site deals, masks and reveals, every message travels as bytes, and the sum is
compared with the inputs. Client seconds are the mean over the sites that stayed. *Flower* is the same flow made of the
functions of flwr's SecAgg, as its client mod and its workflow call them, without quantisation and without its
messages: one client is timed, and at the server `--samples` of each operation, times how often the workflow does it.
Bytes of Flower are contents only: keys, ciphertexts, shares, and the vector as its mod serialises it. The threshold
is the same. The two take turns; ratios are taken within each turn. What fedllm does once a run (advertise keys, check
all of them, agree on secrets) is listed apart; Flower makes new keys in every round. The noise of privacy=distributed,
which is no part of secure aggregation and which Flower has none of, is listed apart as well.

The two do not give the same protection: Flower's masks are MT19937 from a seed of 32 bits (`pseudo_rand_gen`), and
its keys carry no signature, so it is made for a server that keeps to the protocol.
"""

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, TypeVar

import numpy as np
import typer
from flwr.common import bytes_to_ndarray, ndarray_to_bytes
from flwr.common.secure_aggregation.crypto.shamir import combine_shares, create_shares
from flwr.common.secure_aggregation.crypto.symmetric_encryption import decrypt, encrypt, generate_shared_key
from flwr.common.secure_aggregation.ndarrays_arithmetic import (
    parameters_addition,
    parameters_mod,
    parameters_subtraction,
)
from flwr.common.secure_aggregation.secaggplus_utils import (
    pseudo_rand_gen,
    share_keys_plaintext_concat,
    share_keys_plaintext_separate,
)
from flwr.supercore.primitives.asymmetric import (
    bytes_to_private_key,
    bytes_to_public_key,
    generate_key_pairs,
    private_key_to_bytes,
    public_key_to_bytes,
)
from rich.console import Console
from rich.table import Table

from fedllm import secagg
from fedllm.crypto.identity import Identity
from fedllm.privacy.distributed_noise import DistributedMechanism
from fedllm.privacy.mechanism import Mechanism
from fedllm.privacy.randomness import OsRandomness
from fedllm.protocol.messages import (
    ConsistencySignature,
    MaskedInput,
    MaskedInputRequest,
    Message,
    ShareKeysRequest,
    UnmaskingShares,
    from_bytes,
)
from simulations.benchmarks.bench import machine

_MODULUS = 1 << 32
_T = TypeVar("_T")


@dataclass(frozen=True)
class Cost:
    """What one round costs."""

    client_s: float
    server_s: float
    up: float  # bytes a client
    down: float


class _Clock:
    """Adds up seconds of one core."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self, step: Callable[[], _T]) -> _T:
        began = time.process_time()
        result = step()
        self.seconds += time.process_time() - began
        return result


# ---- fedllm ----------------------------------------------------------------------------------------------------------


class Federation:
    """All sites of a run, after they have advertised keys."""

    def __init__(self, sites: int, threshold: int) -> None:
        identities = {f"site-{number:04}": Identity.generate() for number in range(sites)}
        roster = {name: identity.public for name, identity in identities.items()}
        self.params = secagg.SessionParams(os.urandom(32).hex(), os.urandom(32).hex(), threshold, 0, roster)
        self.once = _Clock()  # of all sites
        self.members = {
            name: self.once(partial(secagg.Participant, self.params, name, identity))
            for name, identity in identities.items()
        }
        self.cohort = secagg.make_cohort(self.params, [member.join.join for member in self.members.values()])
        request = ShareKeysRequest(context=self.params.context, round=1, joins=self.cohort.joins)
        for member in self.members.values():
            self.once(partial(member.share, request))
        self.once_bytes = len(request.to_bytes())
        self.round = 1

    def play(self, gone: set[str], dimension: int) -> Cost:
        """Play the next round, in which the sites of `gone` drop out before they upload, of vectors drawn on the way.

        As in a run, no more is kept of an upload than the sum that it is added to.
        """
        self.round += 1
        client, server, up, down = _Clock(), _Clock(), 0, 0
        stay = [name for name in self.members if name not in gone]

        def ask(member: secagg.Participant, request: Message, step: Callable[[Any], Message]) -> Message:
            nonlocal up, down
            counts = member.site not in gone
            sent = server(request.to_bytes)
            clock = client if counts else _Clock()
            answer = clock(lambda: step(from_bytes(sent, type(request), type(request))).to_bytes())
            up, down = up + counts * len(answer), down + counts * len(sent)
            return server(lambda: from_bytes(answer, Message, Message))

        request = ShareKeysRequest(context=self.params.context, round=self.round, joins=())
        dealt: dict[str, Any] = {name: ask(member, request, member.share) for name, member in self.members.items()}
        for shares in dealt.values():
            server(partial(secagg.check_key_shares, self.cohort, self.round, shares))
        requests = server(partial(secagg.MaskedInputRequests, self.cohort, self.round, dealt))
        masked = secagg.MaskedSum(self.cohort, self.round, dimension)
        expected, generator = np.zeros(dimension, np.uint32), np.random.default_rng(self.round)
        for name in stay:
            vector = generator.integers(0, _MODULUS, dimension, dtype=np.uint32)
            expected += vector
            asked = server(partial(requests.__getitem__, name))
            answer = client(partial(self._mask, name, asked, vector))
            up, down = up + len(answer), down + len(asked)
            server(partial(self._add, masked, answer))
        dealings = [dealt[name].dealing for name in sorted(dealt)]
        common = server(partial(secagg.common_digest, self.cohort, self.round, self.params.plan, dealings))
        survivor_list = secagg.consistency_check(self.cohort, self.round, common, dealt, stay)
        answers: list[Any] = [ask(self.members[name], survivor_list, self.members[name].unmask) for name in stay]
        if gone:
            consents = [answer for answer in answers if isinstance(answer, ConsistencySignature)]
            for consent in consents:
                server(partial(secagg.check_consistency_signature, self.cohort, survivor_list, consent.consent))
            proof = secagg.unmasking_request(survivor_list, consents[: self.params.threshold])
            answers = [ask(self.members[name], proof, self.members[name].reveal) for name in stay]
        reveals = [answer for answer in answers if isinstance(answer, UnmaskingShares)]
        result = server(lambda: secagg.unmask(self.cohort, dealt, survivor_list, masked, reveals))
        if not np.array_equal(result.total_d, expected):
            raise SystemExit("the sum is wrong")
        return Cost(client.seconds / len(stay), server.seconds, up / len(stay), down / len(stay))

    def _mask(self, name: str, request: bytes, vector: secagg.Vector) -> bytes:
        asked = from_bytes(request, MaskedInputRequest, MaskedInputRequest)
        return self.members[name].mask(asked, task=self.params.plan, vector_d=vector).to_bytes()

    @staticmethod
    def _add(masked: secagg.MaskedSum, upload: bytes) -> None:
        masked.add(from_bytes(upload, MaskedInput, MaskedInput))


# ---- Flower ----------------------------------------------------------------------------------------------------------


def flower(sites: int, threshold: int, dropped: int, vector: secagg.Vector, samples: int) -> Cost:
    """Do what flwr's secaggplus_mod does at one client and secaggplus_workflow at the server."""
    client, shapes, own = _Clock(), [vector.shape], 0
    peers = range(1, sites)
    pairs = {peer: (generate_key_pairs(), generate_key_pairs()) for peer in peers}  # for masks, for shares
    public = {
        peer: (public_key_to_bytes(mask[1]), public_key_to_bytes(seal[1])) for peer, (mask, seal) in pairs.items()
    }

    def setup() -> tuple[bytes, bytes, bytes, bytes]:
        (sk1, pk1), (sk2, pk2) = generate_key_pairs(), generate_key_pairs()
        return private_key_to_bytes(sk1), public_key_to_bytes(pk1), private_key_to_bytes(sk2), public_key_to_bytes(pk2)

    sk1, pk1, sk2, pk2 = client(setup)

    def share() -> tuple[bytes, list[bytes], list[bytes], dict[int, bytes], list[bytes]]:
        seed = os.urandom(32)
        seed_shares, key_shares = create_shares(seed, threshold, sites), create_shares(sk1, threshold, sites)
        keys, ciphertexts = {}, []
        for peer in peers:
            keys[peer] = generate_shared_key(bytes_to_private_key(sk2), bytes_to_public_key(public[peer][1]))
            plain = share_keys_plaintext_concat(own, peer, seed_shares[peer], key_shares[peer])
            ciphertexts.append(encrypt(keys[peer], plain))
        return seed, seed_shares, key_shares, keys, ciphertexts

    seed, seed_shares, key_shares, keys, ciphertexts = client(share)
    received = {  # as long as what a peer would send
        peer: encrypt(keys[peer], share_keys_plaintext_concat(peer, own, seed_shares[peer], key_shares[peer]))
        for peer in peers
    }

    def mask() -> bytes:
        masked: list[Any] = parameters_addition([vector.astype(np.int64)], pseudo_rand_gen(seed, _MODULUS, shapes))
        for peer, ciphertext in received.items():
            share_keys_plaintext_separate(decrypt(keys[peer], ciphertext))
            key = generate_shared_key(bytes_to_private_key(sk1), bytes_to_public_key(public[peer][0]))
            combine = parameters_addition if own > peer else parameters_subtraction
            masked = combine(masked, pseudo_rand_gen(key, _MODULUS, shapes))
        return ndarray_to_bytes(parameters_mod(masked, _MODULUS)[0])

    upload = client(mask)
    stayed = sites - dropped
    total = [np.zeros(vector.shape, np.int64)]

    def add() -> None:
        parameters_mod(parameters_addition(total, [bytes_to_ndarray(upload)]), _MODULUS)

    def unmask_survivor() -> None:
        parameters_subtraction(total, pseudo_rand_gen(combine_shares(seed_shares[:stayed]), _MODULUS, shapes))

    def unmask_pair() -> None:
        key = generate_shared_key(bytes_to_private_key(sk1), bytes_to_public_key(public[1][0]))
        parameters_subtraction(total, pseudo_rand_gen(key, _MODULUS, shapes))

    server_s = stayed * (_mean(add, samples) + _mean(unmask_survivor, samples))
    if dropped:
        server_s += dropped * _mean(lambda: combine_shares(key_shares[:stayed]), samples)
        server_s += dropped * stayed * _mean(unmask_pair, samples)
    number = 8  # bytes of a node's id
    sealed = sum(number + len(ciphertext) for ciphertext in ciphertexts)
    revealed = stayed * (number + len(seed_shares[0])) + dropped * (number + len(key_shares[0]))
    up = len(pk1) + len(pk2) + sealed + len(upload) + revealed
    down = sites * (number + len(pk1) + len(pk2)) + sealed + sites * number
    return Cost(client.seconds, server_s, up, down)


def _mean(step: Callable[[], object], samples: int) -> float:
    clock = _Clock()
    for _ in range(samples):
        clock(step)
    return clock.seconds / samples


# ---- the table -------------------------------------------------------------------------------------------------------

_COLUMNS: tuple[tuple[str, Callable[[Cost], float], str], ...] = (
    ("client s", lambda cost: cost.client_s, ".3f"),
    ("server s", lambda cost: cost.server_s, ".3f"),
    ("MB up", lambda cost: cost.up / 1e6, ".3f"),
    ("MB down", lambda cost: cost.down / 1e6, ".3f"),
)


def _cells(costs: Sequence[Cost], others: Sequence[Cost] | None) -> list[str]:
    """Return median and range of each quantity, and of its ratio to that of `others` in the same turn."""
    cells = []
    for _, value, form in _COLUMNS:
        values = [value(cost) for cost in costs]
        cells.append(_spread(values, form))
        if others is None:
            cells.append("1")
        else:
            cells.append(_spread([v / value(other) for v, other in zip(values, others, strict=True)], ".3g"))
    return cells


def _spread(values: Sequence[float], form: str) -> str:
    low, middle, high = (format(v, form) for v in (min(values), statistics.median(values), max(values)))
    return middle if low == high else f"{middle} ({low} to {high})"


def _noise(sites: int, threshold: int, parameters: int) -> str:
    """Time what privacy=distributed adds to a round in which nobody drops out, on one core."""
    distributed = DistributedMechanism(Mechanism(1.0, 1.0, 0.1), sites, threshold, 1, 10.0)
    zeros, source = np.zeros(parameters), OsRandomness()
    given = distributed.revealed_seeds(sites)
    share = _mean(lambda: distributed.upload(zeros, source), 3)
    _, seeds = distributed.upload(zeros, source)
    off = _mean(lambda: distributed.surplus([seeds[k] for k in given], sites, parameters), 3)
    return (
        f"{sites} sites, noise of privacy=distributed: {share:.3f} s at each site; to take the surplus off again "
        f"{sites} x {off:.3f} s at the server, over its cores"
    )


def measure(
    sites: Annotated[str, typer.Option(help="Comma-separated.")] = "16,64,100",
    parameters: Annotated[int, typer.Option(min=1, help="Length of the vector.")] = 1_000_000,
    dropouts: Annotated[str, typer.Option(help="Shares of the sites that drop out before they upload.")] = "0,0.1",
    repetitions: Annotated[int, typer.Option(min=1, help="Rounds of each arrangement.")] = 3,
    samples: Annotated[int, typer.Option(min=1, help="Of each of Flower's operations at the server.")] = 2,
    beside: Annotated[bool, typer.Option(help="Time Flower beside it: minutes an operation at 1,000 sites.")] = True,
) -> None:
    """Time a round of secure aggregation."""
    table = Table(
        title=f"one round, {parameters:,} parameters, threshold 2/3; median of {repetitions} (range), ratio to Flower"
    )
    for column in ("sites", "dropped", "protocol"):
        table.add_column(column, justify="left")
    for column, _, _ in _COLUMNS:
        table.add_column(column, justify="right")
        table.add_column("ratio", justify="right")
    notes = []
    for n in (int(part) for part in sites.split(",")):
        threshold = 2 * n // 3 + 1
        federation = Federation(n, threshold)
        notes.append(
            f"{n} sites, once a run and site: {federation.once.seconds / n:.3f} s, with the first dealing; "
            f"{federation.once_bytes / 1e3:.1f} kB down"
        )
        notes.append(_noise(n, threshold, parameters))
        generator = np.random.default_rng(0)
        vector = generator.integers(0, _MODULUS, parameters, dtype=np.uint32)
        for dropout in (float(part) for part in dropouts.split(",")):
            dropped = round(dropout * n)
            gone = set(list(federation.members)[:dropped])
            costs: dict[str, list[Cost]] = {"Flower": [], "fedllm": []} if beside else {"fedllm": []}
            for _ in range(repetitions):
                costs["fedllm"].append(federation.play(gone, parameters))
                if beside:
                    costs["Flower"].append(flower(n, threshold, dropped, vector, samples))
            for name, own in costs.items():
                cells = _cells(own, None if name == "Flower" else costs.get("Flower"))
                table.add_row(str(n), str(dropped), name, *cells)
    Console(width=200).print(table)
    for note in notes:
        print(note)
    print(machine())


if __name__ == "__main__":
    typer.run(measure)
