"""The Flower ClientApp: bytes in, bytes out, nothing heavy."""

import subprocess
import sys

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from client.app import Handler, client_app
from fedllm.protocol.messages import ENVELOPE_KEY, ENVELOPE_RECORD


def _context(node: int) -> Context:
    return Context(1, node, {"partition-id": node - 1}, RecordDict(), {})


@pytest.fixture(autouse=True)
def task_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Flower reads when a Message is made."""
    for name, value in (("_run_id", 1), ("_task_id", 1), ("_node_id", 0)):
        monkeypatch.setattr(TaskIdentity, name, value)


@pytest.mark.parametrize("message_type", ["query", "train"])
@pytest.mark.parametrize("payload", [b"", b"\x00\xff\xfe" * 1000, bytes(range(256))], ids=["empty", "binary", "all"])
def test_the_courier_carries_bytes_both_ways(message_type: str, payload: bytes) -> None:
    asked: list[tuple[int, bytes]] = []

    def connect(context: Context) -> Handler:
        def handle(request: bytes, timeout: float) -> bytes:
            asked.append((context.node_id, request))
            return b"answer:" + request[::-1]

        return handle

    content = RecordDict({ENVELOPE_RECORD: ConfigRecord({ENVELOPE_KEY: payload})})
    reply = client_app(connect)(Message(content, 7, message_type), _context(7))
    assert asked == [(7, payload)]
    assert not reply.has_error()
    record = reply.content.config_records[ENVELOPE_RECORD]
    assert dict(record) == {ENVELOPE_KEY: b"answer:" + payload[::-1]}
    assert list(reply.content) == [ENVELOPE_RECORD], "nothing else travels back"


def test_the_courier_imports_nothing_that_trains() -> None:
    heavy = ("torch", "transformers", "peft", "opacus", "datasets", "dp_accounting", "client.site", "hydra")
    code = f"import sys, client.app; print(*[name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
