"""A run at the server, whatever carries its messages: its folder, its plan, its coordinator, its outputs."""

import contextlib
import resource
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedllm.audit.model import Empirical
from fedllm.audit.summary import RunSummary, write_outputs
from fedllm.config import EvaluationConfig, RunConfig
from fedllm.crypto.identity import PublicIdentity
from fedllm.errors import CheckpointError, ConfigError, FedllmError
from fedllm.files import LOCK, try_lock
from fedllm.plan import RunPlan, default_quorum
from fedllm.privacy.accounting import calibrate, overrun
from fedllm.privacy.canaries import usual_guesses
from fedllm.privacy.mechanism import Mechanism
from fedllm.privacy.metrics import layout_of
from fedllm.training.engine import Engine
from fedllm.training.evaluation import Evaluator, open_evaluator
from fedllm.training.model_context import open_context, use_threads
from fedllm.values import parse
from server.aggregate import aggregation_rule
from server.channel import Channel
from server.checkpoint import CONFIG, has_checkpoint, write_atomically, writing
from server.events import CHECKPOINT, PLAN, Event, Phase
from server.ledger_heads import LedgerHeads
from server.rounds import Coordinator, PublicModel
from server.run_record import RunLog

_LOCK_TRIES, _LOCK_PAUSE = 10, 0.1  # seconds: others look at the lock for a moment


def check_folder(config: RunConfig, folder: Path) -> None:
    """Raise an error if a run cannot start in its folder, or cannot be resumed there."""
    try:
        there = {file.name for file in folder.iterdir()} if folder.is_dir() else set()
        taken = folder.exists() and not folder.is_dir()
        resumable = has_checkpoint(folder / CHECKPOINT)
    except OSError as error:
        raise _no_place(folder, error) from None
    if config.resume and not resumable:
        raise CheckpointError(f"resume=true, but {folder} holds no {CHECKPOINT}. Start the run without resume=true.")
    # A run that was stopped before its first checkpoint starts over.
    begun = not resumable and (PLAN in there or (LOCK in there and there <= {LOCK, f"{PLAN}.new"}))
    if not config.resume and (taken or (folder.is_dir() and not begun)):
        raise ConfigError(f"{folder} exists. Choose another name=..., or continue that run with resume=true.")


