"""The routes of a served model, without a network: who may ask, what is answered, what is refused, what is logged."""

import asyncio
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedllm.config import TextConfig
from fedllm.errors import ConfigError, Refused, ReleaseError
from fedllm.release import serve
from fedllm.release.batching import Generator
from fedllm.release.chat_template import space_before
from fedllm.release.loading import Release
from fedllm.release.serve import CHAT, CLASSIFY, COMPLETIONS, HEALTH, MODELS, Access, Application, Limits
from fedllm.release.tokens import Gatekeeper, add_token, revoke_token
from tests.fedllm.release.conftest import Released
from tests.fedllm.release.served import Answer, ask, loaded, talking

SECRET = "S3CR3T-4711"
LIMITS = Limits(256, body=4096, concurrency=2, seconds=60)


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Released:
    return talking(tmp_path_factory)


@pytest.fixture(scope="module")
def release(released: Released) -> Release:
    return loaded(released)


@pytest.fixture(scope="module")
def generator(release: Release) -> Iterator[Generator]:
    made = Generator(release, LIMITS.concurrency, LIMITS.tokens)
    yield made
    made.stop()


@pytest.fixture(scope="module")
def reference(released: Released) -> Release:
    """The same model, for answers by nothing but the library."""
    return loaded(released)


@pytest.fixture
def door(tmp_path: Path) -> tuple[Gatekeeper, str]:
    return Gatekeeper(tmp_path / "tokens.json"), add_token(tmp_path / "tokens.json", "desk")


@pytest.fixture
def app(release: Release, generator: Generator, door: tuple[Gatekeeper, str]) -> Application:
    return Application(release, LIMITS, door[0], generator)


@pytest.fixture
def token(door: tuple[Gatekeeper, str]) -> str:
    return door[1]


def post(app: Application, path: str, body: object, token: str | None, **how: Any) -> Answer:
    return asyncio.run(ask(app, "POST", path, body, token, **how))


def chat(content: str = "hello", **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}], "max_tokens": 16, "temperature": 0, **fields}


def bare(reference: Release, prompt: str, most: int = 16) -> str:
    ids = reference.tokenizer(prompt, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        made = reference.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=most, do_sample=False
        )
    return str(reference.tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True))


# ---- answers ---------------------------------------------------------------------------------------------------------


