"""The progress file, by which `fedllm submit` follows a run."""

from pathlib import Path
from typing import get_args

from server import deployment
from server.rounds import Event, Phase, RoundRecord, RoundStarted, SiteAnswered


def test_every_event_of_a_run_comes_back_from_the_progress_file(tmp_path: Path) -> None:
    file = tmp_path / "progress.jsonl"
    note = deployment._note(file)
    told = [
        Phase("evaluating the base model"),
        RoundStarted(1, ["서울"]),
        SiteAnswered(1, "서울", False, "policy"),
        RoundRecord(1, True, 1.5, 0.9, 2.5, None, answered=["서울"]),
    ]
    assert {type(event) for event in told} == set(get_args(Event))
    for event in told:
        note(event)
    assert deployment.events(file, 0) == (told, file.stat().st_size)
