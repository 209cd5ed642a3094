"""Releases to serve, and an ASGI client without a network."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedllm.crypto.identity import Identity
from fedllm.release.loading import Release, load_release
from fedllm.release.manifest import sign_release
from tests.conftest import save_llama
from tests.fedllm.release.conftest import Released, a_manifest, keys_of
from tests.sharing import once

TEMPLATE = (
    "{% for m in messages %}"
    "{% if m['role'] == 'system' and not loop.first %}{{ raise_exception('late: ' + m['content']) }}{% endif %}"
    "{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


def talking(factory: pytest.TempPathFactory) -> Released:
    """Return a release of random weights whose answers vary, with a chat template."""

    def make(new: Path) -> None:
        key, _ = keys_of(new)
        folder = save_llama(
            new / "release", initializer_range=0.4, tie_word_embeddings=False, max_position_embeddings=512
        )
        model = AutoModelForCausalLM.from_pretrained(folder)
        with torch.no_grad():
            model.lm_head.weight[:2] = 0  # of tokens that no answer has: some other is always likelier than 0
            model.lm_head.weight[3 + 94 :] = 0  # bytes that are no sign of ASCII, so that answers are text
        model.save_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.chat_template = TEMPLATE
        tokenizer.save_pretrained(folder)
        sign_release(folder, a_manifest(folder), Identity.read(key))

    place = once(factory, "talking-release", make)
    return Released(place / "release", place / "identity", place / "keys.txt")


def loaded(released: Released) -> Release:
    """Load a release, as `fedllm serve` does."""
    release = load_release(released.folder, released.manifest, "cpu")
    release.model.generation_config.eos_token_id = list(release.end.tokens)
    release.model.generation_config.pad_token_id = release.tokenizer.pad_token_id
    return release


@dataclass
class Answer:
    """What came back."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""

    @property
    def json(self) -> Any:
        """The body, read."""
        return json.loads(self.body)

    @property
    def events(self) -> list[Any]:
        """The events of a stream, but for the last, which says that it is over."""
        lines = [line.removeprefix("data: ") for line in self.body.decode().split("\n\n") if line]
        assert lines.pop() == "[DONE]"
        return [json.loads(line) for line in lines]


App = Callable[[Any, Any, Any], Awaitable[None]]


async def ask(
    app: App, method: str, path: str, body: object = None, token: str | None = None, raw: bytes | None = None,
    leave: asyncio.Event | None = None, headers: tuple[tuple[bytes, bytes], ...] = (),
    sent: Callable[[bytes], Awaitable[None]] | None = None,
) -> Answer:  # fmt: skip
    """Ask an application; `leave` is set when the client goes, `sent` hears every piece of the answer."""
    answer, asked = Answer(), False
    content = raw if raw is not None else json.dumps(body).encode() if body is not None else b""
    given = [*headers, *([(b"authorization", f"Bearer {token}".encode())] if token is not None else [])]
    scope = {"type": "http", "method": method, "path": path, "headers": given, "state": {}}

    async def receive() -> dict[str, Any]:
        nonlocal asked
        if not asked:
            asked = True
            return {"type": "http.request", "body": content, "more_body": False}
        await (leave or asyncio.Event()).wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            answer.status = message["status"]
            answer.headers = {name.decode().lower(): value.decode() for name, value in message["headers"]}
        else:
            answer.body += message.get("body", b"")
            if sent is not None:
                await sent(message.get("body", b""))

    await app(scope, receive, send)
    return answer