def test_a_chat_is_answered_as_generate_would_whole_and_in_a_stream(
    app: Application, token: str, reference: Release, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = bare(reference, "user: hello\nassistant:").removeprefix(" ")
    whole = post(app, CHAT, chat(), token)
    assert whole.status == 200
    assert whole.json["choices"][0]["message"] == {"content": expected, "role": "assistant"}
    assert whole.json["usage"]["completion_tokens"] == 16
    assert whole.json["model"] == "tiny"
    stream = post(app, CHAT, chat(stream=True), token)
    assert stream.headers["content-type"].startswith("text/event-stream")
    assert "".join(one["choices"][0]["delta"].get("content", "") for one in stream.events) == expected
    assert stream.events[-1]["choices"][0]["finish_reason"] == "length"
    assert stream.events[-1]["usage"] == whole.json["usage"]
    logged = capsys.readouterr().out.splitlines()
    assert [line.partition(" ")[2].rpartition(" ")[0] for line in logged] == [
        f"200 POST {CHAT} who=desk in={whole.json['usage']['prompt_tokens']} out=16"
    ] * 2


def test_a_completion_ends_at_a_stop_text_that_is_no_part_of_it(
    app: Application, token: str, reference: Release
) -> None:
    expected = bare(reference, "hello", 24)
    stop = expected[6:9]
    body = {"prompt": "hello", "max_tokens": 24, "temperature": 0, "stop": stop}
    whole = post(app, COMPLETIONS, body, token)
    assert whole.json["choices"][0]["text"] == expected.partition(stop)[0]
    assert whole.json["choices"][0]["finish_reason"] == "stop"
    stream = post(app, COMPLETIONS, {**body, "stream": True}, token)
    assert "".join(one["choices"][0]["text"] for one in stream.events) == expected.partition(stop)[0]
    assert stream.events[-1]["choices"][0]["finish_reason"] == "stop"


def test_an_answer_does_not_begin_with_the_space_that_training_put_before_it(
    app: Application, token: str, reference: Release, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A completion keeps it: prompt and completion together are the text as it was written in training."""
    expected = bare(reference, "user: hello\nassistant:")
    monkeypatch.setattr(serve, "space_before", lambda reading: expected[:1])
    assert post(app, CHAT, chat(), token).json["choices"][0]["message"]["content"] == expected[1:]
    stream = post(app, CHAT, chat(stream=True), token)
    assert "".join(one["choices"][0]["delta"].get("content", "") for one in stream.events) == expected[1:]
    body = {"prompt": "user: hello\nassistant:", "max_tokens": 16, "temperature": 0}
    assert post(app, COMPLETIONS, body, token).json["choices"][0]["text"] == expected


@pytest.mark.parametrize(
    ("reading", "space"),
    [
        (TextConfig(prompt="Q: {q}\nA:", text=" {a}"), " "), (TextConfig(prompt="{q}", text="\n\n{a} {b}"), "\n\n"),
        (TextConfig(prompt="{q}", text="{a}"), ""), (TextConfig(prompt="{q}", text=" {a}", chat=True), ""),
    ],
)  # fmt: skip
def test_the_space_before_an_answer_is_that_of_the_template(reading: TextConfig, space: str) -> None:
    assert space_before(reading) == space


def test_temperature_is_heeded_where_the_release_itself_does_not_sample(app: Application, token: str) -> None:
    """The library sets it and goes on without sampling."""
    texts = {post(app, CHAT, chat(temperature=2.0), token).json["choices"][0]["message"]["content"] for _ in range(4)}
    assert len(texts) > 1


def test_the_list_of_models_has_one_with_its_claim(app: Application, token: str, released: Released) -> None:
    answer = asyncio.run(ask(app, "GET", MODELS, token=token))
    (one,) = answer.json["data"]
    assert one["id"] == "tiny"
    assert one["privacy"] == {
        "mode": "local", "unit": "person", "epsilon": 2.5, "delta": 1e-5, "verdict": "within", "private": True,
    }  # fmt: skip


def test_a_causal_model_has_these_routes_and_no_other(app: Application, token: str) -> None:
    assert set(app._routes) == {CHAT, COMPLETIONS, MODELS, HEALTH}
    for path in ("/", "/docs", "/openapi.json", "/reset", "/load_model", "/v1/responses", "/v1/systemone", CLASSIFY,
                 "/v1/audio/transcriptions", f"/{SECRET}", CHAT + "/"):  # fmt: skip
        for method in ("GET", "POST", "OPTIONS"):
            answer = asyncio.run(ask(app, method, path, {}, token))
            assert answer.status == 404, path
            assert SECRET not in answer.body.decode()
    for method, path in (("GET", CHAT), ("POST", MODELS), ("OPTIONS", MODELS), ("DELETE", CHAT), ("POST", HEALTH)):
        assert asyncio.run(ask(app, method, path, {}, token)).status == 405
    assert "access-control-allow-origin" not in asyncio.run(ask(app, "GET", MODELS, token=token)).headers


# ---- who may ask -----------------------------------------------------------------------------------------------------


def test_nobody_asks_without_a_token_but_for_the_state_of_health(app: Application, token: str, door: Any) -> None:
    for path in (MODELS, CHAT, COMPLETIONS, "/elsewhere"):
        for shown in (None, "", "wrong", token + "x"):
            answer = post(app, path, chat(), shown)
            assert answer.status == 401
            assert answer.headers["www-authenticate"].startswith("Bearer")
            assert answer.json["error"]["type"] == "authentication_error"
    twice = ((b"authorization", f"Bearer {token}".encode()),) * 2
    assert post(app, CHAT, chat(), None, headers=twice).status == 401
    assert post(app, CHAT, chat(), None, headers=((b"authorization", f"Basic {token}".encode()),)).status == 401
    assert post(app, CHAT, chat(), None, headers=((b"authorization", b"Bearer \xff\xfe"),)).status == 401
    assert asyncio.run(ask(app, "GET", HEALTH)).json == {"status": "ok"}
    revoke_token(door[0].file, "desk")
    assert post(app, CHAT, chat(), token).status == 401


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "status"),
    [(b"", 400), (b"{", 400), (b"[" * 4000, 400), (b'"x"', 400), (b"\xff", 400), (b"{}", 400), (b"x" * 4097, 413)],
)
def test_a_body_that_is_no_request_is_refused(app: Application, token: str, raw: bytes, status: int) -> None:
    answer = post(app, CHAT, None, token, raw=raw)
    assert answer.status == status
    assert set(answer.json["error"]) == {"message", "type", "param", "code"}


def test_a_body_that_is_announced_too_large_is_not_even_read(app: Application, token: str) -> None:
    assert post(app, CHAT, chat(), token, headers=((b"content-length", b"4097"),)).status == 413


def test_nothing_of_a_refused_request_is_in_the_answer_or_the_log(
    app: Application, token: str, capsys: pytest.CaptureFixture[str]
) -> None:
    late = {"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": SECRET}]}
    bodies: list[Any] = [
        chat(SECRET, n=2), chat(SECRET, **{SECRET: 1}), chat(SECRET, model=SECRET), chat(SECRET, max_tokens=10**6),
        chat(SECRET * 30), late, {"messages": SECRET}, chat(SECRET, generation_config=f'{{"{SECRET}": 1}}'),
    ]  # fmt: skip
    for body in bodies:
        answer = post(app, CHAT, body, token)
        assert 400 <= answer.status < 500
        assert SECRET not in answer.body.decode()
    assert post(app, CHAT, None, token, raw=SECRET.encode()).status == 400
    assert SECRET not in capsys.readouterr().out


@given(st.binary(max_size=60) | st.text(max_size=20).map(lambda text: json.dumps(chat(text, max_tokens=1)).encode()))
def test_every_request_has_an_answer_in_openais_form(raw: bytes) -> None:
    app = Application.__new__(Application)
    app.limits, app._name = LIMITS, "tiny"
    with suppress(Refused):  # anything else would fail the test
        serve.openai_request.chat(asyncio.run(app._body({"headers": []}, _of(raw))), "tiny", {})


def _of(raw: bytes) -> Any:
    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": raw, "more_body": False}

    return receive


def test_an_error_inside_is_logged_by_type_and_place_and_answered_without_its_text(
    app: Application, token: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise ValueError(SECRET)

    monkeypatch.setattr(app.release.tokenizer, "apply_chat_template", broken, raising=False)
    answer = post(app, CHAT, chat(SECRET), token)
    assert answer.status == 500
    assert answer.json["error"]["type"] == "server_error"
    out = capsys.readouterr().out
    assert SECRET not in answer.body.decode() + out
    assert "error ValueError at test_serve.py:" in out


# ---- limits ----------------------------------------------------------------------------------------------------------


def slow(app: Application, begun: asyncio.Event | None = None) -> asyncio.Event:
    """Have answers begin only once the event is set that is returned."""
    gate, honest = asyncio.Event(), app._chat

    async def wait(body: object, send: Any, count: Any) -> None:
        if begun is not None:
            begun.set()
        await gate.wait()
        await honest(body, send, count)

    app._routes[CHAT] = ("POST", wait)
    return gate


def test_who_comes_when_all_places_are_taken_is_told_to_come_again(app: Application, token: str) -> None:
    async def crowd() -> list[Answer]:
        gate = slow(app)
        places = LIMITS.concurrency + LIMITS.waiting
        tasks = [asyncio.ensure_future(ask(app, "POST", CHAT, chat(max_tokens=1), token)) for _ in range(places)]
        for _ in range(10):
            await asyncio.sleep(0)
        late = await ask(app, "POST", CHAT, chat(), token)
        gate.set()
        return [late, *await asyncio.gather(*tasks)]

    late, *others = asyncio.run(crowd())
    assert late.status == 429
    assert late.headers["retry-after"] == "1"
    assert {answer.status for answer in others} == {200}


def test_an_answer_that_takes_too_long_is_given_up_and_its_place_is_free(
    app: Application, token: str, generator: Generator
) -> None:
    app.limits = replace(LIMITS, seconds=0.2)

    async def wait() -> tuple[Answer, bool]:
        slow(app)
        answer = await ask(app, "POST", CHAT, chat(), token)
        return answer, app._slots.locked()

    answer, locked = asyncio.run(wait())
    assert answer.status == 504
    assert answer.headers["x-should-retry"] == "false"
    assert not locked


@pytest.mark.parametrize("stream", [False, True])
def test_the_model_stops_when_the_client_has_gone(
    app: Application, token: str, generator: Generator, stream: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    async def leave() -> None:
        gone = asyncio.Event()
        task = asyncio.ensure_future(
            ask(app, "POST", CHAT, chat("x", max_tokens=200, stream=stream), token, leave=gone)
        )
        while not generator.answers:
            await asyncio.sleep(0.01)
        gone.set()
        await task
        assert not generator.answers
        assert not generator._managers[False].output_router.result_handlers

    asyncio.run(leave())
    assert f" POST {CHAT} who=desk" in capsys.readouterr().out


def test_a_stream_whose_reader_stands_still_holds_one_answer_and_ends_with_its_time(
    app: Application, token: str, generator: Generator
) -> None:
    app.limits = replace(LIMITS, seconds=0.5)

    async def never(_: bytes) -> None:
        await asyncio.Event().wait()

    async def read() -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(serve, "_STALLED", 0.2)
            await ask(app, "POST", CHAT, chat("x", max_tokens=200, stream=True), token, sent=never)
        assert not generator.answers

    asyncio.run(read())


# ---- classifiers -----------------------------------------------------------------------------------------------------


class _Classifier(torch.nn.Module):
    """Says of a text how long it is."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        length = float(input_ids.shape[1])
        return type("Output", (), {"logits": torch.tensor([[0.0, length - 10]])})


@pytest.fixture
def classifier(release: Release, door: tuple[Gatekeeper, str]) -> Application:
    reading = TextConfig(text="Q: {question}", label="label")
    manifest = release.manifest.model_copy(
        update={"task": "classification", "labels": ("short", "long"), "reading": reading}
    )
    return Application(replace(release, manifest=manifest, model=_Classifier()), LIMITS, door[0])


def test_a_classifier_says_the_label_and_how_sure_it_is(classifier: Application, token: str) -> None:
    assert set(classifier._routes) == {CLASSIFY, MODELS, HEALTH}
    answer = post(classifier, CLASSIFY, {"input": ["a", {"question": "a" * 20}]}, token)
    first, second = answer.json["data"]
    assert (first["label"], second["label"]) == ("short", "long")
    assert sum(first["probs"]) == pytest.approx(1)
    assert (first["index"], second["index"], first["num_classes"]) == (0, 1, 2)
    assert answer.json["usage"]["prompt_tokens"] == 4 + 23
    for wrong in ({"input": {"other": SECRET}}, {"input": SECRET * 10}, {"input": ""}, {"input": SECRET, "n": 2}):
        refused = post(classifier, CLASSIFY, wrong, token)
        assert refused.status == 400
        assert SECRET not in refused.body.decode()
    assert post(classifier, CHAT, chat(), token).status == 404


def test_texts_of_a_client_that_has_gone_are_classified_no_more(
    classifier: Application, token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, begun, more = [], threading.Event(), threading.Event()

    def slowly(_: str, number: int) -> list[int]:
        read.append(number)
        begun.set()
        assert more.wait(60)
        return [1]

    monkeypatch.setattr(classifier, "_read", slowly)

    async def leave() -> None:
        gone = asyncio.Event()
        body = {"input": ["a"] * 100}
        some = [asyncio.ensure_future(ask(classifier, "POST", CLASSIFY, body, token, leave=gone)) for _ in range(2)]
        await asyncio.to_thread(begun.wait, 60)
        gone.set()
        await asyncio.gather(*some)
        more.set()
        await ask(classifier, "POST", CLASSIFY, {"input": "a"}, token)

    asyncio.run(leave())
    assert len(read) == 2, "one that had begun, and one of the client that is still there"


# ---- what may be served, and to whom ---------------------------------------------------------------------------------


def test_a_model_is_refused_whose_epsilon_is_above_what_is_permitted(released: Released) -> None:
    manifest = released.manifest  # epsilon 2.5
    for most in (None, 2.5, 3.0, float("inf")):
        serve.check_epsilon(manifest, most)
    for most in (2.4, 0.0, float("nan")):
        with pytest.raises(ReleaseError, match="and --max-epsilon="):
            serve.check_epsilon(manifest, most)


@pytest.mark.parametrize("changes", [{"mode": "off"}, {"seeded": True}, {"epsilon": None}])
def test_a_model_that_is_not_private_is_served_only_on_demand(released: Released, changes: dict[str, Any]) -> None:
    manifest = released.manifest.model_copy(update={"privacy": released.manifest.privacy.model_copy(update=changes)})
    serve.check_epsilon(manifest, float("inf"))
    for most in (None, 1e9):
        with pytest.raises(ReleaseError, match="To serve it all the same: --max-epsilon inf"):
            serve.check_epsilon(manifest, most)


def test_an_epsilon_that_its_audit_could_not_verify_is_served_only_on_demand(released: Released) -> None:
    privacy = released.manifest.privacy.model_copy(update={"verdict": "unverifiable"})
    manifest = released.manifest.model_copy(update={"privacy": privacy})
    with pytest.raises(ReleaseError, match=r"could not verify it.*--allow-unverified"):
        serve.check_epsilon(manifest, 3.0)
    serve.check_epsilon(manifest, 3.0, unverified=True)
    with pytest.raises(ReleaseError, match="and --max-epsilon="):
        serve.check_epsilon(manifest, 2.0, unverified=True)


def test_the_last_token_that_is_revoked_does_not_open_the_door_to_certificates_alone(tmp_path: Path) -> None:
    files = tmp_path / "cert.pem", tmp_path / "key.pem", tmp_path / "ca.pem"
    door = Access("127.0.0.1", 0, tmp_path / "tokens.json", *files)
    assert not serve.check_access(door), "certificates alone, where tokens were never used"
    add_token(door.tokens, "desk")
    assert serve.check_access(door)
    revoke_token(door.tokens, "desk")
    with pytest.raises(ConfigError, match="nobody has a token"):
        serve.check_access(door)


def test_a_door_that_anybody_could_pass_or_overhear_is_not_opened(tmp_path: Path) -> None:
    tokens = tmp_path / "tokens.json"
    some = Path("a.pem")
    with pytest.raises(ConfigError, match="nobody has a token"):
        serve.check_access(Access("127.0.0.1", 0, tokens))
    assert not serve.check_access(Access("0.0.0.0", 0, tokens, some, some, client_ca=some))
    add_token(tokens, "desk")
    for host in ("127.0.0.1", "::1", "localhost"):
        assert serve.check_access(Access(host, 0, tokens))
    for host in ("0.0.0.0", "::", "10.0.0.1", "desk.bank.example"):
        with pytest.raises(ConfigError, match="not its loopback"):
            serve.check_access(Access(host, 0, tokens))
        assert serve.check_access(Access(host, 0, tokens, some, some))
    with pytest.raises(ConfigError, match="need TLS"):
        serve.check_access(Access("127.0.0.1", 0, tokens, client_ca=some))
    with pytest.raises(ConfigError, match="go together"):
        serve.check_access(Access("127.0.0.1", 0, tokens, some))
    revoke_token(tokens, "desk")
    with pytest.raises(ConfigError, match="nobody has a token"):
        serve.check_access(Access("127.0.0.1", 0, tokens, some, some))


def test_what_is_sent_leaves_at_once() -> None:
    """Without TCP_NODELAY an answer waits 40 ms for an acknowledgement; asyncio sets it on what it knows is TCP."""
    with serve.listen("127.0.0.1", 0) as opened:
        assert opened.proto == socket.IPPROTO_TCP
