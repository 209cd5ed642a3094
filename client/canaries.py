"""A site's canaries in one run, on disk: what it committed to, the adapter that it saw last, the scores so far.

Scores depend on the seed and on the adapters that the server sends, never on a coin or a record. Every change replaces
the file as a whole. What a kill leaves behind is the state before or after a step of the attack; a step that is missing
makes guesses weaker, not wrong. Without a file that is whole the site guesses nothing: its coins are lost, or nobody
could tell that they are the ones it committed to.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedllm.canonical import canonical_json, read_json
from fedllm.errors import FolderError
from fedllm.files import read_secret, remove, write_secret
from fedllm.plan import RunPlan
from fedllm.privacy.canaries import Opening, Secret, choose, commitment
from fedllm.training.canary_attack import black_scores, drawn_in_a_round, make_canaries, white_scores
from fedllm.training.data import PrivacyUnit
from fedllm.training.model_context import ModelContext

KEPT = 8  # files of runs
_ENDING = ".canaries"


@dataclass(frozen=True)
class _State:
    secret: Secret
    round: int  # whose start `seen` is; 0: none was seen
    scores: NDArray[np.float64]  # [canaries], white-box
    seen: NDArray[np.float32]  # [d], or [0]
    opening: str = ""  # once there is one, the last word


class SiteCanaries:
    """The canaries of one site in one run; its site handles one request at a time.

    Raises FolderError where the file is gone, damaged or another's: the attack of this run is then given up at this
    site, for good. Training goes on without it.
    """

    def __init__(self, folder: Path, run: str, site: str) -> None:
        """`folder` is the site's own; it keeps the files of the last runs."""
        self._run, self._site, self._folder = run, site, folder
        self._state: _State | None = None  # as the file has it: it holds an adapter, and is read once
        self._path = folder / (hashlib.sha256(run.encode()).hexdigest()[:32] + _ENDING)

    def begin(self, canaries: int) -> str:
        """Return the commitment to the coins of this run, which are drawn unless they are there.

        Files of the oldest runs are removed, so that KEPT are left.
        """
        if not self._path.exists():
            state = _State(Secret.draw(self._run, self._site, canaries), 0, np.zeros(canaries), np.zeros(0, np.float32))
            self._write(state)
            for old in self._others():
                remove(old)
        secret = self._read().secret
        if len(secret.coins) != canaries:
            raise self._given_up(f"it holds {len(secret.coins)} canaries, and the plan has {canaries}")
        return commitment(secret)

    def members(self, context: ModelContext, plan: RunPlan) -> list[PrivacyUnit]:
        """Return the canaries whose coin is 1: they train with the site's own units, before them."""
        secret = self._read().secret
        units = self._units(secret, context, plan)
        return [units[number] for number in secret.members]

    def saw(self, round_: int, adapter: NDArray[np.float32], context: ModelContext, plan: RunPlan, batch: int) -> None:
        """Take the adapter float32[d] that round `round_` starts from, and score the step that led to it.

        An adapter of an earlier round, or another one of this round, begins a new count of steps: the server went back.
        `batch`: records of a forward pass.
        """
        state = self._read()
        if not state.opening and (state.round != round_ or not np.array_equal(state.seen, adapter)):
            self._write(self._scored(state, round_, adapter, context, plan, batch))

    def opening(
        self, final: NDArray[np.float32], guesses: int, context: ModelContext, plan: RunPlan, batch: int
    ) -> Opening:
        """Return the coins and the guesses, given the adapter float32[d] after the last round; always the same one."""
        state = self._read()
        if state.opening:
            return Opening.from_text(state.opening)
        if not len(state.seen):
            raise self._given_up("the site saw no round, so it can guess nothing")
        state = self._scored(state, plan.training.rounds + 1, final, context, plan, batch)
        units = self._units(state.secret, context, plan)
        black = black_scores(context.adapter, context.adapter.initial, final, units, batch)
        opening = Opening(secret=state.secret, black=choose(black, guesses), white=choose(state.scores, guesses))
        self._write(replace(state, seen=state.seen[:0], opening=opening.to_text()))
        return opening

    def _scored(
        self, state: _State, round_: int, adapter: NDArray[np.float32], context: ModelContext, plan: RunPlan, batch: int
    ) -> _State:
        scores = state.scores
        if 0 < state.round < round_ and state.seen.shape == adapter.shape:
            units = self._units(state.secret, context, plan)
            step = adapter - state.seen
            found = white_scores(context.engine, context.adapter, state.seen, step, units, plan.mechanism, batch)
            rate = 1 - (1 - plan.privacy.sampling_rate) ** plan.training.local_steps
            scores = scores + drawn_in_a_round(found, rate)
        return replace(state, round=round_, seen=adapter, scores=scores)

    def _units(self, secret: Secret, context: ModelContext, plan: RunPlan) -> list[PrivacyUnit]:
        return make_canaries(bytes.fromhex(secret.seed), len(secret.coins), plan.model, context.adapter.vocabulary)

    def _others(self) -> Iterator[Path]:
        """Yield what is left of writes that were killed, and the files of all but the last KEPT runs."""
        yield from self._folder.glob(f"*{_ENDING}.new")
        files = [file for file in self._folder.glob(f"*{_ENDING}") if file != self._path]
        yield from sorted(files, key=lambda file: file.stat().st_mtime_ns)[: -(KEPT - 1)]

    def _write(self, state: _State) -> None:
        self._state = None
        head = canonical_json({"secret": state.secret.model_dump(), "round": state.round, "opening": state.opening})
        content = b"\n".join([head, state.scores.astype("<f8").tobytes() + state.seen.astype("<f4").tobytes()])
        write_secret(self._path, hashlib.sha256(content).hexdigest().encode() + b"\n" + content)
        self._state = state

    def _read(self) -> _State:
        if self._state is None:
            self._state = self._load()
        return self._state

    def _load(self) -> _State:
        try:
            digest, _, content = read_secret(self._path).partition(b"\n")
            if hashlib.sha256(content).hexdigest().encode() != digest:
                raise ValueError("not what was written")
            line, _, numbers = content.partition(b"\n")
            head = read_json(line)
            secret = Secret.model_validate(head["secret"])
            split = 8 * len(secret.coins)
            scores, seen = np.frombuffer(numbers[:split], "<f8"), np.frombuffer(numbers[split:], "<f4")
            state = _State(secret, head["round"], scores, seen, head["opening"])
        except FolderError as error:
            raise self._given_up(str(error) if self._path.exists() else f"{self._path} is gone") from None
        except (ValueError, KeyError):  # or of another version
            raise self._given_up(f"{self._path} is damaged") from None
        if (secret.run, secret.site) != (self._run, self._site):
            raise self._given_up(f"{self._path} is that of run {secret.run} at {secret.site}")
        return state

    def _given_up(self, why: str) -> FolderError:
        return FolderError(
            f"canaries of run {self._run}: {why.removesuffix('.')}. This site gives up the attack on that run; "
            "training goes on without it."
        )
