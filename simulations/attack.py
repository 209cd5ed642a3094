"""Membership inference on a finished run, with the sites' real records.

**For the simulator only.** Whoever simulates owns the records of every site. Nothing of this is in a deployment, where
no site would let anybody try records of its own against the adapter.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedllm.adapter_vector import adapter_digest
from fedllm.audit.evidence import file_name
from fedllm.audit.membership import Attack, Target, attack_of, write_attack
from fedllm.audit.risk import risk_of
from fedllm.config import SimulationConfig
from fedllm.crypto.hash_chain import read_chain
from fedllm.errors import ChainError, CheckpointError, ConfigError, DataError, ModelError
from fedllm.plan import RunPlan
from fedllm.privacy.accounting import spent
from fedllm.privacy.ledger import LedgerFile
from fedllm.privacy.ledger_place import SITE
from fedllm.privacy.split import SIDES, Side, Split
from fedllm.training.adapter import AdapterModel, check_saved
from fedllm.training.data import Example
from fedllm.training.evaluation import losses_of, open_evaluator, spread
from fedllm.training.model_context import open_context, use_threads
from server.checkpoint import CONFIG, Checkpoint, load_checkpoint, read_as, writing
from server.events import CHECKPOINT, PLAN
from server.run_record import RECORD_FILE
from simulations.sites import folder_of, simulated_data

FOLDER = "attack"  # in the run's folder


@dataclass(frozen=True)
class _Finished:
    """A run that has ended, and what its record says of it."""

    folder: Path
    config: SimulationConfig
    plan: RunPlan
    checkpoint: Checkpoint
    spec_digest: str

    @property
    def final(self) -> NDArray[np.float32]:
        """The adapter that the run ended with, float32[d]: the last, or the best."""
        best = self.checkpoint.best
        return best if self.plan.training.keep == "best" and best is not None else self.checkpoint.adapter

    @property
    def trained(self) -> list[str]:
        """The sites whose updates are in the adapter."""
        return sorted(name for name, state in self.checkpoint.sites.items() if state.rounds)


def attack(folder: Path, limit: int | None, say: Callable[[str], object]) -> Attack:
    """Attack the run in `folder` and write what was found to `folder`/attack; `say` hears what is being done.

    `limit` is the most records that are tried a side, evenly spread over all; None tries every one. Raises ConfigError,
    CheckpointError, ModelError, DataError or LedgerError if run, adapter, records or held-out set are not at hand, or
    not those of the run.
    """
    run = _finished(folder)
    plan, config = run.plan, run.config
    use_threads(config.site.threads)
    say("loading model and records")
    adapter = open_context(plan.model, plan.adapter, plan.seed, config.site.device).adapter
    if adapter.spec.digest != run.spec_digest:
        raise ModelError(
            f"model.source={plan.model.source} is not the base that {folder} was trained on, or PEFT is another "
            "version. Put back the base, and the versions that the first line of its record names."
        )
    final = run.final
    check_saved(folder / "adapter", adapter, final, plan.model)
    members, evaluated = _sides(run)
    held_out = evaluated or _held_out(config, adapter)
    used = {_key(record) for record in members}
    others = [record for record in held_out if _key(record) not in used]
    if not others:
        raise DataError(
            f"data.heldout={config.data.heldout}: each of its {len(held_out)} records is a record of a site as well, "
            "so none is a non-member. Set a held-out set of other records in the configuration of a new run."
        )
    tried = [some if limit is None else spread(some, limit) for some in (members, others)]
    say(f"losses of {len(tried[0])} members and {len(tried[1])} non-members")
    before, after = (
        tuple(losses_of(adapter, vector, some, config.site.micro_batch) for some in tried)
        for vector in (adapter.initial, final)
    )
    rounds = max(run.checkpoint.sites[name].charged for name in run.trained)
    events = [plan.mechanism.event(rounds * plan.training.local_steps)]
    cost = spent(events, plan.privacy.delta)
    epsilon = cost.epsilon if plan.privacy.protects else None
    target = Target(
        name=config.name, run=plan.run, round=run.checkpoint.round, sites=len(run.trained), unit=plan.privacy.unit,
        members=len(tried[0]), members_there=len(members), others=len(tried[1]), others_there=len(others),
        left_out=len(held_out) - len(others), public=not evaluated, epsilon=epsilon, delta=plan.privacy.delta,
        events=tuple((event.sampling_rate, event.noise_multiplier, event.steps) for event in events),
    )  # fmt: skip
    found = attack_of(target, (before[0], before[1]), (after[0], after[1]), risk_of(events, epsilon, cost.grid))
    with writing(folder / FOLDER):
        write_attack(found, folder / FOLDER)
    return found


def _finished(folder: Path) -> _Finished:
    """Return the run of a simulation in `folder`; raises ConfigError or CheckpointError if there is none that ended."""
    try:
        settings = json.loads((folder / CONFIG).read_text("utf-8"))
    except (OSError, ValueError):
        settings = None
    if not isinstance(settings, Mapping) or "train" not in settings.get("data", {}):
        raise ConfigError(
            f"{folder} is not the folder of a simulation: it has no {CONFIG} that names the sites' records. Give the "
            "folder that `fedllm simulate` wrote. A run of real sites cannot be attacked: their records are not here."
        )
    config, plan = read_as(folder / CONFIG, SimulationConfig), read_as(folder / PLAN, RunPlan)
    record = folder / RECORD_FILE
    try:
        entries = read_chain(record.read_text("utf-8").splitlines(), str(record))
    except (OSError, UnicodeDecodeError, ChainError) as error:
        raise CheckpointError(f"{record} cannot be used: {error}. Restore it from a backup.") from None
    end = entries[-1] if entries else None
    if end is None or end.kind != "end" or not end.body["round"]:
        why = "no round of it was completed" if end is not None and end.kind == "end" else "it has not ended"
        raise CheckpointError(
            f"{folder} holds no finished run: {why}. "
            f"Let it end first: fedllm simulate ... name={config.name} resume=true."
        )
    checkpoint = load_checkpoint(folder / CHECKPOINT)
    if adapter_digest(checkpoint.adapter) != end.body["adapter"] or checkpoint.plan_digest != plan.digest:
        raise CheckpointError(
            f"{folder / CHECKPOINT} holds round {checkpoint.round} of another adapter than the run ended with "
            f"(round {end.body['round']} in {RECORD_FILE}). Restore the run's folder from a backup."
        )
    return _Finished(folder, config, plan, checkpoint, str(entries[0].body["spec_digest"]))


def _held_out(config: SimulationConfig, adapter: AdapterModel) -> list[Example]:
    """Return records that no site trained on: the held-out set's. Raises ConfigError if there is none."""
    evaluator = open_evaluator(config.model, config.data, adapter, config.site.micro_batch)
    if evaluator is None:
        raise ConfigError(
            "data.heldout=null: the run has no held-out records, and its sites held none back, so there is nothing to "
            "tell its members from. Run it again with data.heldout set to records that no site has, or with "
            "evaluation.every."
        )
    return [record for unit in evaluator.units for record in unit]