@contextlib.contextmanager
def alone_in(folder: Path, config: RunConfig) -> Iterator[None]:
    """Make and hold the run's folder; raises ConfigError if another process does, or has used it meanwhile."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        file = (folder / LOCK).open("a")
    except OSError as error:
        raise _no_place(folder, error) from None
    with file:
        for _ in range(_LOCK_TRIES):
            if try_lock(file):
                break
            time.sleep(_LOCK_PAUSE)
        else:
            raise ConfigError(f"{folder} is in use by another run. Wait for it, or choose another name=...")
        check_folder(config, folder)
        yield


def _no_place(folder: Path, error: OSError) -> ConfigError:
    return ConfigError(f"output: {folder} cannot be made ({error.strerror}). Choose another place.")


def make_plan(config: RunConfig, names: Sequence[str]) -> RunPlan:
    """Return a new plan for these sites, its noise and quorum computed if the configuration leaves them open.

    Groups are dealt by the order of the names. Raises ConfigError if the sites are too few for what it asks.
    """
    privacy, many = config.privacy, config.federation.groups or 1
    groups = tuple(tuple(sorted(names)[k::many]) for k in range(many)) if many > 1 else ()
    sites = len(groups[0]) if groups else len(names)
    quorum = config.federation.quorum or default_quorum(privacy, sites)
    steps = config.training.rounds * config.training.local_steps
    if privacy.mode != "off" and privacy.noise_multiplier is None:
        noise = calibrate(privacy.epsilon, privacy.delta, privacy.sampling_rate, steps)
        privacy = privacy.model_copy(update={"noise_multiplier": noise})
    parts = {
        "model": config.model, "adapter": config.adapter, "privacy": privacy, "training": config.training,
        "evaluation": _with_noise(config),
    }  # fmt: skip
    canaries = config.audit.canaries
    guesses = usual_guesses(canaries, privacy.sampling_rate, steps) if canaries else 0
    plan = parse(RunPlan, {
        "run": uuid.uuid4().hex, "seed": config.seed, "sites": sites, "quorum": quorum, "groups": groups,
        "canaries": canaries, "guesses": guesses,
        "poisoned_sites": config.federation.poisoned_sites if groups else 0,
        **{name: part.model_dump() for name, part in parts.items()},
    })  # fmt: skip
    for group, given, events, epsilon in (
        ("privacy", config.privacy.noise_multiplier, plan.mechanism.event(plan.steps), privacy.epsilon),
        ("evaluation", config.evaluation.noise_multiplier, plan.score_mechanism.event(plan.scores), plan.score_epsilon),
    ):
        over = overrun([events], privacy.delta, epsilon, one_plan=True) if given is not None else None
        if plan.mechanism.private and over is not None:
            raise ConfigError(
                f"{group}.noise_multiplier={given:g}: the plan would cost epsilon {over:.4g}, above its own target, "
                f"{group}.epsilon={epsilon:g}. Set it to null to have it calibrated, or raise {group}.epsilon."
            )
    return plan


def _with_noise(config: RunConfig) -> EvaluationConfig:
    """Return what the plan says of scores, the noise calibrated for all of them together."""
    own, privacy = config.evaluation, config.privacy
    if privacy.mode == "off" or own.every is None or own.noise_multiplier is not None:
        return own
    scores = own.scores_in(config.training.rounds + 1, config.training.rounds)
    noise = calibrate(own.epsilon or privacy.epsilon, privacy.delta, 1.0, scores)
    return own.model_copy(update={"noise_multiplier": noise})


def continued(plan: RunPlan, before: RunPlan) -> RunPlan:
    """Return `plan` as that of the run `before`, whose sites and groups stay as they were.

    A quorum may be raised on the way, the sites were promised the old.
    """
    as_before = {"run": before.run, "sites": before.sites, "quorum": min(plan.quorum, before.quorum)}
    if len(plan.groups) == len(before.groups):
        as_before["groups"] = before.groups
    return plan.model_copy(update=as_before)


def write_plan(folder: Path, plan: RunPlan, config: RunConfig) -> None:
    """Write what a later resume compares with."""
    write_atomically(folder / PLAN, (plan.model_dump_json(indent=2) + "\n").encode())
    write_atomically(folder / CONFIG, (config.model_dump_json(indent=2) + "\n").encode())


def differences(path: str, a: object, b: object) -> list[str]:
    """Return the keys in which two nested values differ, with both values."""
    if isinstance(a, dict) and isinstance(b, dict):
        keys = sorted(set(a) | set(b))
        return [d for key in keys for d in differences(f"{path}.{key}".lstrip("."), a.get(key), b.get(key))]
    return [] if a == b else [f"{path} (was {a}, now {b})"]


class HeadOfficeRun:
    """Model, held-out set and outputs of one run."""

    def __init__(self, config: RunConfig) -> None:
        """Load model and held-out set; raises ModelError, DataError or ConfigError if they cannot be used."""
        aggregation_rule(config.federation, config.training)  # here, where the operator sees what is wrong with it
        self._config = config
        use_threads(config.site.threads)
        self._context = open_context(config.model, config.adapter, config.seed, config.site.device)
        self._evaluator = open_evaluator(config.model, config.data, self._context.adapter, config.site.micro_batch)

    @property
    def dimension(self) -> int:
        """Parameters of the adapter."""
        return self._context.adapter.spec.dimension

    def coordinator(
        self, plan: RunPlan, channel: Channel, record: RunLog, observe: Callable[[Event], None],
        heads: LedgerHeads | None = None, roster: Mapping[str, PublicIdentity] | None = None,
    ) -> Coordinator:  # fmt: skip
        """Return the coordinator of a run, resumed if the configuration says so.

        `observe` receives every event; `record` is signed as the run goes; `heads` is what other runs saw of the
        sites' ledgers; `roster` names who takes part if noise comes in shares.
        """
        adapter = self._context.adapter
        if plan.distributed is not None:
            plan.distributed.clip_before_rounding(adapter.spec.dimension)  # says here what every site would decline for
        score = partial(_score, self._evaluator, self._context.engine, plan.mechanism)
        layout = layout_of(plan.model, adapter.vocabulary)
        model = PublicModel(adapter.spec, adapter.initial, score, layout)
        coordinator = Coordinator(plan, self._config.federation, model, channel, record, observe, heads, roster)
        if self._config.resume:
            coordinator.resume()
        return coordinator

    def finish(
        self, coordinator: Coordinator, stopped: str, budgets: Mapping[str, float], seconds: float,
        memory_elsewhere: float = 0.0, audit: Callable[[], Empirical | None] | None = None,
    ) -> RunSummary:  # fmt: skip
        """Write all outputs; `stopped` says why the run ended early, `budgets` what sites permit if it is known.

        `memory_elsewhere` is what other processes of the run used at most, MB. `audit` writes the report and returns
        what the attack came to. It is called beside the closing evaluation, and not beside the plots: matplotlib's
        settings are the process's.
        """
        adapter = self._context.adapter
        failed: BaseException | None = None
        attack: Empirical | None = None
        evaluator = self._evaluator if coordinator.round else None  # else there is no after
        if evaluator is not None:
            coordinator.observe(Phase("closing evaluation: answers before and after"))
        with ThreadPoolExecutor(1, "evaluation") as beside:
            kept_round, kept = coordinator.kept
            answers = beside.submit(_before_and_after, evaluator, adapter.initial, kept)
            try:
                if audit is not None:
                    attack = audit()
            except FedllmError as error:  # the outputs come first
                failed = error
        summary = RunSummary(
            name=self._config.name,
            folder=coordinator.folder,
            plan=coordinator.plan,
            data=self._config.data,
            records=[asdict(record) for record in coordinator.records],
            sites={name: asdict(state) for name, state in sorted(coordinator.sites.items())},
            budgets=dict(budgets),
            stopped=stopped,
            kept=None if kept_round == coordinator.round else kept_round,
            seconds=seconds,
            peak_memory_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 + memory_elsewhere,
            attack=attack,
            **answers.result(),
        )
        coordinator.observe(Phase("writing adapter, plots and summaries"))
        with writing(coordinator.folder):
            write_outputs(summary, adapter, kept)
        if failed is not None:
            raise failed
        return summary


def _score(
    evaluator: Evaluator | None, engine: Engine, mechanism: Mechanism, vector: NDArray[np.float32]
) -> dict[str, float | None]:
    if evaluator is None:
        return {}
    return {**asdict(evaluator.score(vector)), "clipped": evaluator.clipped_share(engine, vector, mechanism)}


def _before_and_after(
    evaluator: Evaluator | None, before: NDArray[np.float32], after: NDArray[np.float32]
) -> dict[str, Any]:
    if evaluator is None or not evaluator.generates:
        return {}
    first, first_samples = evaluator.exact_match(before)
    last, last_samples = evaluator.exact_match(after)
    return {
        "exact_match": (first, last),
        "samples": [
            (a.prompt, a.expected, a.answer, b.answer) for a, b in zip(first_samples, last_samples, strict=True)
        ],
    }
