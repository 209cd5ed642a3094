"""A site's canaries outlast restarts and kills at any moment, and never become a guess on other coins."""

import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import fedllm.files
from client.canaries import KEPT, SiteCanaries
from fedllm.config import PrivacyConfig, TrainingConfig
from fedllm.errors import FolderError
from fedllm.plan import RunPlan
from fedllm.privacy.canaries import Opening, choose
from fedllm.training.canary_attack import black_scores, drawn_in_a_round, make_canaries, white_scores
from fedllm.training.model_context import ModelContext, open_context
from tests.client.test_site import Killed

CANARIES, GUESSES, ROUNDS = 12, 3, 4


@pytest.fixture(scope="module")
def plan(tiny_llama: Path) -> RunPlan:
    return RunPlan(
        run="r1", seed=0, model={"source": str(tiny_llama), "max_length": 32}, adapter={"rank": 2},  # type: ignore[arg-type]
        privacy=PrivacyConfig(units_per_site=20, noise_multiplier=1.0),
        training=TrainingConfig(rounds=ROUNDS, local_steps=1),
    )  # fmt: skip


@pytest.fixture(scope="module")
def context(plan: RunPlan) -> ModelContext:
    return open_context(plan.model, plan.adapter, plan.seed, "cpu")


@pytest.fixture(scope="module")
def adapters(context: ModelContext) -> list[NDArray[np.float32]]:
    """The adapters that rounds 1 to 4 start from, and the final one."""
    generator = np.random.default_rng(0)
    steps = generator.normal(0, 0.1, (ROUNDS + 1, context.adapter.spec.dimension))
    return list(np.cumsum(steps, axis=0).astype(np.float32))


class Run:
    """One run as a site sees it, each time by another process."""

    def __init__(self, folder: Path, plan: RunPlan, context: ModelContext, name: str = "r1") -> None:
        self.folder, self.plan, self.context, self.name = folder, plan, context, name

    @property
    def site(self) -> SiteCanaries:
        return SiteCanaries(self.folder, self.name, "seoul")

    def begin(self) -> str:
        return self.site.begin(CANARIES)

    def saw(self, round_: int, adapter: NDArray[np.float32]) -> None:
        self.site.saw(round_, adapter, self.context, self.plan, 8)

    def opening(self, final: NDArray[np.float32], guesses: int = GUESSES) -> Opening:
        return self.site.opening(final, guesses, self.context, self.plan, 8)


@pytest.fixture
def run(tmp_path: Path, plan: RunPlan, context: ModelContext) -> Run:
    return Run(tmp_path / "canaries", plan, context)