def _sides(run: _Finished) -> tuple[list[Example], list[Example]]:
    """Return every record that sites trained on, as the plan cut it, and those of the units that they held back.

    A site's ledger holds the hashes of its records. Raises DataError if there are records now that it lacks.
    """
    config, plan = run.config, run.plan
    data = simulated_data(config)
    found: dict[Side, list[Example]] = {side: [] for side in SIDES}
    for name in run.trained:
        ledger = folder_of(config, run.folder) / file_name(name) / "ledger.db"
        records = data.records(name, plan.model) if name in data.names else None
        hashes = records.data_set if records is not None else frozenset[bytes]()
        strange = len(hashes) - LedgerFile(ledger).overlaps("", hashes).get(SITE, 0)
        if records is None or strange:
            what = "there are none now" if records is None else f"its ledger lacks {strange} of {len(hashes)} hashes"
            raise DataError(
                f"data.train={config.data.train} has changed since the run. Of the records of {name}, {what}. Put back "
                "the records that the run was made with."
            )
        split = LedgerFile(ledger).split(SITE) or Split(0.0, b"")
        for side, own in found.items():
            own += [record for unit in records.units(plan, split, side) for record in unit]
    return found["training"], found["evaluation"]


def _key(record: Example) -> bytes:
    """Return what two equal records have in common."""
    return np.concatenate([record.input_ids, np.atleast_1d(record.labels)]).tobytes()
