"""What one process needs to train or evaluate: base model, adapter and engine, loaded once and shared."""

import threading
from dataclasses import dataclass

import torch

from fedllm.config import AdapterConfig, ModelConfig
from fedllm.plan import RunPlan
from fedllm.training.adapter import AdapterModel, attach
from fedllm.training.engine import Engine
from fedllm.training.model import load_base, pick_device


@dataclass(frozen=True)
class ModelContext:
    """A base model with its adapter and the engine that trains it; the adapter's lock guards all three."""

    adapter: AdapterModel
    engine: Engine


def use_threads(threads: int | None) -> None:
    """Set how many CPU threads torch uses in this process; None leaves torch's own choice."""
    if threads is not None:
        torch.set_num_threads(threads)


_Key = tuple[ModelConfig, AdapterConfig, int, str]
_open: dict[_Key, ModelContext] = {}
_opening = threading.Lock()


def open_context(model: ModelConfig, adapter: AdapterConfig, seed: int, device: str) -> ModelContext:
    """Return the process's ModelContext for these values, loading the base only if it is not there yet.

    One is kept: opening another frees the memory of the last.
    """
    key = (model, adapter, seed, pick_device(device))
    with _opening:
        if key not in _open:
            _open.clear()
            attached = attach(load_base(model, key[3]), model, adapter, seed)
            _open[key] = ModelContext(attached, Engine(attached))
        return _open[key]


def open_for_training(plan: RunPlan, model: ModelConfig, device: str, checkpointing: bool) -> ModelContext:
    """Return the ModelContext of a plan, its engine set up; `model` is the plan's, as this site has it."""
    context = open_context(model, plan.adapter, plan.seed, device)
    with context.adapter.lock:
        context.engine.set_up(plan, checkpointing)
    return context


def trained() -> tuple[int, float]:
    """Return tokens and seconds of the training done in this process so far; private, for a simulation's screen."""
    engines = [context.engine for context in _open.values()]
    return sum(engine.tokens for engine in engines), sum(engine.seconds for engine in engines)
