"""What protects someone comes from the operating system, and from nowhere else."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats

from fedllm.privacy.randomness import (
    Beside,
    KeyedRandomness,
    OsRandomness,
    Randomness,
    SeededRandomness,
    float_safe_normals,
    normals,
    uniforms,
)

ROOT = Path(__file__).parents[3]
FALSE_ALARM = 1e-9 / 5  # chance that a correct implementation fails one statistical test; 1e-9 for all of them
SOURCES: list[Randomness] = [OsRandomness(), SeededRandomness(0, "tests")]
by_source = pytest.mark.parametrize("source", SOURCES, ids=lambda source: type(source).__name__)
scopes = st.lists(st.integers(-5, 300) | st.text(max_size=4), max_size=3).map(tuple)


class Constant:
    """A source that gives one word for ever: the extremes of what a true source may give."""

    private = False

    def __init__(self, word: int) -> None:
        self.word = word

    def words(self, n: int) -> np.ndarray:
        return np.full(n, self.word, dtype=np.uint64)


def test_each_source_says_whether_it_protects() -> None:
    assert OsRandomness().private is True
    assert SeededRandomness(0).private is False


def test_os_randomness_never_repeats() -> None:
    words = [OsRandomness().words(1000) for _ in range(3)]  # 3,000 of 2^64: a repetition has a chance of 2^-41
    assert len(np.unique(np.concatenate(words))) == 3000


def test_a_forked_process_does_not_repeat_its_parents_words() -> None:
    code = """
import os
from fedllm.privacy.randomness import OsRandomness
source = OsRandomness()
source.words(4)
read, write = os.pipe()
child = os.fork()
if child == 0:
    os.write(write, source.words(4).tobytes())
    os._exit(0)
os.waitpid(child, 0)
print(os.read(read, 32).hex(), source.words(4).tobytes().hex())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True, cwd=ROOT)
    theirs, ours = done.stdout.split()
    assert len(theirs) == len(ours) == 64
    assert theirs != ours


def test_os_randomness_ignores_every_seed() -> None:
    drawn = []
    for _ in range(2):
        np.random.seed(0)  # the point is that the global state has no effect
        drawn.append(OsRandomness().words(8).tolist())
    assert drawn[0] != drawn[1]


@given(seed=st.integers(0, 2**64), scope=scopes)
def test_a_seed_and_scope_give_the_same_words_again(seed: int, scope: tuple[object, ...]) -> None:
    first, second = SeededRandomness(seed, *scope), SeededRandomness(seed, *scope)
    assert first.words(5).tolist() == second.words(5).tolist()
    assert first.words(5).tolist() == second.words(5).tolist()


@given(a=st.tuples(st.integers(0, 3), scopes), b=st.tuples(st.integers(0, 3), scopes))
def test_another_seed_or_scope_gives_other_words(
    a: tuple[int, tuple[object, ...]], b: tuple[int, tuple[object, ...]]
) -> None:
    assume(a != b)
    assert SeededRandomness(a[0], *a[1]).words(4).tolist() != SeededRandomness(b[0], *b[1]).words(4).tolist()


