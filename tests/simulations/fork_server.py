"""Runs fedllm's command line in forked processes: the imports are made once, every command is a process of its own.

Reads one JSON request a line and answers each with a number, or null: a process id, an exit code if there is one, or 0.
"""

import gc
import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

import dp_accounting.pld
import dp_accounting.rdp
import matplotlib.backends.backend_agg
import matplotlib.backends.backend_svg
import transformers

import fedllm.cli.live_view
import fedllm.cli.main
import simulations.simulate

# What a simulation imports late, from libraries that import late themselves.
_WARM = (
    dp_accounting.pld,
    dp_accounting.rdp,
    matplotlib.backends.backend_agg,
    matplotlib.backends.backend_svg,
    fedllm.cli.live_view,
    simulations.simulate,
    transformers.LlamaForCausalLM,
    transformers.BertForSequenceClassification,
    transformers.PreTrainedTokenizerFast,
)


def start(request: dict[str, Any]) -> int:
    """Fork a process that runs `fedllm` with the arguments, and return its id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        for descriptor, name in ((1, "out"), (2, "err")):
            file = os.open(Path(request["folder"]) / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, descriptor)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever started the tests may ignore it
        os.environ.update(request["env"])
        os.chdir(request["cwd"])
        sys.argv = ["fedllm", *request["arguments"]]
        try:
            fedllm.cli.main.main()
            code = 0
        except SystemExit as leaving:
            code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def ended(pid: int) -> int | None:
    """Return the exit code of a process, or minus the signal that ended it; None while it runs."""
    found, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if found else None


def main() -> None:
    """Serve until the requests end; then end what still runs."""
    gc.freeze()  # so that no command looks through all that was imported, and copies its pages
    running: set[int] = set()
    for line in sys.stdin:
        request = json.loads(line)
        answer: int | None = 0
        if "wait" in request:
            answer = ended(request["wait"])
            if answer is not None:
                running.discard(request["wait"])
        elif "kill" in request:
            os.kill(request["kill"], request["signal"])
        else:
            answer = start(request)
            running.add(answer)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
    for pid in running:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


if __name__ == "__main__":
    main()
