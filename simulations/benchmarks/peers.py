"""The same federation in fedllm, as a stock Flower app with Opacus, and in pfl-research: a round's seconds, and memory.

python -m simulations.benchmarks.peers --size demo --rounds 3

Same sites, records, model, adapter (B alone), clip, noise multiplier, sampling rate, local steps: fedllm runs first,
and its plan is what the peers are told. A record is the unit, since Opacus knows no other. Each framework times its own
rounds; memory is the largest sum over its processes of what each holds for itself and its part of what is shared. Turns
alternate, and ratios are taken within a turn. fedllm scores nothing and writes no report here.

pfl-research is no dependency of fedllm (`pip install --no-deps pfl prv-accountant`) and is left out where it is
missing. It has no DP-SGD at a site: it clips and noises the update of a whole site, at a server that all trust.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

import psutil
import typer
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from simulations.benchmarks.bench import machine
from simulations.benchmarks.step import SIZES

_EVERY = 0.5  # seconds between two looks at memory
_OFF = ("evaluation.every=null", "audit.report=false", "audit.canaries=0", "data.heldout=null", "privacy.unit=record")


@dataclass(frozen=True)
class Result:
    """What one framework took."""

    seconds: list[float]  # of each round after the first, in which some load and compile
    whole: float  # seconds of the process, start included
    memory: float  # MB
    records: float  # a round
    epsilon: str


def _measured(command: list[str], folder: Path) -> tuple[str, float, float]:
    """Return a process' output, its seconds, and the most MB that it and its children held."""
    began, most, ended = time.monotonic(), [0.0], threading.Event()
    with (folder / "errors.log").open("wb") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)

        def look() -> None:
            while not ended.wait(_EVERY):
                total = 0
                try:
                    parent = psutil.Process(process.pid)
                    for each in [parent, *parent.children(recursive=True)]:
                        total += each.memory_full_info().pss
                except psutil.Error:
                    continue  # one that ended while it was looked at
                most[0] = max(most[0], total / 2**20)

        watcher = threading.Thread(target=look)
        watcher.start()
        out, _ = process.communicate()
        ended.set()
        watcher.join()
    if process.returncode:
        raise typer.BadParameter(f"{command}: exit code {process.returncode}\n{(folder / 'errors.log').read_text()}")
    return out, time.monotonic() - began, most[0]


def _fedllm(folder: Path, model: str, rounds: int, mode: str, name: str) -> Result:
    command = [sys.executable, "-m", "fedllm.cli", "simulate", f"privacy={mode}", f"training.rounds={rounds}",
               f"model.source={model}", f"output={folder}", f"name={name}", *_OFF]  # fmt: skip
    _, whole, memory = _measured(command, folder)
    lines = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text("utf-8").splitlines()]
    plan = json.loads((folder / name / "plan.json").read_text("utf-8"))
    used = plan["privacy"]["sampling_rate"] * plan["training"]["local_steps"] * _records(folder)
    return Result([line["seconds"] for line in lines[2:]], whole, memory, used,
                  f"{lines[-1]['epsilon']:.2f}, a record, the whole run")  # fmt: skip


def _records(folder: Path) -> int:
    return sum(len(path.read_text("utf-8").splitlines()) for path in folder.glob("site-*.jsonl"))


def _peer(folder: Path, module: str, meaning: str) -> Result:
    """Run another framework's federation; its epsilon is of what `meaning` says."""
    out, whole, memory = _measured([sys.executable, "-m", f"simulations.benchmarks.{module}", str(folder)], folder)
    rounds = [json.loads(line) for line in out.splitlines() if line.startswith('{"seconds"')]
    return Result([each["seconds"] for each in rounds[1:]], whole, memory,
                  statistics.mean(each["records"] for each in rounds),
                  f"{max(each['epsilon'] for each in rounds):.2f}, {meaning}")  # fmt: skip