@pytest.mark.parametrize(
    ("a", "b"),
    [((0, "a", 11), (0, "a1", 1)), ((0, "a,b"), (0, "a", "b")), ((1, 23), (12, 3)), ((0, "site", 1), (0, "site", "1"))],
)
def test_scopes_do_not_run_into_each_other(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    assert SeededRandomness(*a).words(4).tolist() != SeededRandomness(*b).words(4).tolist()


def test_a_seeded_source_goes_on_and_does_not_start_again() -> None:
    source = SeededRandomness(0)
    assert source.words(4).tolist() != source.words(4).tolist()


def test_seeded_words_are_the_same_on_every_machine() -> None:
    words = SeededRandomness(7, "site", 1).words(3)
    assert words.dtype == np.uint64
    code = "from fedllm.privacy.randomness import *; print(SeededRandomness(7, 'site', 1).words(3).tolist())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == str(words.tolist())


@by_source
@pytest.mark.parametrize("n", [0, 1, 1000])
def test_words_are_as_many_as_asked_for(source: Randomness, n: int) -> None:
    words = source.words(n)
    assert words.shape == (n,)
    assert words.dtype == np.uint64


@by_source
def test_every_bit_of_a_word_is_a_fair_coin(source: Randomness) -> None:
    n = 20_000
    bits = np.unpackbits(source.words(n).view(np.uint8)).reshape(n, 64).sum(axis=0)
    tail = FALSE_ALARM / 64 / 2
    assert bits.min() >= stats.binom.ppf(tail, n, 0.5)
    assert bits.max() <= stats.binom.isf(tail, n, 0.5)


@by_source
def test_uniforms_are_uniform_and_below_one(source: Randomness) -> None:
    values = uniforms(source, 20_000)
    assert stats.kstest(values, "uniform").pvalue > FALSE_ALARM
    assert values.min() >= 0
    assert values.max() < 1


def test_uniforms_reach_zero_but_never_one() -> None:
    assert uniforms(Constant(0), 2).tolist() == [0.0, 0.0]
    assert uniforms(Constant(2**64 - 1), 2).tolist() == [1 - 2.0**-53] * 2


@pytest.mark.parametrize("word", [0, 2**64 - 1, 2**63, 1, 2**11])
def test_no_word_gives_noise_that_is_not_finite(word: int) -> None:
    assert np.isfinite(normals(Constant(word), 8)).all()
    assert np.isfinite(float_safe_normals(Constant(word), 8)).all()


@by_source
@pytest.mark.parametrize("draw", [normals, float_safe_normals])
def test_normals_are_standard_normal(source: Randomness, draw: object) -> None:
    values = draw(source, 30_001)  # type: ignore[operator]  # odd: Box and Muller give pairs
    assert values.shape == (30_001,)
    assert stats.kstest(values, "norm").pvalue > FALSE_ALARM
    # dtype first: float64 values must not be quantised to the float32 grid anywhere on the way
    assert values.dtype == np.float64
    assert (values.astype(np.float32).astype(np.float64) != values).mean() > 0.99


# Where noise or coins for anyone's protection are drawn, no other generator may even be mentioned.
PROTECTED = ["fedllm/privacy", "fedllm/training", "client"]
SEED_ALLOWED = {"fedllm/training/adapter.py", "fedllm/training/model.py"}  # public initial values
_TORCH_DRAWS = {
    "rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like", "normal", "bernoulli", "poisson",
    "multinomial", "binomial", "Generator", "seed", "initial_seed", "manual_seed_all", "get_rng_state", "set_rng_state",
    "dropout", "alpha_dropout", "feature_alpha_dropout", "rrelu",
}  # fmt: skip
_IN_PLACE_DRAWS = {
    "normal_", "uniform_", "bernoulli_", "random_", "exponential_", "geometric_", "log_normal_", "cauchy_",
    "kaiming_uniform_", "kaiming_normal_", "xavier_uniform_", "xavier_normal_", "trunc_normal_", "orthogonal_",
    "sparse_",
}  # fmt: skip


def foreign_draws(source: str, seed_allowed: bool = False) -> Iterator[str]:
    """Yield every use of a generator other than fedllm.privacy.randomness in a module's source."""
    tree = ast.parse(source)
    inside: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and node.name == "SeededRandomness":
            inside.update(ast.walk(node))
    for node in ast.walk(tree):
        if node in inside:
            continue
        where = f"line {getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            names = []
        for name in names:
            if name.split(".")[0] in ("random", "secrets") or name.startswith(("numpy.random", "torch.random")):
                yield f"{where}: import of {name}"
            if name.startswith("torch.") and name.rpartition(".")[2] in _TORCH_DRAWS | {"manual_seed"}:
                yield f"{where}: import of {name}"
        if isinstance(node, ast.Attribute):
            text = ast.unparse(node)
            if text in ("np.random", "numpy.random"):
                yield f"{where}: {text}"
            if text.startswith(("torch.", "nn.", "F.")) and node.attr in _TORCH_DRAWS:
                yield f"{where}: {text}"
            if node.attr in _IN_PLACE_DRAWS or node.attr == "default_rng":
                yield f"{where}: {text}"
            if node.attr == "manual_seed" and not seed_allowed:
                yield f"{where}: {text}"


@pytest.mark.parametrize("folder", PROTECTED)
def test_no_protective_randomness_comes_from_a_seeded_generator(folder: str) -> None:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    found = [
        f"{file.relative_to(ROOT)}, {draw}"
        for file in files
        for draw in foreign_draws(file.read_text("utf-8"), file.relative_to(ROOT).as_posix() in SEED_ALLOWED)
    ]
    assert not found


@pytest.mark.parametrize("file", sorted(SEED_ALLOWED))
def test_a_seed_is_set_only_where_the_global_generator_is_put_back(file: str) -> None:
    tree = ast.parse((ROOT / file).read_text("utf-8"))
    guarded: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.With) and any("fork_rng" in ast.unparse(item) for item in node.items):
            guarded.update(ast.walk(node))
    seeds = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr == "manual_seed"]
    assert seeds
    assert all(node in guarded for node in seeds)


@pytest.mark.parametrize(
    "line",
    [
        "import random",
        "from random import gauss",
        "import secrets",
        "from numpy.random import default_rng",
        "import numpy.random",
        "noise = np.random.default_rng(0).normal()",
        "noise = numpy.random.normal()",
        "noise = torch.randn(3)",
        "noise = torch.randn_like(p)",
        "noise = torch.normal(0, 1, (3,))",
        "p.normal_()",
        "p.data.uniform_(0, 1)",
        "generator = torch.Generator()",
        "torch.manual_seed(0)",
        "from torch import randn",
        "nn.init.normal_(p)",
        "x = F.dropout(x)",
    ],
)
def test_the_search_for_foreign_generators_finds(line: str) -> None:
    assert list(foreign_draws(f"def f():\n    {line}\n"))


def test_the_search_for_foreign_generators_leaves_the_seeded_source_alone() -> None:
    source = "class SeededRandomness:\n    def words(self):\n        return np.random.default_rng(0)\n"
    assert not list(foreign_draws(source))
    assert not list(foreign_draws("torch.manual_seed(0)", seed_allowed=True))


def test_two_sources_side_by_side_do_not_move_one_another() -> None:
    """Which records are drawn does not depend on how many canaries there are, nor the other way round."""

    def words(many: int, n: int) -> list[int]:
        first, then = KeyedRandomness(b"a" * 32, b"first"), KeyedRandomness(b"b" * 32, b"then")
        found = Beside(first, many, then)
        assert found.private
        return [int(word) for word in found.words(n)]

    assert words(3, 10)[3:] == words(0, 7) == words(5, 12)[5:]
    assert words(3, 10)[:3] == words(3, 3)
