"""A whole federation on one machine: data to sites, plan, rounds, outputs."""

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from client.app import client_app
from fedllm.audit.accountants import CROSS_CHECKS
from fedllm.audit.bundle import FOLDER as AUDIT
from fedllm.audit.bundle import write_audit
from fedllm.audit.evidence import LEDGERS, file_name
from fedllm.audit.model import Empirical
from fedllm.audit.summary import RunSummary
from fedllm.config import SimulationConfig
from fedllm.crypto.hash_chain import End, open_entry
from fedllm.crypto.identity import Identity
from fedllm.errors import ConfigError, QuorumLost
from fedllm.plan import RunPlan
from fedllm.privacy.ledger import LedgerFile
from fedllm.training.model import pick_device
from fedllm.training.model_context import trained, use_threads
from fedllm.values import HEAD_OFFICE, check_name, parse
from server.channel import PlainChannel
from server.checkpoint import CONFIG, read_as, write_atomically, writing
from server.events import PLAN, Event, Phase
from server.ledger_heads import HEADS, LedgerHeads
from server.rounds import Coordinator
from server.run import HeadOfficeRun, alone_in, check_folder, continued, differences, make_plan, write_plan
from server.run_record import RECORD_FILE, RunLog, key_in
from simulations.grid import InProcessGrid
from simulations.sites import (
    SITE_LOG,
    SimulatedData,
    folder_of,
    least_units,
    log_to,
    resume_sites,
    roster_of,
    simulated_data,
)
from simulations.workers import Workers, connect

KEYS = "trusted-keys.txt"  # for `fedllm audit verify RUN/audit --trust RUN/trusted-keys.txt`

_QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_worker_niceness": "0",  # Ray's 15 leaves sites next to nothing of a machine with other work
}


Trained = Callable[[], tuple[int, float]]


def simulate(config: SimulationConfig, announce: Callable[[RunPlan, list[str], Trained], None],
             observe: Callable[[Event], None]) -> RunSummary:  # fmt: skip
    """Run the configured federation and write its outputs to `config.output/config.name`.

    Before the first round, `announce` receives the plan, the sites' names, and what tells tokens and seconds of the
    training done so far; `observe` receives every event. A run whose quorum is lost ends with its outputs written and
    the reason in the summary; other errors are raised.
    """
    os.environ.update(_QUIET)
    logging.getLogger("flwr").setLevel(logging.ERROR)
    began = time.monotonic()
    folder = Path(config.output) / config.name
    check_folder(config, folder)
    use_threads(config.site.threads)
    observe(Phase("reading the records"))
    data = simulated_data(config)
    if wrong := data.check(config.model):
        observe(Phase(f"{len(wrong)} records cannot be used and are left out, the first: {wrong[0]}"))
    counts = data.unit_counts()
    config = _with_place(_with_nominal_size(config, counts))
    _check_federation(config, data)
    for text in _said_of_sizes(config, counts):
        observe(Phase(text))
    observe(Phase("planning: noise for the budget"))
    plan = make_plan(config, data.names)
    _check_quorum(config, plan, counts)
    observe(Phase("loading model and held-out set"))
    run = HeadOfficeRun(config)
    with alone_in(folder, config):
        if config.resume:
            plan = _as_before(plan, config, folder)
        else:
            write_plan(folder, plan, config)
        record = RunLog(folder / RECORD_FILE, [key_in(folder)])
        roster = roster_of(config, data.names, folder) if plan.distributed is not None else None

        def begin(grid: Grid) -> Coordinator:
            channel = PlainChannel(grid, config.federation.round_timeout, len(data.names))
            return run.coordinator(plan, channel, record, observe, _heads(config), roster)

        resume_sites(config, data.names, folder)
        with _site_log(folder):
            with _workers(config, folder, len(data.names)) as workers:
                announce(plan, data.names, workers.trained if workers is not None else trained)
                coordinator, stopped = _run(config, folder, begin, len(data.names), workers)
            budgets = {name: config.budget(name) for name in data.names}
            elsewhere = workers.memory if workers is not None else 0.0
            if config.site.folder is not None:
                _export_ledgers(config, data.names, folder, plan.run)
            audit = partial(_audit, folder, observe) if config.audit.report else None
            return run.finish(coordinator, stopped, budgets, time.monotonic() - began, elsewhere, audit)


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


