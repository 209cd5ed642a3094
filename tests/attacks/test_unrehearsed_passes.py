"""Attack: the server has a short plan rehearse the passes, and then a long one of the same model, which is compiled.

Stopped by rehearsals that are remembered with all that decides what passes there are and what computes them, so that no
shape is met, or compiled, for the first time while records are used.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from fedllm.training.engine import Engine
from tests.attacks.office import context, plan_of


@pytest.mark.parametrize("change", ["compiled", "checkpointing", "threads", "nothing"])
def test_what_changes_the_passes_has_them_rehearsed_again(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    engine, passes = Engine(context(plan_of(tiny_llama)).adapter), list[tuple[int, int]]()
    before, honest = torch.get_num_threads(), Engine.pass_gradients

    def pass_gradients(self: Engine, units: Any, width: int, micro_batch: int) -> Any:
        passes.append((width, self.rows(width, micro_batch)))
        return honest(self, units, width, micro_batch)

    monkeypatch.setattr(Engine, "pass_gradients", pass_gradients)
    engine.rehearse(8, 12)
    first = sorted(set(passes))
    passes.clear()
    try:
        if change == "compiled":
            monkeypatch.setattr(Engine, "compiled", True)
        elif change == "checkpointing":
            engine._blocks.checkpointing = True
        elif change == "threads":
            torch.set_num_threads(before + 1)
        engine.rehearse(8, 12)
    finally:
        torch.set_num_threads(before)
    if change == "nothing":
        assert not passes
    elif change == "compiled":
        assert {rows for _, rows in passes} == {1}, "compiled code serves one record at a time"
    else:
        assert sorted(set(passes)) == first
