"""A process loads a base model once, however many sites ask for it."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

from fedllm.config import AdapterConfig, ModelConfig
from fedllm.errors import ModelError
from fedllm.training import model_context
from fedllm.training.model import pick_device
from fedllm.training.model_context import open_context

MakeConfig = Callable[[str], ModelConfig]
ADAPTER = AdapterConfig(rank=2, alpha=4.0)


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[ModelConfig]:
    """Return the list of the models loaded so far; nothing is open yet."""
    seen: list[ModelConfig] = []
    load = model_context.load_base

    def count(config: ModelConfig, *rest: Any) -> Any:
        seen.append(config)
        return load(config, *rest)

    monkeypatch.setattr(model_context, "load_base", count)
    monkeypatch.setattr(model_context, "_open", {})
    return seen


def test_equal_arguments_share_one_base(model_config: MakeConfig, loads: list[ModelConfig]) -> None:
    first = open_context(model_config("llama"), ADAPTER, 0, "cpu")
    again = open_context(model_config("llama").model_copy(), AdapterConfig(rank=2, alpha=4.0), 0, "cpu")
    assert again is first
    assert len(loads) == 1


def test_sites_that_ask_at_once_share_one_base(model_config: MakeConfig, loads: list[ModelConfig]) -> None:
    config = model_config("llama")
    with ThreadPoolExecutor(4) as threads:
        opened = list(threads.map(lambda _: open_context(config, ADAPTER, 0, "cpu"), range(8)))
    assert len({id(one) for one in opened}) == 1
    assert len(loads) == 1


def test_other_arguments_open_another_workspace(model_config: MakeConfig, loads: list[ModelConfig]) -> None:
    first = open_context(model_config("llama"), ADAPTER, 0, "cpu")
    others = [
        open_context(model_config("llama"), ADAPTER, 1, "cpu"),
        open_context(model_config("llama"), AdapterConfig(rank=3, alpha=4.0), 1, "cpu"),
        open_context(model_config("untied"), AdapterConfig(rank=3, alpha=4.0), 1, "cpu"),
    ]
    assert len(loads) == 4
    assert len({opened.adapter.spec.digest for opened in [first, *others]}) == 4
    assert not np.array_equal(first.adapter.initial, others[1].adapter.initial)


def test_only_the_last_workspace_is_kept_in_memory(model_config: MakeConfig, loads: list[ModelConfig]) -> None:
    for seed in (0, 1, 0):
        open_context(model_config("llama"), ADAPTER, seed, "cpu")
    assert len(loads) == 3


def test_a_failed_opening_leaves_nothing_half_open(model_config: MakeConfig, loads: list[ModelConfig]) -> None:
    with pytest.raises(ModelError):
        open_context(model_config("llama"), AdapterConfig(targets=("no_such_layer",)), 0, "cpu")
    assert open_context(model_config("llama"), ADAPTER, 0, "cpu").adapter.spec.dimension
    assert len(loads) == 2


@pytest.mark.parametrize("device", ["cuda:99", "tpu", "", "cpu:x"])
def test_a_device_that_is_not_there_is_an_error_of_ours(
    model_config: MakeConfig, loads: list[ModelConfig], device: str
) -> None:
    with pytest.raises(ModelError, match=r"site\.device"):
        open_context(model_config("llama"), ADAPTER, 0, device)
    assert not loads


@pytest.mark.parametrize(("given", "kept"), [(None, ":4096:8"), (":0:0", ":4096:8"), (":16:8", ":16:8")])
def test_on_a_gpu_products_have_a_workspace_with_which_they_repeat_their_bits(
    monkeypatch: pytest.MonkeyPatch, given: str | None, kept: str
) -> None:
    variable = "CUBLAS_WORKSPACE_CONFIG"
    monkeypatch.setenv(variable, given or "")
    if given is None:
        monkeypatch.delenv(variable)
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: torch.ones(1))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device("cpu") == "cpu"
    assert os.environ.get(variable) == given
    assert pick_device("auto") == "cuda"
    assert os.environ[variable] == kept
