"""Transformer blocks that are compiled, or recomputed, only while per-unit gradients are computed.

Outside of that the model is as transformers made it: evaluation, generation, files and names know nothing of this.
"""

import atexit
import importlib.util
import os
import shutil
import stat
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fedllm.errors import ModelError, first_line
from fedllm.training.data import IGNORE, Batch
from fedllm.training.precision import SAME_COMPILED

# Parameters x tokens; twice what docs/benchmarks.md has. On a GPU never: compiled code is given one record at a time,
# and a pass of 32 took little longer than one of one.
_PAYS_FROM = {"cpu": 4e12}
# In bfloat16 on the CPU, attention written out and compiled with its block beats SDPA, .79 to .88 of a step at 32 to
# 512 tokens. It holds scores of all pairs of tokens, so the longest are left to SDPA.
_SHORT = 256  # tokens
_VARIANTS = 64  # compiled versions of a block that a process may hold: masks, kinds of layers, models
_Forward = Callable[..., Any]


class Blocks:
    """The transformer blocks that hold adapted layers, and how they run inside `running`."""

    def __init__(self, model: nn.Module) -> None:
        self._config: Any = model.config
        self._blocks = _adapted_blocks(model)
        self._compiled: list[_Forward] = []
        self._writes_out = False
        self.checkpointing = False  # recompute activations in the backward pass

    @property
    def compiled(self) -> bool:
        """Whether compiled code is in use."""
        return bool(self._compiled)

    @contextmanager
    def running(self, batch: Batch) -> Iterator[None]:
        """Run the blocks as they were set up, on `batch`; not from two threads at once."""
        # compiled for passes of one record; of one token torch.compile would make a version of its own
        compiled = self.compiled and batch.input_ids.shape[0] == 1 < batch.input_ids.shape[1]
        forwards = self._compiled if compiled else [block.forward for block in self._blocks]
        with ExitStack() as after:
            after.enter_context(_set(self._config, "use_cache", False))  # keys and values serve generation only
            if compiled:
                after.enter_context(_compiler_settings())
                if self._writes_out:
                    after.enter_context(_set(self._config, "_attn_implementation", "eager"))
            if compiled or self.checkpointing:
                for block, forward in zip(self._blocks, forwards, strict=True):
                    after.enter_context(_set(block, "forward", _wrapped(forward, compiled, self.checkpointing)))
            yield

    def compile(self, gradients: Callable[[Batch], Tensor], max_length: int, *, classifies: bool) -> None:
        """Compile the blocks; raises ModelError, and leaves them as they were, if that does not work.

        `gradients` returns per-unit gradients, float32[units, d]: of public tokens, they must be compiled what they
        are without.
        """
        base = next(p for block in self._blocks for p in block.parameters() if not p.requires_grad)
        problem = _lacks(base.device)
        if problem:
            raise ModelError(f"model.compile: {problem}. Or set model.compile=off.")
        kind = (base.device.type, base.dtype, self._config._attn_implementation)
        self._writes_out = kind == ("cpu", torch.bfloat16, "sdpa") and max_length <= _SHORT
        # most models have code of its own for batches in which nothing is padded
        trials = [_trial(base.device, padded, classifies) for padded in (True, False)]
        expected = [gradients(batch) for batch in trials]
        try:
            use_private_cache()
            torch.compiler.reset()  # variants of models that this process compiled before count, too
            self._compiled = [
                torch.compile(block.forward, dynamic=True, fullgraph=True, options={"compile_threads": 1})
                for block in self._blocks
            ]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the compiler's own: it does what torch deprecates
                found = [gradients(batch) for batch in trials]
        except Exception as error:  # a compiler raises anything
            self._compiled = []
            raise ModelError(f"model.compile: it failed ({first_line(error)}). Set model.compile=off.") from error
        apart = max(map(_apart, found, expected))
        if not apart <= SAME_COMPILED[base.dtype]:
            self._compiled = []
            raise ModelError(
                f"model.compile: compiled gradients are {apart:.2g} of their length away from what they should be. "
                "Set model.compile=off."
            )


