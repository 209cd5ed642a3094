"""A whole federation on one machine: data to sites, plan, rounds, outputs."""

import contextlib
import fcntl
import json
import logging
import os
import resource
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from flwr.app import Context, RecordDict
from numpy.typing import NDArray

from client.app import courier
from fedllm.audit.summary import RunSummary, write_outputs
from fedllm.errors import CheckpointError, ConfigError, QuorumLost
from fedllm.plan import RunPlan, SimulationConfig, parse
from fedllm.privacy.accounting import calibrate
from fedllm.training.data import Tokeniser, check_columns, naming, read_table
from fedllm.training.evaluation import Evaluator
from fedllm.training.workspace import Workspace, open_workspace, use_threads
from server.app import server_app
from server.checkpoint import write_atomically
from server.rounds import CHECKPOINT, PLAN, Coordinator, Event
from simulations.grid import InProcessGrid, run_ray
from simulations.sites import SITE_LOG, SimulatedData, connect, log_to, make_site, simulated_data

CONFIG, LOCK = "config.json", "lock"
_QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


_T = TypeVar("_T", RunPlan, SimulationConfig)


def simulate(config: SimulationConfig, announce: Callable[[RunPlan, list[str]], None],
             observe: Callable[[Event], None]) -> RunSummary:  # fmt: skip
    """Run the configured federation and write its outputs to `config.output/config.name`.

    `announce` receives the plan and the sites' names before the first round, `observe` every event after. A run
    whose quorum is lost ends with its outputs written and the reason in the summary; other errors are raised.
    """
    os.environ.update(_QUIET)
    logging.getLogger("flwr").setLevel(logging.ERROR)
    began = time.monotonic()
    use_threads(config.site.threads)
    folder = _folder(config)
    data = simulated_data(config)
    config = _with_nominal_size(config, data.unit_counts())
    plan = _plan(config)
    _check_federation(config, data, folder)

    workspace = open_workspace(plan.model, plan.adapter, plan.seed, config.site.device)
    evaluator = _evaluator(config, workspace)
    with _alone_in(folder, config):
        if config.resume:
            plan = _as_before(plan, config, folder)
        coordinator = Coordinator(
            plan, config.federation, workspace.adapter.spec, workspace.adapter.initial, folder,
            partial(_score, evaluator), observe, len(data.names),
        )  # fmt: skip
        if config.resume:
            coordinator.resume()
        else:
            write_atomically(folder / PLAN, (plan.model_dump_json(indent=2) + "\n").encode())
            write_atomically(folder / CONFIG, (config.model_dump_json(indent=2) + "\n").encode())
        announce(plan, data.names)
        with _site_log(folder):
            stopped = _run(config, folder, coordinator, len(data.names))
            summary = RunSummary(
                name=config.name,
                folder=folder,
                plan=plan,
                data=config.data,
                records=[asdict(record) for record in coordinator.records],
                sites={name: asdict(state) for name, state in sorted(coordinator.sites.items())},
                budgets={name: config.budget(name) for name in data.names},
                stopped=stopped,
                seconds=time.monotonic() - began,
                peak_memory_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
                **_before_and_after(evaluator, workspace.adapter.initial, coordinator.adapter),
            )
            write_outputs(summary, workspace.adapter, coordinator.adapter)
    return summary


def _folder(config: SimulationConfig) -> Path:
    """Return the run's folder; raises an error where a run cannot start there, or cannot be resumed."""
    folder = Path(config.output) / config.name
    try:
        there = {file.name for file in folder.iterdir()} if folder.is_dir() else set()
        taken = folder.exists() and not folder.is_dir()
    except OSError as error:
        raise _no_place(config, folder, error) from None
    if config.resume and CHECKPOINT not in there:
        raise CheckpointError(f"resume=true, but {folder} holds no {CHECKPOINT}. Start the run without resume=true.")
    # A run that was stopped before its first checkpoint starts over.
    begun = CHECKPOINT not in there and (PLAN in there or (LOCK in there and there <= {LOCK, f"{PLAN}.new"}))
    if not config.resume and (taken or (folder.is_dir() and not begun)):
        raise ConfigError(f"{folder} exists. Choose another name=..., or continue that run with resume=true.")
    return folder


def _no_place(config: SimulationConfig, folder: Path, error: OSError) -> ConfigError:
    return ConfigError(f"output={config.output}: {folder} cannot be made ({error.strerror}). Choose another.")


def _with_nominal_size(config: SimulationConfig, counts: dict[str, int]) -> SimulationConfig:
    """Fill in privacy.units_per_site: the mean size of the sites to one digit, declared public in every report."""
    if config.privacy.units_per_site is not None:
        return config
    mean = sum(counts.values()) / len(counts)
    nominal = max(1, int(float(f"{mean:.1g}")))
    return parse(
        SimulationConfig,
        {**config.model_dump(), "privacy": {**config.privacy.model_dump(), "units_per_site": nominal}},
    )


