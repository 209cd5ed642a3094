"""The sites of a simulation in processes of their own, so that several train beside one another on one machine.

A site stays in one process for the whole run: its secrets of secure aggregation live there. The processes are forked
from a server that has the imports behind it and has computed nothing; what protects anyone is drawn from the operating
system after the fork.
"""

import contextlib
import logging
import os
import resource
import signal
import threading
from logging.handlers import QueueHandler
from multiprocessing import forkserver, get_context
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from fedllm.config import FederationConfig
from fedllm.errors import FederationError, FedllmError
from fedllm.processes import without_main

if TYPE_CHECKING:
    from flwr.app import Context

    from client.app import Handler

_IMPORTS = ["simulations.sites", "transformers.models.auto.modeling_auto", "dp_accounting.pld", "dp_accounting.rdp"]
_ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
_MB = 1024  # of ru_maxrss
_site_log = logging.getLogger("fedllm.site")


def warm_up(federation: FederationConfig) -> None:
    """Make ready for a simulation, before anything heavy is imported: no progress bars of the libraries' own.

    Starts the server that `Workers` forks, if sites may train in several processes: its imports take as long as this
    process's own.
    """
    os.environ.setdefault("TQDM_DISABLE", "1")
    if federation.backend != "in-process" or federation.processes == 1:
        return
    before = {name: os.environ.get(name) for name in (*_ONE_THREAD, "JE_ARROW_MALLOC_CONF")}
    # A process that has threads cannot be forked safely: no library starts any at its import.
    os.environ.update(dict.fromkeys(_ONE_THREAD, "1"), JE_ARROW_MALLOC_CONF="background_thread:false")
    try:
        forkserver.set_forkserver_preload(_IMPORTS)
        forkserver.ensure_running()
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def process_ended(fewer: str, process: int, told: set[int]) -> FederationError:
    """Return the error of a process that has ended with its sites, which their log tells once; `fewer`: what to do."""
    error = FederationError(
        f"a process that trains sites has ended. Was it killed for memory? {fewer} or lower site.micro_batch, and "
        "continue with resume=true."
    )
    if process not in told:
        told.add(process)
        _site_log.error(str(error))
    return error


class Workers:
    """`processes` that share the sites of a run among them; each takes one request after the other."""

    def __init__(self, processes: int, sites: int, config_json: str, folder: str) -> None:
        context = get_context("forkserver")
        self._workers: list[tuple[Connection, threading.Lock, Any]] = []
        self._used = [(0, 0.0)] * processes  # tokens and seconds of training
        self._ended = set[int]()  # processes that have, and whose sites' log says so
        self.memory = 0.0
        for number in range(processes):
            here, there = context.Pipe()
            process = context.Process(
                target=_serve, args=(there, config_json, folder, range(number, sites, processes)), daemon=True
            )
            with without_main():
                process.start()
            there.close()
            self._workers.append((here, threading.Lock(), process))

    def handle(self, site: int, request: bytes) -> bytes:
        """Let the site with this number answer; raises FederationError if its process has ended."""
        worker = site % len(self._workers)
        pipe, lock, _ = self._workers[worker]
        with lock:
            try:
                pipe.send((site, request))
                answer, self._used[worker], notes = pipe.recv()
            except (EOFError, OSError):
                raise process_ended("Lower federation.processes", worker, self._ended) from None
        for note in notes:
            _site_log.handle(note)
        if isinstance(answer, FedllmError):
            raise answer
        return bytes(answer)

    def trained(self) -> tuple[int, float]:
        """Return tokens and seconds of the training done so far; the processes train at the same time."""
        return sum(tokens for tokens, _ in self._used), max(seconds for _, seconds in self._used)

    def close(self) -> None:
        """End the processes. `memory` is then the most that they used, in MB; what they share counts for each."""
        for pipe, lock, process in self._workers:
            if not lock.acquire(timeout=1):  # seconds; a site that never returned
                process.kill()
            else:
                try:
                    pipe.send(None)
                    self.memory += pipe.recv()
                except (EOFError, OSError):
                    pass  # it has ended before
            pipe.close()
            process.join()


def _serve(pipe: Connection, config_json: str, folder: str, mine: range) -> None:
    """Answer requests until there are no more, or the process that makes them has ended, however it did."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that the user sees
    from fedllm.training.model_context import trained
    from simulations.sites import ELSEWHERE, site_in

    notes = SimpleQueue[logging.LogRecord]()  # for the screen, which is another process's
    _site_log.addHandler(QueueHandler(notes))
    requests: SimpleQueue[tuple[int, bytes] | None] = SimpleQueue()
    threading.Thread(target=_listen, args=(pipe, requests), daemon=True).start()
    with contextlib.suppress(FedllmError):  # the first request will say it
        for site in mine:
            site_in(config_json, folder, site)
    while (asked := requests.get()) is not None:
        site, request = asked
        answer: bytes | FedllmError
        try:
            answer = site_in(config_json, folder, site).handle(request)
        except FedllmError as error:
            answer = error
        said = [notes.get() for _ in range(notes.qsize())]
        for note in said:
            setattr(note, ELSEWHERE, True)
        pipe.send((answer, trained(), said))
    pipe.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / _MB)


def _listen(pipe: Connection, requests: "SimpleQueue[tuple[int, bytes] | None]") -> None:
    while True:
        try:
            asked = pipe.recv()
        except (EOFError, OSError):
            os._exit(1)  # nobody waits for the answer: as if killed, in the middle of whatever it is
        requests.put(asked)
        if asked is None:
            return


def connect(config_json: str, folder: str, workers: Workers | None, context: "Context") -> "Handler":
    """Find the site of a Flower node: in one of the `workers`, or in this process, which makes all on the first call.

    Lives in an importable module, so that a Ray actor keeps its sites between rounds.
    """
    number = int(context.node_config["partition-id"])
    # The round's own deadline is all that a simulation needs.
    if workers is not None:
        return lambda request, timeout: workers.handle(number, request)
    from simulations.sites import site_in

    site = site_in(config_json, folder, number)
    return lambda request, timeout: site.handle(request)
