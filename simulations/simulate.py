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
from fedllm.training.data import Tokeniser, check_columns, read_table
from fedllm.training.evaluation import Evaluator
from fedllm.training.workspace import Workspace, open_workspace, use_threads
from server.app import server_app
from server.checkpoint import write_atomically
from server.rounds import CHECKPOINT, PLAN, Coordinator, Event
from simulations.grid import InProcessGrid, run_ray
from simulations.sites import SITE_LOG, connect, log_to, simulated_data

CONFIG = "config.json"
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
    plan = _plan(config, folder)
    _check_federation(config, data.names)

    workspace = open_workspace(plan.model, plan.adapter, plan.seed, config.site.device)
    evaluator = _evaluator(config, workspace)
    coordinator = Coordinator(
        plan, config.federation, workspace.adapter.spec, workspace.adapter.initial, folder,
        partial(_score, evaluator), observe, len(data.names),
    )  # fmt: skip
    if config.resume:
        coordinator.resume()
    else:
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise ConfigError(
                f"output={config.output}: {folder} cannot be made ({error.strerror}). Choose another."
            ) from None
        write_atomically(folder / PLAN, (plan.model_dump_json(indent=2) + "\n").encode())
        write_atomically(folder / CONFIG, (config.model_dump_json(indent=2) + "\n").encode())
    announce(plan, data.names)

    stopped = ""
    with _alone_in(folder), _site_log(folder):
        try:
            _run(config, folder, coordinator, len(data.names))
        except QuorumLost as error:
            stopped = f"{error} What the sites said of it is in {folder / SITE_LOG}."
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
    folder = Path(config.output) / config.name
    if config.resume and not (folder / CHECKPOINT).exists():
        raise CheckpointError(f"resume=true, but {folder} holds no {CHECKPOINT}. Start the run without resume=true.")
    started = (folder / CHECKPOINT).exists() or not (folder / PLAN).exists()  # before the first checkpoint: start over
    if not config.resume and folder.exists() and started:
        raise ConfigError(f"{folder} exists. Choose another name=..., or continue that run with resume=true.")
    return folder


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


def _plan(config: SimulationConfig, folder: Path) -> RunPlan:
    privacy = config.privacy
    if privacy.mode == "local" and privacy.noise_multiplier is None:
        steps = config.training.rounds * config.training.local_steps
        noise = calibrate(privacy.epsilon, privacy.delta, privacy.sampling_rate, steps)
        privacy = privacy.model_copy(update={"noise_multiplier": noise})
    run = uuid.uuid4().hex
    changed: list[str] = []
    before: RunPlan | None = None
    if config.resume:
        before = _read(folder / PLAN, RunPlan)
        run = before.run
    plan = RunPlan(
        run=run, seed=config.seed, model=config.model, adapter=config.adapter, privacy=privacy,
        training=config.training,
    )  # fmt: skip
    if before is not None:
        earlier = _read(folder / CONFIG, SimulationConfig)
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


def _check_federation(config: SimulationConfig, names: list[str]) -> None:
    for key, named in (("federation.weights", config.federation.weights), ("site.budgets", config.site.budgets)):
        unknown = sorted(set(named) - set(names))
        if unknown:
            raise ConfigError(f"{key}: no site is called {', '.join(unknown)}; the sites are {', '.join(names)}")
    if config.federation.quorum > len(names):
        raise ConfigError(f"federation.quorum={config.federation.quorum}, but there are only {len(names)} sites")


def _evaluator(config: SimulationConfig, workspace: Workspace) -> Evaluator | None:
    data = config.data
    if data.heldout is None:
        return None
    table = read_table(data.heldout, data.heldout_split)
    check_columns(table, data.model_copy(update={"unit": None}))
    if data.heldout_limit is not None:
        count = min(data.heldout_limit, len(table))  # evenly spaced: files are often sorted
        table = table.select([i * len(table) // count for i in range(count)])
    tokeniser = Tokeniser(workspace.adapter.tokenizer, config.model, data)
    return Evaluator(workspace.adapter, table, tokeniser, data, config.site.micro_batch)


def _score(evaluator: Evaluator | None, vector: NDArray[np.float32]) -> dict[str, float | None]:
    return asdict(evaluator.score(vector)) if evaluator is not None else {}


def _run(config: SimulationConfig, folder: Path, coordinator: Coordinator, sites: int) -> None:
    client = courier(partial(connect, config.model_dump_json(), str(folder.resolve())))
    errors: list[BaseException] = []
    server = server_app(coordinator, errors.append)
    federation = config.federation
    if federation.backend == "ray":
        run_ray(server, client, sites, federation.cpus_per_site, federation.gpus_per_site)
    else:
        grid = InProcessGrid(client, sites)
        server(grid, Context(1, 0, {}, RecordDict(), {}))
    if errors:
        raise errors[0]


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
def _alone_in(folder: Path) -> Iterator[None]:
    """Hold the run's folder; raises ConfigError where another process does."""
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(f"{folder} is in use by another run. Wait for it, or choose another name=...") from None
        yield