def _with_place(config: SimulationConfig) -> SimulationConfig:
    """Make site.folder absolute: sites in processes of their own may work elsewhere."""
    place = config.site.folder and str(Path(config.site.folder).expanduser().absolute())
    return config.model_copy(update={"site": config.site.model_copy(update={"folder": place})})


def _heads(config: SimulationConfig) -> LedgerHeads | None:
    """Return what the server of this output folder knows of ledgers that outlive a run."""
    folder = config.site.folder
    return LedgerHeads(Path(config.output) / HEADS, f"{folder}/") if folder is not None else None


def _export_ledgers(config: SimulationConfig, names: list[str], folder: Path, run: str) -> None:
    """Keep the ledgers as they are now beside the run's record: they go on without it."""
    last = open_entry((folder / RECORD_FILE).read_text("utf-8").splitlines()[-1])
    end = End(run, last.number, last.digest)
    with writing(folder / LEDGERS):
        (folder / LEDGERS).mkdir(exist_ok=True)
    for name in names:
        place = folder_of(config, folder) / file_name(name)
        if (place / "ledger.db").exists():
            lines = "".join(
                f"{line}\n"
                for line in LedgerFile(place / "ledger.db").export(end, Identity.load_or_create(place / "identity"))
            )
            write_atomically(folder / LEDGERS / f"{file_name(name)}.jsonl", lines.encode())


def _as_before(plan: RunPlan, config: SimulationConfig, folder: Path) -> RunPlan:
    """Return the plan of the run that is resumed; raises ConfigError if the configuration asks for another."""
    before, earlier = read_as(folder / PLAN, RunPlan), read_as(folder / CONFIG, SimulationConfig)
    plan = continued(plan, before)
    changed = differences("", before.model_dump(), plan.model_dump())
    changed += differences("data", earlier.data.model_dump(), config.data.model_dump())
    for key in ("partition", "weights", "aggregation"):
        was, now = earlier.federation.model_dump()[key], config.federation.model_dump()[key]
        changed += differences(f"federation.{key}", was, now)
    if changed:
        raise ConfigError(f"resume=true continues the same plan, but these differ: {', '.join(changed)}")
    return plan


def _check_federation(config: SimulationConfig, data: SimulatedData) -> None:
    names = data.names
    for name in names:
        check_name(name)
    for key, named in (("federation.weights", config.federation.weights), ("site.budgets", config.site.budgets)):
        unknown = sorted(set(named) - set(names))
        if unknown:
            raise ConfigError(f"{key}: no site is called {', '.join(unknown)}; the sites are {', '.join(names)}")
    if (config.federation.quorum or 1) > len(names):
        raise ConfigError(f"federation.quorum={config.federation.quorum}, but there are only {len(names)} sites")
    processors = os.cpu_count() or 1
    here = config.federation.backend == "ray" and "RAY_ADDRESS" not in os.environ
    if here and config.federation.cpus_per_site > processors:
        raise ConfigError(
            f"federation.cpus_per_site={config.federation.cpus_per_site:g}, but there are {processors} processors"
        )


def _check_quorum(config: SimulationConfig, plan: RunPlan, counts: Mapping[str, int]) -> None:
    """Raise ConfigError if so many sites are too small to take part that no round can have its quorum."""
    least = least_units(config)
    left = sum(count >= least for count in counts.values())
    if left < plan.quorum:
        raise ConfigError(
            f"{left} of {len(counts)} sites have the {least} units that it takes to take part, and a round needs "
            f"{plan.quorum} sites. Give more records or fewer sites, or lower federation.quorum or site.min_units."
        )


