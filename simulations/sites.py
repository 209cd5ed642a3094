"""The sites of a simulation: one process-wide set, its table read and its model loaded once."""

import contextlib
import hashlib
import logging
import math
import threading
from collections.abc import Sequence
from functools import cache, lru_cache, partial
from multiprocessing import parent_process
from pathlib import Path

from client.policy import widest
from client.records import Declared, SiteRecords, load_records
from client.site import Site
from client.unfinished import Unfinished
from fedllm.audit.evidence import file_name
from fedllm.config import DataConfig, ModelConfig, PartitionConfig, SimulationConfig
from fedllm.crypto.identity import Identity, PublicIdentity
from fedllm.errors import DataError
from fedllm.privacy.ledger_place import LedgerPlace
from fedllm.shown import LogLines
from fedllm.training.data import Row, check_named, columns_of, naming, person, place_of, read_rows, text_of
from fedllm.training.model import Reader, load_reader
from fedllm.training.model_context import open_for_training, use_threads
from server.checkpoint import writing
from simulations.partition import partition

SITE_LOG = "sites/sites.log"
_NAMED = 100  # records that cannot be used, by an error
ELSEWHERE = "written_elsewhere"  # mark of a log record that another process of the run has written to that file


class SimulatedData:
    """The table of all sites and who owns which rows."""

    def __init__(self, data: DataConfig, cut: PartitionConfig, by_person: bool, seed: int) -> None:
        """Read and partition the data; raises DataError or ConfigError if that fails."""
        self._data = data
        self._unit = data.unit if by_person else None
        self._records: dict[tuple[str, ModelConfig], SiteRecords] = {}
        found = list(read_rows(data.train, data.train_split, data, alone=False))
        rows = [row for row in found if not isinstance(row, DataError)]
        if rows:
            with naming(data.train):
                check_named(columns_of(rows), data, [data.unit, cut.column])
        if not found:
            raise DataError(f"{data.train} holds no records")
        placed = [_placed(row, number, [cut.column, self._unit]) for number, row in enumerate(found)]
        self._rows = [row for row in placed if not isinstance(row, DataError)]
        self._wrong = [row for row in placed if isinstance(row, DataError)]
        if not self._rows:
            raise self._refusal(self._wrong)
        with naming(data.train):
            self._owned = partition(self._rows, cut, self._unit, seed)
        self.names = list(self._owned)
        self._counts = {name: self._units_of(owned) for name, owned in self._owned.items()}

    def _units_of(self, owned: Sequence[int]) -> int:
        return len(owned) if self._unit is None else len({person(self._rows[row][self._unit]) for row in owned})

    def unit_counts(self) -> dict[str, int]:
        """Return the number of privacy units of each site. For the simulation's owner: no site tells its own."""
        return self._counts

    def records(self, name: str, model: ModelConfig) -> SiteRecords:
        """Return the records of one site, tokenised. Their owner, who simulates, declares what is true of them."""
        declared = Declared(self._counts[name], "record" if self._unit is None else "person", model.labels)
        if (name, model) not in self._records:
            rows = [self._rows[row] for row in self._owned[name]]
            self._records[name, model] = load_records(
                rows, self._data, self._data.unit, declared, {model.source: _reader(model)}
            )
        return self._records[name, model]

    def check(self, model: ModelConfig) -> list[DataError]:
        """Tokenise the records of all sites, and return why some cannot be used: whoever simulates owns them all.

        Raises DataError that names them where they are more than data.max_bad.
        """
        wrong = [
            *self._wrong,
            *(error for name in self.names for error in self.records(name, model).wrong[model.source]),
        ]
        if len(wrong) > self._data.max_bad:
            raise self._refusal(wrong)
        return wrong

    def _refusal(self, wrong: Sequence[DataError]) -> DataError:
        lines = [*map(str, wrong[:_NAMED]), *([f"... and {len(wrong) - _NAMED} more"] if len(wrong) > _NAMED else [])]
        return DataError(
            f"{self._data.train}: {len(wrong)} of {len(self._rows) + len(self._wrong)} records cannot be used. Correct "
            f"them, or leave out so many with data.max_bad={len(wrong)}.\n" + "\n".join(lines)
        )


def _placed(row: Row | DataError, number: int, columns: Sequence[str | None]) -> Row | DataError:
    """Return a row, or an error where nobody knows whose it is."""
    if isinstance(row, DataError):
        return row
    try:
        for column in filter(None, columns):
            text_of(row.get(column), column)
    except DataError as error:
        return DataError(f"{place_of(row, number)}: {error}")
    return row


@lru_cache(maxsize=1)
def _read(data_json: str, cut: PartitionConfig, by_person: bool, seed: int) -> SimulatedData:
    return SimulatedData(DataConfig.model_validate_json(data_json), cut, by_person, seed)