def _plan(config: SimulationConfig) -> RunPlan:
    privacy = config.privacy
    if privacy.mode == "local" and privacy.noise_multiplier is None:
        steps = config.training.rounds * config.training.local_steps
        noise = calibrate(privacy.epsilon, privacy.delta, privacy.sampling_rate, steps)
        privacy = privacy.model_copy(update={"noise_multiplier": noise})
    return RunPlan(
        run=uuid.uuid4().hex, seed=config.seed, model=config.model, adapter=config.adapter, privacy=privacy,
        training=config.training,
    )  # fmt: skip


def _as_before(plan: RunPlan, config: SimulationConfig, folder: Path) -> RunPlan:
    """Return the plan of the run that is resumed; raises ConfigError where the configuration asks for another."""
    before, earlier = _read(folder / PLAN, RunPlan), _read(folder / CONFIG, SimulationConfig)
    plan = plan.model_copy(update={"run": before.run})
    changed = _differences("", before.model_dump(), plan.model_dump())
    changed += _differences("data", earlier.data.model_dump(), config.data.model_dump())
    for key in ("partition", "weights"):
        was, now = earlier.federation.model_dump()[key], config.federation.model_dump()[key]
        changed += _differences(f"federation.{key}", was, now)
    if changed:
        raise ConfigError(f"resume=true continues the same plan, but these differ: {', '.join(changed)}")
    return plan


def _read(path: Path, kind: type[_T]) -> _T:
    try:
        return parse(kind, json.loads(path.read_text("utf-8")))
    except (OSError, ValueError, ConfigError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}). Restore it from a backup, or start a new run."
        ) from None


def _differences(path: str, a: object, b: object) -> list[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        keys = sorted(set(a) | set(b))
        return [d for key in keys for d in _differences(f"{path}.{key}".lstrip("."), a.get(key), b.get(key))]
    return [] if a == b else [f"{path} (was {a}, now {b})"]


def _check_federation(config: SimulationConfig, data: SimulatedData, folder: Path) -> None:
    names = data.names
    for name in names:
        make_site(config, data, name, folder)  # refuses a name that no site can have; opens nothing
    for key, named in (("federation.weights", config.federation.weights), ("site.budgets", config.site.budgets)):
        unknown = sorted(set(named) - set(names))
        if unknown:
            raise ConfigError(f"{key}: no site is called {', '.join(unknown)}; the sites are {', '.join(names)}")
    if config.federation.quorum > len(names):
        raise ConfigError(f"federation.quorum={config.federation.quorum}, but there are only {len(names)} sites")
    processors = os.cpu_count() or 1
    if config.federation.backend == "ray" and config.federation.cpus_per_site > processors:
        raise ConfigError(
            f"federation.cpus_per_site={config.federation.cpus_per_site:g}, but there are {processors} processors"
        )


def _evaluator(config: SimulationConfig, workspace: Workspace) -> Evaluator | None:
    data = config.data
    if data.heldout is None:
        return None
    table = read_table(data.heldout, data.heldout_split)
    with naming(data.heldout):
        check_columns(table, data.model_copy(update={"unit": None}))
    if data.heldout_limit is not None:
        count = min(data.heldout_limit, len(table))  # evenly spaced: files are often sorted
        table = table.select([i * len(table) // count for i in range(count)])
    tokeniser = Tokeniser(workspace.adapter.tokenizer, config.model, data)
    with naming(data.heldout):
        return Evaluator(workspace.adapter, table, tokeniser, data, config.site.micro_batch)


def _score(evaluator: Evaluator | None, vector: NDArray[np.float32]) -> dict[str, float | None]:
    return asdict(evaluator.score(vector)) if evaluator is not None else {}


def _run(config: SimulationConfig, folder: Path, coordinator: Coordinator, sites: int) -> str:
    """Run the rounds that are left; returns why they ended early, or nothing."""
    client = courier(partial(connect, config.model_dump_json(), str(folder.resolve())))
    errors: list[BaseException] = []
    server = server_app(coordinator, errors.append)
    federation = config.federation
    if federation.backend == "ray":
        run_ray(server, client, sites, federation.cpus_per_site, federation.gpus_per_site)
    else:
        grid = InProcessGrid(client, sites)
        server(grid, Context(1, 0, {}, RecordDict(), {}))
    if errors and isinstance(errors[0], QuorumLost):
        return f"{errors[0]} What the sites said of it is in {folder / SITE_LOG}."
    if errors:
        raise errors[0]
    return ""


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


@contextlib.contextmanager
def _site_log(folder: Path) -> Iterator[None]:
    handler = log_to(folder)
    try:
        yield
    finally:
        logging.getLogger("fedllm.site").removeHandler(handler)
        handler.close()


@contextlib.contextmanager
def _alone_in(folder: Path, config: SimulationConfig) -> Iterator[None]:
    """Make and hold the run's folder; raises ConfigError where another process does, or has used it meanwhile."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        file = (folder / LOCK).open("a")
    except OSError as error:
        raise _no_place(config, folder, error) from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(f"{folder} is in use by another run. Wait for it, or choose another name=...") from None
        _folder(config)
        yield