def _trial(device: torch.device, padded: bool, classifies: bool) -> Batch:
    """Return a record of public tokens, shaped as in the passes of a plan."""
    length = 7
    ids = 3 + torch.arange(length, device=device)[None] % 5  # every vocabulary has these
    mask, labels, owner = torch.ones_like(ids), ids.clone(), torch.zeros(1, dtype=torch.int64, device=device)
    if padded:
        mask[0, 4:], labels[0, 4:] = 0, IGNORE
    return Batch(ids, mask, owner if classifies else labels, owner, 1)


def _apart(found: Tensor, expected: Tensor) -> float:
    return float(((found - expected).norm(dim=1) / expected.norm(dim=1).clamp(min=1e-30)).max())


def pays(parameters: int, units: float, max_length: int, device: torch.device) -> bool:
    """Whether a plan of so many privacy units, all steps together, is long enough to win back the time of compiling.

    Decided by what is public: with the records' own number, the last bits of a result would depend on it.
    """
    return parameters * units * max_length >= _PAYS_FROM.get(device.type, float("inf"))


def _adapted_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the blocks with trainable layers: of the outermost list of modules that has any.

    None has any if only virtual tokens are trained: they go through all blocks, which are the longest list.
    """
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    for module in lists:
        found = [block for block in module if any(p.requires_grad for p in block.parameters())]
        if found:
            return found
    return list(max(lists, key=len, default=[]))


@contextmanager
def _set(thing: Any, name: str, value: Any) -> Iterator[None]:
    """Give an instance another attribute for a while."""
    missing = object()
    own = thing.__dict__.get(name, missing) if isinstance(thing, nn.Module) else getattr(thing, name, missing)
    setattr(thing, name, value)
    try:
        yield
    finally:
        if own is missing:
            delattr(thing, name)
        else:
            setattr(thing, name, own)


def _wrapped(forward: _Forward, compiled: bool, checkpointing: bool) -> _Forward:
    def run(states: Tensor, *args: Any, **options: Any) -> Any:
        if compiled and not states.requires_grad:  # the first block: let it run on the others' compiled code
            states = states.detach().requires_grad_()
        if checkpointing:  # no state of a random generator: dropout is off
            return checkpoint(forward, states, *args, use_reentrant=False, preserve_rng_state=False, **options)
        return forward(states, *args, **options)

    return run


# ---- the compiler ----------------------------------------------------------------------------------------------------


def _lacks(device: torch.device) -> str | None:
    """Return what compiling for `device` needs and is not here."""
    if device.type == "cuda":
        return None if importlib.util.find_spec("triton") else "compiling needs triton: pip install triton"
    compilers = [os.environ.get("CXX", ""), "g++", "clang++"]
    if device.type == "cpu" and any(shutil.which(compiler) for compiler in compilers if compiler):
        return None
    return "compiling needs a C++ compiler: install g++, or name yours in CXX" if device.type == "cpu" else (
        f"compiling for {device.type} is not supported"
    )  # fmt: skip


@contextmanager
def _compiler_settings() -> Iterator[None]:
    import torch._dynamo.config as dynamo
    import torch.fx.experimental._config as shapes

    # sizes that happen to be equal in the first batch must not have to be equal in every batch
    with dynamo.patch(recompile_limit=_VARIANTS), shapes.patch(use_duck_shape=False):  # type: ignore[attr-defined]
        yield


def use_private_cache() -> None:
    """Keep compiled code where nobody else can write: torch's own choice is a folder under /tmp with a known name.

    Raises ModelError if the environment names a folder that others can write to.
    """
    named = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    if named and Path(named).name.startswith(
        "torchinductor_"
    ):  # torch's own choice, which it notes when it is imported
        named = None
    place = Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fedllm"
    try:
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = place.lstat()
        private = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o077
        usable = private and os.access(place, os.W_OK)
    except OSError:
        usable = False
    if not usable:
        if named:
            raise ModelError(f"TORCHINDUCTOR_CACHE_DIR={named}: must be a folder of your own with mode 0700")
        place = Path(tempfile.mkdtemp(prefix="fedllm-"))  # mode 0700
        atexit.register(shutil.rmtree, place, ignore_errors=True)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(place)
