"""Attack: a name in a plan or message holds a line break or a terminal's control code, and forges or hides log lines.

Stopped by one type for every text of a plan or message, whose characters all show, and by a log that escapes the rest.
"""

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from fedllm import config
from fedllm.crypto.identity import Identity
from fedllm.errors import ConfigError, CryptoError
from fedllm.plan import RunPlan
from fedllm.protocol import messages, sealed_envelope
from fedllm.protocol.messages import MAGIC, Declined, Message, Prepare
from fedllm.protocol.spending_statement import Statement, open_statement, sign_statement
from fedllm.shown import LogLines, escaped, escaped_lines, shows
from fedllm.values import Frozen, parse
from tests.bug_zoo.invariants import office_of, plan_of
from tests.client.test_site import NAME, read

FORGED = "x\n2026-11-26 WARNING the ledger is sound\x1b[8m"
BAD = [FORGED, "\x1b[2K", "a\rb", "a\u2028b", "a\u202eb", "a\x00b", "a\x85b"]
GOOD = ["run-1", "대구 지점", "a\u00a0b", "全角\u3000文字", "é", "e\u0301", "대구", "🏦"]


def test_what_shows_and_what_does_not() -> None:
    assert [shows(text) for text in GOOD] == [True] * len(GOOD)
    assert [shows(text) for text in BAD] == [False] * len(BAD)
    assert all(shows(escaped(text)) for text in BAD)
    assert all(escaped(text) == text for text in GOOD)
    assert escaped_lines("one\ntw\x1bo") == "one\ntw\\x1bo"


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("where", ["run", "model.source", "model.revision", "model.labels", "adapter.targets"])
def test_no_text_of_a_plan_holds_what_does_not_show(tiny_llama: Path, where: str, value: str) -> None:
    values = plan_of(tiny_llama, classifies=True).model_dump(mode="json")
    section, _, name = where.rpartition(".")
    (values[section] if section else values)[name] = [value, "b", "c"] if name in ("labels", "targets") else value
    with pytest.raises(ConfigError, match="characters that show") as caught:
        parse(RunPlan, values)
    assert all(shows(line) for line in str(caught.value).split("\n"))


def texts(kind: type[BaseModel]) -> list[str]:
    """Return the fields of a type that may be any text up to a length."""
    schema = kind.model_json_schema()
    return [
        name for name, field in schema["properties"].items()
        if field.get("type") == "string" and not {"enum", "const", "pattern"} & set(field) and name != "payload"
    ]  # fmt: skip


def kinds() -> list[type[BaseModel]]:
    found = [
        RunPlan,
        config.ModelConfig,
        config.AdapterConfig,
        config.PrivacyConfig,
        config.TrainingConfig,
        sealed_envelope.Binding,
    ]
    of_messages = [each for each in vars(messages).values() if isinstance(each, type) and issubclass(each, Frozen)]
    return [*found, *(each for each in of_messages if each.__module__ == messages.__name__ and each is not Message)]


@pytest.mark.parametrize("kind", kinds(), ids=lambda kind: kind.__name__)
def test_every_text_of_a_message_has_that_type(kind: type[BaseModel]) -> None:
    for name in texts(kind):
        with pytest.raises(ValidationError) as caught:
            kind.model_validate({name: "\x1b"})
        said = {error["loc"][0]: error["msg"] for error in caught.value.errors()}
        assert "characters that show" in said[name], f"{kind.__name__}.{name} takes any text"


def test_a_site_that_is_asked_with_such_a_name_logs_no_line_of_head_offices(
    tmp_path: Path, tiny_llama: Path, caplog: pytest.LogCaptureFixture
) -> None:
    office = office_of(tmp_path, tiny_llama)
    frame = Prepare(plan=office.plan).to_bytes()
    header: dict[str, Any] = json.loads(frame[8:])
    header["plan"]["run"] = FORGED
    encoded = json.dumps(header).encode()
    assert read(office.site.handle(MAGIC + len(encoded).to_bytes(4, "big") + encoded)) == Declined(
        site=NAME, reason="message"
    )
    assert all(shows(text) for text in caplog.messages)
    assert len(caplog.messages) == 1


def test_a_log_goes_on_with_an_indented_line_and_shows_no_control_code() -> None:
    try:
        raise ValueError(FORGED)
    except ValueError as error:
        record = logging.LogRecord("fedllm.site", 30, __file__, 1, "%s", (FORGED,), (ValueError, error, None))
    lines = LogLines().format(record).split("\n")
    assert len(lines) > 2
    assert all(shows(line) for line in lines)
    assert all(line.startswith("    ") for line in lines[1:])


def test_a_statement_that_does_not_show_is_refused() -> None:
    signer = Identity.generate()
    honest = Statement("a", "run", "p", 1, 1.0, 1.0, 1e-5, 1, "d", "u")
    open_statement(sign_statement(honest, signer))
    with pytest.raises(CryptoError, match="unknown form"):
        open_statement(sign_statement(replace(honest, run=FORGED), signer))
