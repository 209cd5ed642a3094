"""The progress file, by which `fedllm submit` follows a run; the roster, as a run looks at it."""

from pathlib import Path
from typing import get_args

import pytest

from fedllm.crypto import certificates
from fedllm.crypto.identity import Identity
from fedllm.errors import FolderError
from fedllm.files import write_secret
from fedllm.protocol.enrolment import now
from server import deployment
from server.events import Event, Phase, RoundMetrics, RoundStarted, SiteAnswered
from server.roster import Roster, RosterEntry


def test_every_event_of_a_run_comes_back_from_the_progress_file(tmp_path: Path) -> None:
    file = tmp_path / "progress.jsonl"
    note = deployment._note(file)
    told = [
        Phase("evaluating the base model"),
        RoundStarted(1, ["서울"]),
        SiteAnswered(1, "서울", False, "policy"),
        RoundMetrics(1, True, 1.5, 0.9, 2.5, None, answered=["서울"]),
    ]
    assert {type(event) for event in told} == set(get_args(Event))
    for event in told:
        note(event)
    assert deployment.events(file, 0) == (told, file.stat().st_size)


def test_a_run_sees_every_roster_at_once_and_says_where_it_is_gone(tmp_path: Path) -> None:
    file, line = tmp_path / "roster.json", certificates.key_line(certificates.make_key())
    member = RosterEntry(
        site="busan", identity=Identity.generate().public.to_text(), link_key=line, serving_key=line, admitted_at=now()
    )
    revoked = member.model_copy(update={"revoked_at": now()})
    find = deployment._member(file)
    for members in ((), (member,), (member,), (revoked,), (revoked, member)):
        write_secret(file, Roster(members=members).model_dump_json().encode())
        assert find("busan") == (member if member in members else None)
        assert find("busan") == (member if member in members else None)
    file.unlink()
    with pytest.raises(FolderError, match="roster"):
        find("busan")