def _said_of_sizes(config: SimulationConfig, counts: Mapping[str, int]) -> list[str]:
    """Return what the sizes of sites mean for a run; raises ConfigError where delta protects nobody at one of them."""
    least, delta = least_units(config), config.privacy.delta
    small = [f"{name} ({count})" for name, count in counts.items() if count < least]
    said = list[str]()
    if small:
        listed = ", ".join(small)
        said.append(f"{len(small)} of {len(counts)} sites have fewer than {least} units and take no part: {listed}")
    taking = {name: count for name, count in counts.items() if count >= least}
    if config.privacy.mode != "off" and taking:
        name = max(taking, key=lambda name: taking[name])
        if delta * taking[name] >= 1:
            raise ConfigError(
                f"privacy.delta={delta:g} is no protection among the {taking[name]} units of {name}: it must be below "
                f"1/units = {1 / taking[name]:.2g}"
            )
        if delta * taking[name] > 0.1:
            said.append(
                f"privacy.delta={delta:g} is weak protection among the {taking[name]} units of {name}: "
                f"{0.1 / taking[name]:.1g} or less is usual"
            )
    return said


def _processes(config: SimulationConfig, sites: int) -> int:
    """Return how many processes train sites beside one another; 1 is this one."""
    if config.federation.backend == "ray" or pick_device(config.site.device) != "cpu":
        return 1  # Ray has its own; a GPU runs one model at a time
    return min(config.federation.processes or max(1, _cores() // (config.site.threads or 1)), sites)


def _cores() -> int:
    return len(os.sched_getaffinity(0))


@contextlib.contextmanager
def _workers(config: SimulationConfig, folder: Path, sites: int) -> Iterator[Workers | None]:
    processes = _processes(config, sites)
    if processes == 1:
        yield None
        return
    threads = config.site.threads or max(1, _cores() // processes)
    site = config.site.model_copy(update={"threads": threads})
    shared = config.model_copy(update={"site": site}).model_dump_json()
    workers = Workers(processes, sites, shared, str(folder.resolve()))
    try:
        yield workers
    finally:
        workers.close()


def _run(
    config: SimulationConfig, folder: Path, begin: Callable[[Grid], Coordinator], sites: int, workers: Workers | None
) -> tuple[Coordinator, str]:
    """Begin, and run the rounds that are left; returns also why they ended early, or nothing."""
    client = client_app(partial(connect, config.model_dump_json(), str(folder.resolve()), workers))
    begun: list[Coordinator] = []

    try:
        with _grid(config, folder, client, sites) as grid:
            begun.append(begin(grid))
            begun[0].run()
    except QuorumLost as error:
        return begun[0], f"{error} What the sites said of it is in {folder / SITE_LOG}."
    return begun[0], ""


@contextlib.contextmanager
def _grid(config: SimulationConfig, folder: Path, client: ClientApp, sites: int) -> Iterator[Grid]:
    if config.federation.backend == "ray":
        from simulations.ray_grid import ray_grid  # late: Ray's import takes a second

        federation = config.federation
        with ray_grid(client, sites, federation.cpus_per_site, federation.gpus_per_site, folder.resolve()) as on_ray:
            yield on_ray
    else:
        with contextlib.closing(InProcessGrid(client, sites)) as grid:
            yield grid


def _audit(folder: Path, observe: Callable[[Event], None]) -> Empirical | None:
    """Write the audit report in both languages, and the keys to verify it with; return what the attack came to."""
    signer = key_in(folder)
    pages = [("audit", "en"), ("audit.ko", "ko")]
    written = write_audit(
        folder, folder / AUDIT, pages, signer=signer, cross_checks=CROSS_CHECKS, say=lambda text: observe(Phase(text))
    )
    known = {HEAD_OFFICE: signer.public.fingerprint, **{s.name: s.fingerprint for s in written.audit.sites}}
    lines = [f"{name} {fingerprint}" for name, fingerprint in known.items() if fingerprint]
    heading = "# In a deployment every site tells its own fingerprint; here one process plays all of them."
    write_atomically(folder / KEYS, ("\n".join([heading, *lines]) + "\n").encode())
    for problem in written.problems:
        logging.getLogger("fedllm").warning(problem)
    return written.audit.attack


@contextlib.contextmanager
def _site_log(folder: Path) -> Iterator[None]:
    handler = log_to(folder)
    try:
        yield
    finally:
        logging.getLogger("fedllm.site").removeHandler(handler)
        handler.close()