def expected(run: Run, opening: Opening, path: list[NDArray[np.float32]]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The guesses for adapters seen in this order, by the formulas."""
    context, plan = run.context, run.plan
    units = make_canaries(bytes.fromhex(opening.secret.seed), CANARIES, plan.model, context.adapter.vocabulary)
    black = black_scores(context.adapter, context.adapter.initial, path[-1], units, 8)
    white = sum(
        drawn_in_a_round(
            white_scores(context.engine, context.adapter, start, end - start, units, plan.mechanism, 8),
            plan.privacy.sampling_rate,
        )
        for start, end in itertools.pairwise(path)
    )
    return choose(black, GUESSES), choose(np.asarray(white), GUESSES)


def test_what_is_opened_is_what_was_committed_to_with_the_guesses_of_all_rounds(
    run: Run, adapters: list[NDArray[np.float32]]
) -> None:
    committed = run.begin()
    for number, adapter in enumerate(adapters[:ROUNDS], 1):
        run.saw(number, adapter)
    opening = run.opening(adapters[-1])
    opening.check("r1", "seoul", CANARIES, GUESSES, committed)
    assert (opening.black, opening.white) == expected(run, opening, adapters)


def test_the_canaries_that_train_are_those_whose_coin_is_one(run: Run) -> None:
    run.begin()
    members = run.site.members(run.context, run.plan)
    secret = run.site._read().secret
    units = make_canaries(bytes.fromhex(secret.seed), CANARIES, run.plan.model, run.context.adapter.vocabulary)
    chosen = [unit for unit, coin in zip(units, secret.coins, strict=True) if coin == "1"]
    assert [unit[0].input_ids.tolist() for unit in members] == [unit[0].input_ids.tolist() for unit in chosen]


def test_to_begin_again_changes_nothing(run: Run, adapters: list[NDArray[np.float32]]) -> None:
    committed = run.begin()
    run.saw(1, adapters[0])
    before = run.site._read()
    assert run.begin() == committed
    assert run.site._read().round == before.round == 1
    with pytest.raises(FolderError, match=r"run r1: it holds 12 canaries, and the plan has 13\. This site gives up"):
        run.site.begin(13)


def test_the_file_is_its_owners_alone(run: Run, adapters: list[NDArray[np.float32]]) -> None:
    run.begin()
    run.saw(1, adapters[0])
    (file,) = run.folder.iterdir()
    assert file.stat().st_mode & 0o777 == 0o600
    assert run.folder.stat().st_mode & 0o777 == 0o700


def test_a_request_that_is_repeated_counts_once(run: Run, adapters: list[NDArray[np.float32]]) -> None:
    run.begin()
    for number in (1, 1, 2, 2, 2, 3, 4, 4, 5):
        run.saw(number, adapters[number - 1])
    opening = run.opening(adapters[-1])
    assert (opening.black, opening.white) == expected(run, opening, adapters)


def test_rounds_that_were_missed_are_one_step(run: Run, adapters: list[NDArray[np.float32]]) -> None:
    run.begin()
    run.saw(1, adapters[0])
    run.saw(3, adapters[2])
    opening = run.opening(adapters[-1])
    assert (opening.black, opening.white) == expected(run, opening, [adapters[0], adapters[2], adapters[-1]])


def test_a_server_that_goes_back_begins_a_new_count(run: Run, adapters: list[NDArray[np.float32]]) -> None:
    """From round 3 to round 2, and a second round 2 from elsewhere: no score is of a step that never was."""
    a, b, c, d, end = adapters
    run.begin()
    run.saw(1, a)
    run.saw(3, b)
    run.saw(2, c)
    run.saw(2, d)
    opening = run.opening(end)
    context, plan = run.context, run.plan
    units = make_canaries(bytes.fromhex(opening.secret.seed), CANARIES, plan.model, context.adapter.vocabulary)
    white = sum(
        drawn_in_a_round(
            white_scores(context.engine, context.adapter, start, stop - start, units, plan.mechanism, 8),
            plan.privacy.sampling_rate,
        )
        for start, stop in ((a, b), (d, end))
    )
    assert opening.white == choose(np.asarray(white), GUESSES)


def test_an_opening_is_the_last_word(run: Run, adapters: list[NDArray[np.float32]]) -> None:
    run.begin()
    run.saw(1, adapters[0])
    first = run.opening(adapters[1])
    run.saw(2, adapters[2])
    assert run.opening(adapters[3], guesses=5) == first


# ---- kills -----------------------------------------------------------------------------------------------------------


def kill_after(patch: pytest.MonkeyPatch, calls: int, where: str) -> None:
    """Die before, or after, the file with this number takes its place."""
    honest, count = Path.replace, [0]

    def replace(path: Path, target: Path) -> Any:
        count[0] += 1
        if count[0] == calls and where == "before":
            raise Killed
        done = honest(path, target)
        if count[0] == calls:
            raise Killed
        return done

    patch.setattr(Path, "replace", replace)


@pytest.mark.parametrize("where", ["before", "after"])
@pytest.mark.parametrize("write", range(1, ROUNDS + 3))
def test_a_kill_loses_nothing(
    run: Run, adapters: list[NDArray[np.float32]], monkeypatch: pytest.MonkeyPatch, write: int, where: str
) -> None:
    """At each of the writes of a run: it begins, four rounds, the opening. Whatever was killed is asked for again."""

    def tried(call: Callable[[], Any]) -> Any:
        try:
            return call()
        except Killed:
            monkeypatch.undo()
            return call()

    kill_after(monkeypatch, write, where)
    committed = tried(run.begin)
    for number, adapter in enumerate(adapters[:ROUNDS], 1):
        tried(lambda number=number, adapter=adapter: run.saw(number, adapter))
    opening = tried(lambda: run.opening(adapters[-1]))
    opening.check("r1", "seoul", CANARIES, GUESSES, committed)
    assert (opening.black, opening.white) == expected(run, opening, adapters)


def damaged(data: bytes) -> list[bytes]:
    flipped = [data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :] for place in (0, 80, 300, len(data) - 1)]
    return [b"", data[:-1], data + b"0", data.partition(b"\n")[2], b"\xff" + data, *flipped]


def test_a_damaged_file_is_no_guess(run: Run, adapters: list[NDArray[np.float32]]) -> None:
    run.begin()
    run.saw(1, adapters[0])
    (file,) = run.folder.iterdir()
    for data in damaged(file.read_bytes()):
        file.write_bytes(data)
        for call in (run.begin, lambda: run.opening(adapters[1]), lambda: run.saw(2, adapters[1])):
            with pytest.raises(FolderError, match=r"canaries of run r1: .* is damaged\. This site gives up the attack"):
                call()
        assert file.read_bytes() == data


def test_a_file_that_is_gone_or_open_to_others_is_no_guess(run: Run, adapters: list[NDArray[np.float32]]) -> None:
    run.begin()
    run.saw(1, adapters[0])
    (file,) = run.folder.iterdir()
    file.chmod(0o644)
    with pytest.raises(FolderError, match=r"has mode 644.* gives up the attack"):
        run.opening(adapters[1])
    file.unlink()
    for call in (lambda: run.opening(adapters[1]), lambda: run.saw(2, adapters[1])):
        with pytest.raises(FolderError, match=r"is gone\. This site gives up the attack"):
            call()
    assert not list(run.folder.iterdir())


def test_the_file_of_another_run_or_site_is_no_guess(run: Run, plan: RunPlan, context: ModelContext) -> None:
    run.begin()
    (file,) = run.folder.iterdir()
    other = Run(run.folder, plan, context, "r2")
    other.begin()
    (copy,) = set(run.folder.iterdir()) - {file}
    copy.write_bytes(file.read_bytes())
    with pytest.raises(FolderError, match="is that of run r1 at seoul"):
        other.begin()
    with pytest.raises(FolderError, match="is that of run r1 at seoul"):
        SiteCanaries(run.folder, "r1", "busan").begin(CANARIES)


def test_a_site_that_saw_no_round_guesses_nothing(run: Run, adapters: list[NDArray[np.float32]]) -> None:
    run.begin()
    with pytest.raises(FolderError, match="saw no round"):
        run.opening(adapters[-1])


# ---- several runs ----------------------------------------------------------------------------------------------------


def test_runs_do_not_mix_and_the_oldest_are_forgotten(
    run: Run, plan: RunPlan, context: ModelContext, adapters: list[NDArray[np.float32]]
) -> None:
    runs = [Run(run.folder, plan, context, f"r{number}") for number in range(KEPT)]
    committed = [each.begin() for each in runs]
    assert len(set(committed)) == KEPT
    for number, each in enumerate(runs):
        each.saw(1, adapters[number % 3])
        (file,) = [path for path in run.folder.iterdir() if path == each.site._path]
        os.utime(file, ns=(number, number))  # its order, whatever the clock of the disk
    assert [each.begin() for each in runs] == committed
    (run.folder / "killed.canaries.new").write_bytes(b"")
    Run(run.folder, plan, context, "new").begin()
    assert len(list(run.folder.iterdir())) == KEPT
    with pytest.raises(FolderError, match="is gone"):
        runs[0].opening(adapters[-1])
    for each, commitment in zip(runs[1:], committed[1:], strict=True):
        each.opening(adapters[-1]).check(each.name, "seoul", CANARIES, GUESSES, commitment)


def test_a_full_disk_says_so_and_keeps_what_was_there(
    run: Run, adapters: list[NDArray[np.float32]], monkeypatch: pytest.MonkeyPatch
) -> None:
    run.begin()
    run.saw(1, adapters[0])
    before = {file: file.read_bytes() for file in run.folder.iterdir()}

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fedllm.files.os, "fsync", full)
    with pytest.raises(FolderError, match="No space left on device"):
        run.saw(2, adapters[1])
    monkeypatch.undo()
    assert {file: file.read_bytes() for file in run.folder.iterdir()} == before