def _write_sites(folder: Path) -> int:
    """Write each site's records as a stock app would find them, and return how many sites there are."""
    by_site: dict[str, list[dict[str, str]]] = {}
    source = resources.files("simulations.demo") / "data" / "train.jsonl"
    for line in source.read_text("utf-8").splitlines():
        row = json.loads(line)
        record = {"prompt": f"Q: {row['question']}\nA:", "answer": f" {row['answer']}"}
        by_site.setdefault(row["branch"], []).append(record)
    for number, rows in enumerate(by_site.values()):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"site-{number}.jsonl").write_text(text, "utf-8")
    return len(by_site)


def _model(size: str, folder: Path) -> str:
    """Return the folder of the base: the demo's, or a Llama of 30M random values with the demo's tokenizer."""
    demo = str(resources.files("simulations.demo") / "base")
    if size == "demo":
        return demo
    tokenizer = AutoTokenizer.from_pretrained(demo, trust_remote_code=False)
    hidden, layers, mlp, heads, kv_heads, _ = SIZES[size]
    config = LlamaConfig(
        hidden_size=hidden, num_hidden_layers=layers, intermediate_size=mlp, num_attention_heads=heads,
        num_key_value_heads=kv_heads, vocab_size=len(tokenizer), max_position_embeddings=256, tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    return str(folder / "base")


def _tell(folder: Path, name: str, model: str, sites: int) -> None:
    plan: dict[str, Any] = json.loads((folder / name / "plan.json").read_text("utf-8"))
    told = {
        "model": model, "sites": sites, "max_length": plan["model"]["max_length"],
        **{key: plan["adapter"][key] for key in ("rank", "alpha")},
        **{key: plan["privacy"][key] for key in ("noise_multiplier", "delta", "clip_norm", "sampling_rate")},
        **{key: plan["training"][key] for key in ("rounds", "local_steps", "learning_rate")},
    }  # fmt: skip
    (folder / "peer.json").write_text(json.dumps(told), "utf-8")


def main(
    size: Annotated[Literal["demo", "30M"], typer.Option("--size", help="demo, or 30M: random weights.")] = "demo",
    rounds: Annotated[int, typer.Option("--rounds", min=2, help="Rounds of each run; the first is not timed.")] = 3,
    repetitions: Annotated[int, typer.Option("--repetitions", min=1, help="Turns.")] = 1,
) -> None:
    """Let the frameworks take turns, and print the table."""
    console = Console()
    with_pfl = find_spec("pfl") is not None
    turns: list[dict[str, Result]] = []
    for _ in range(repetitions):
        with tempfile.TemporaryDirectory() as made:
            folder = Path(made)
            model, sites = _model(size, folder), _write_sites(folder)
            results = {"fedllm, privacy=local": _fedllm(folder, model, rounds, "local", "local")}
            _tell(folder, "local", model, sites)
            results["fedllm, privacy=distributed"] = _fedllm(folder, model, rounds, "distributed", "distributed")
            results["Flower and Opacus on Ray"] = _peer(folder, "stock_flower", "a record, one round")
            if with_pfl:
                results["pfl-research"] = _peer(folder, "stock_pfl", "a site, the whole run, a trusted server")
            turns.append(results)
            for name, result in results.items():
                console.print(f"{name}: {result}", markup=False, highlight=False, soft_wrap=True)

    headings = ("", "s a round", "/ Flower", "whole run, s", "MB", "records a round", "epsilon")
    table = Table(*headings, title=f"{size}, {sites} sites")
    for name in turns[0]:
        seconds = [statistics.median(turn[name].seconds) for turn in turns]
        ratios = [
            s / statistics.median(turn["Flower and Opacus on Ray"].seconds)
            for s, turn in zip(seconds, turns, strict=True)
        ]
        middle = {
            key: statistics.median(getattr(turn[name], key) for turn in turns) for key in ("whole", "memory", "records")
        }
        table.add_row(
            name, f"{statistics.median(seconds):.2f}",
            f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})",
            f"{middle['whole']:.0f}", f"{middle['memory']:.0f}", f"{middle['records']:.0f}", turns[0][name].epsilon,
        )  # fmt: skip
    console.print(table)
    console.print(machine(), markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