@lru_cache(maxsize=1)
def _reader(model: ModelConfig) -> Reader:
    return load_reader(model)


_making_sites = threading.Lock()


class _SiteLog(logging.FileHandler):
    """A log that ends where the disk is full, and does not hide the error that the run ends with."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  # logging's own name
        """Print nothing: a traceback may quote a record."""

    def close(self) -> None:
        with contextlib.suppress(OSError):  # what a failed write left in the buffer cannot be written now either
            super().close()


def log_to(folder: Path) -> logging.Handler:
    """Send what sites say of themselves, which may tell more than the server may know, to the run's folder alone.

    Raises CheckpointError if the file cannot be opened.
    """
    with writing(folder / SITE_LOG):
        (folder / SITE_LOG).parent.mkdir(exist_ok=True, mode=0o700)
        handler = _SiteLog(folder / SITE_LOG, encoding="utf-8")
    handler.addFilter(lambda record: not hasattr(record, ELSEWHERE))
    handler.setFormatter(LogLines())
    logger = logging.getLogger("fedllm.site")
    logger.propagate = False
    logger.addHandler(handler)
    return handler


def simulated_data(config: SimulationConfig) -> SimulatedData:
    """Return the data of a configuration, read once in a process."""
    return _read(
        config.data.model_dump_json(), config.federation.partition, config.privacy.unit == "person", config.seed
    )


@cache
def _site(config_json: str, folder: str, number: int) -> Site:
    config = SimulationConfig.model_validate_json(config_json)
    data = simulated_data(config)
    return make_site(config, data, data.names[number], Path(folder))


@lru_cache(maxsize=1)
def _set_up(config_json: str, folder: str) -> None:
    """Make this process ready for sites of a run, and forget those of another."""
    _site.cache_clear()
    _roster.cache_clear()
    config = SimulationConfig.model_validate_json(config_json)
    if parent_process() is not None or config.federation.backend == "ray":  # Ray's own log would be public
        log_to(Path(folder))
        use_threads(config.site.threads)


def folder_of(config: SimulationConfig, folder: Path) -> Path:
    """Return where the sites of a run in `folder` keep their ledgers and keys."""
    return folder / "sites" if config.site.folder is None else Path(config.site.folder)


def least_units(config: SimulationConfig) -> int:
    """Return the number of units below which a site takes no part."""
    if config.site.min_units is not None:
        return config.site.min_units
    # Half of the nominal size at most: this is taken from all sites, and none of them is too small for it by rounding.
    expected_batch = min(config.privacy.sampling_rate, 0.5) * (config.privacy.units_per_site or 0)
    return max(1, math.ceil(expected_batch))


def make_site(config: SimulationConfig, data: SimulatedData, name: str, folder: Path) -> Site:
    """Return one simulated site of a run in `folder`."""
    site = config.site
    policy = widest(  # in a simulation the sites are the researcher's own, who sees all of their times anyway
        config.budget(name) if config.privacy.mode != "off" else math.inf,
        config.privacy.delta,
        unit=config.privacy.unit,
        min_units=least_units(config),
        evaluation_share=config.evaluation_share,
    )
    place = folder_of(config, folder) / file_name(name)
    return Site(
        name=name,
        policy=policy,
        ledger=LedgerPlace(place / "ledger.db", place / "ledger.anchor"),
        identity=partial(Identity.load_or_create, place / "identity"),
        context=lambda plan: open_for_training(plan, plan.model, site.device, site.checkpointing),
        records=data.records(name, config.model),
        micro_batch=site.micro_batch,
        peers=lambda _: roster_of(config, data.names, folder),
        self_check=config.privacy.self_check,
        split_key=hashlib.sha256(f"{config.seed} {name}".encode()).digest(),  # a seed is public: a run can be repeated
    )


def resume_sites(config: SimulationConfig, names: list[str], folder: Path) -> None:
    """Let sites go on whose process was killed: a simulation's user is their owner, and has acted."""
    for name in names:
        Unfinished(folder_of(config, folder) / file_name(name) / "ledger.db").end()


def roster_of(config: SimulationConfig, names: list[str], folder: Path) -> dict[str, PublicIdentity]:
    """Return who the sites are; in a simulation all of them can look at one another's keys."""
    return _roster(folder_of(config, folder), tuple(names))


@lru_cache(maxsize=1)
def _roster(place: Path, names: tuple[str, ...]) -> dict[str, PublicIdentity]:
    """Read every site's keys, once for all sites of a process."""
    return {name: Identity.load_or_create(place / file_name(name) / "identity").public for name in names}


def site_in(config_json: str, folder: str, number: int) -> Site:
    """Return the site with this number, made once in a process; its sites train in turns."""
    with _making_sites:
        _set_up(config_json, folder)
        return _site(config_json, folder, number)
