"""`fedllm serve`: a released model answers at the office, in OpenAI's form, over TLS, to those who have a token.

Chat templates, tokens and the form of answers are those of transformers' own server, whose handlers are called here
with one model that nobody can exchange. Around them stands what an office needs: who may ask, how much, and that
nothing of what is asked or answered is written anywhere. The log has a line a request: time, whose token, route,
numbers of tokens, status, milliseconds. An error is logged by its type and place only, since its text may quote.
"""

import asyncio
import contextlib
import ctypes
import json
import logging
import math
import resource
import signal
import socket
import ssl
import sys
import threading
import time
import traceback
import uuid
import warnings
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from ipaddress import ip_address
from pathlib import Path
from string import Formatter
from typing import Any, cast

import h11
import torch
import uvicorn
from jinja2 import TemplateError
from starlette.responses import JSONResponse, StreamingResponse
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.utils import GenerationState, InferenceThread
from uvicorn.protocols.http.h11_impl import H11Protocol

from fedllm.crypto.certificates import read_certificates
from fedllm.errors import ConfigError, DataError, FedllmError, Refused, ReleaseError
from fedllm.files import read, stamp
from fedllm.protocol.enrolment import now
from fedllm.release import openai_request
from fedllm.release.batching import FAILED, Generator
from fedllm.release.chat_template import space_before
from fedllm.release.loading import Release
from fedllm.release.manifest import Manifest, manifest_digest
from fedllm.release.tokens import Gatekeeper, read_tokens
from fedllm.shown import escaped
from fedllm.training.adapter import virtual_tokens
from fedllm.training.data import text_of
from fedllm.values import address

CHAT, COMPLETIONS, MODELS, CLASSIFY, HEALTH = (
    "/v1/chat/completions", "/v1/completions", "/v1/models", "/v1/classify", "/health",
)  # fmt: skip
_HEAD_PATIENCE, _STALLED = 15.0, 30.0  # seconds for the head of a request, and for a reader that reads nothing
_GRACE = 45  # seconds in which answers end once the process is asked to stop; systemd waits 60
_CONNECTIONS = 1024  # beside those of requests that are answered, or wait
_OPEN_FILES = 65_536  # more than one machine has ports: connections that never finish a handshake take no room here
_PR_SET_DUMPABLE = 4  # prctl(2)
_FAILED_EVENT = f'data: {{"error": "{FAILED}"}}\n\n'  # as the library's handlers write it

_Scope = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
_Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


@dataclass(frozen=True)
class Limits:
    """How much may be asked."""

    tokens: int  # of prompt and answer together
    body: int = 262_144  # bytes
    concurrency: int = 32  # answers that are made at once; eight times as many wait
    seconds: float = 120.0  # of a request, waiting included

    @property
    def waiting(self) -> int:
        """How many requests may wait."""
        return 8 * self.concurrency


@dataclass(frozen=True)
class Access:
    """Where the server listens, and whom it lets in."""

    host: str
    port: int
    tokens: Path  # the file of tokens
    certificate: Path | None = None  # PEM; None: no TLS, on loopback
    key: Path | None = None  # PEM
    client_ca: Path | None = None  # PEM: whose certificates a client must show


# ---- what may be served ----------------------------------------------------------------------------------------------


def check_epsilon(manifest: Manifest, most: float | None, unverified: bool = False) -> None:
    """Raise ReleaseError if a model promises less than `most` asks, in epsilon; None: anything finite will do.

    `unverified`: a figure will do that its audit could not verify, as some of the evidence was missing.
    """
    privacy = manifest.privacy
    if privacy.private and privacy.verdict != "within" and not unverified:
        raise ReleaseError(
            f"{manifest.name} states epsilon {privacy.epsilon:.4g}, and its audit could not verify it: evidence is "
            "missing. Ask head office for a release with a complete audit; --allow-unverified serves this one."
        )
    spent = cast(float, privacy.epsilon) if privacy.private else math.inf
    if spent <= (sys.float_info.max if most is None else most):
        return
    if not privacy.private:
        raise ReleaseError(f"{manifest.name} is {privacy.said}. To serve it all the same: --max-epsilon inf")
    raise ReleaseError(
        f"{manifest.name}: {privacy.said}, and --max-epsilon={most:g} permits less. Serve another release."
    )


def positions(release: Release) -> int:
    """Return how many tokens the model takes, as far as its configuration says; at most 4096."""
    return min(4096 - virtual_tokens(release.model), release.positions)


# ---- a process that tells nothing ------------------------------------------------------------------------------------


class _Places(logging.Handler):
    """Logs of libraries: who says it, where in the code, and the type of an error; never the text."""

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        what = f" {_place(error)}" if error is not None else ""
        say(f"{record.levelname.lower()} {record.name} {Path(record.pathname).name}:{record.lineno}{what}")


def _place(error: BaseException) -> str:
    """Return an error's type, and where it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}{where}"


def say(line: str) -> None:
    """Write a line to the log, which is the standard output; a log that is full or closed stops no answer."""
    with contextlib.suppress(OSError, ValueError):
        print(f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ} {line}", flush=True)  # noqa: T201


def tell_nothing() -> None:
    """From now on, no library, error or crash of this process writes what it holds in memory."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)  # a core that goes to a program knows no limit: core(5)
    for name in list(logging.root.manager.loggerDict):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [], True
    logging.root.handlers = [_Places(logging.WARNING)]
    logging.getLogger("transformers").setLevel(logging.ERROR)  # its server has a warning for every request
    logging.captureWarnings(True)
    sys.excepthook = lambda _, error, __: say(f"error {_place(error)}")
    threading.excepthook = lambda args: say(f"error {_place(args.exc_value) if args.exc_value else args.exc_type}")
    sys.unraisablehook = lambda args: say(f"error {_place(args.exc_value) if args.exc_value else args.exc_type}")
    warnings.simplefilter("ignore")


# ---- the application -------------------------------------------------------------------------------------------------


class _OneModel(ModelManager):  # type: ignore[misc]
    """The model that is served, to the library's handlers; it loads no other."""

    def __init__(self, release: Release) -> None:
        self.force_model, self._release = release.manifest.name, release

    @staticmethod
    def process_model_name(model_id: str) -> str:
        """Return the name as it is."""
        return model_id

    def load_model_and_processor(self, *_: Any, **__: Any) -> tuple[Any, Any]:
        """Return the model."""
        return self._release.model, self._release.tokenizer


class _State(GenerationState):  # type: ignore[misc]
    """Hands the handlers the one generator."""

    def __init__(self, generator: Generator) -> None:
        super().__init__(continuous_batching=True)
        self._generator = generator

    def use_continuous_batching(self, *_: Any) -> bool:
        """Return True: inputs as lists."""
        return True

    def get_manager(self, *_: Any, **__: Any) -> Generator:
        """Return the generator."""
        return self._generator


class _Sampled:
    """The settings of one request, on top of the release's own."""

    def _build_generation_config(self, body: dict[str, Any], own: Any, use_cb: bool = False) -> Any:
        config = cast(Any, super())._build_generation_config(body, own, use_cb=False)
        if body.get("temperature", 1.0) and ("temperature" in body or body.get("top_p", 1.0) < 1):
            config.do_sample = True
        return config


class _Chat(_Sampled, ChatCompletionHandler):  # type: ignore[misc]
    pass


class _Completion(_Sampled, CompletionHandler):  # type: ignore[misc]
    pass


class _Gone(Exception):
    """The client has gone before it had asked."""


@dataclass
class _Count:
    """What the log says of a request."""

    who: str = "-"
    method: str = "-"
    route: str = "-"
    status: int = 0
    tokens_in: int = 0
    tokens_out: int = 0


@dataclass
class Application:
    """The routes, as one ASGI application."""

    release: Release
    limits: Limits
    tokens: Gatekeeper | None  # None: a client certificate is enough
    generator: Generator | None = None  # of a causal model
    _waiting: int = 0
    _routes: dict[str, tuple[str, Callable[..., Awaitable[None]]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._slots = asyncio.Semaphore(self.limits.concurrency)
        self._name = self.release.manifest.name
        self._routes = {HEALTH: ("GET", self._health), MODELS: ("GET", self._models)}
        if self.generator is None:
            self._routes[CLASSIFY] = ("POST", self._classify)
            self._thread = InferenceThread()  # one: threads would meet in the model's configuration
            return
        models, state = _OneModel(self.release), _State(self.generator)
        self._chat_handler, self._completion_handler = _Chat(models, state), _Completion(models, state)
        self._routes |= {CHAT: ("POST", self._chat), COMPLETIONS: ("POST", self._complete)}

    async def __call__(self, scope: _Scope, receive: _Receive, send: _Send) -> None:
        """Answer one request, and log it."""
        if scope["type"] != "http":
            return
        begin, count = time.monotonic(), _Count()

        async def counted(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                count.status = message["status"]
            await send(message)

        try:
            await self._answer(scope, receive, counted, count)
        except _Gone:
            pass  # nobody is there to be answered
        finally:
            say(
                f"{count.status or 499} {count.method} {count.route} who={escaped(count.who)} "
                f"in={count.tokens_in} out={count.tokens_out} {1000 * (time.monotonic() - begin):.0f}ms"
            )

    async def _answer(self, scope: _Scope, receive: _Receive, send: _Send, count: _Count) -> None:
        started = False

        async def noted(message: MutableMapping[str, Any]) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            method, handler = self._route(scope, count)
            if handler != self._health:
                count.who = self._who(scope)
            if scope["method"] != method:
                raise Refused(405, f"expected {method}", "method_not_allowed", {"Allow": method})
            async with asyncio.timeout(self.limits.seconds):
                if method == "GET":
                    await handler(scope, noted)
                else:
                    await self._watched(handler, scope, receive, noted, count)
            return
        except _Gone:
            raise
        except Refused as error:
            refusal = error
        except TimeoutError:
            text = f"the answer takes longer than {self.limits.seconds:g} s, which is the limit here"
            refusal = Refused(504, text, "timeout", {"X-Should-Retry": "false"})
        except FedllmError as error:
            say(f"error {_place(error)}")
            refusal = Refused(500, "the model failed with this request", "server_error")
        except Exception as error:  # of whatever kind: its text stays here
            say(f"error {_place(error)}")
            refusal = Refused(500, "the request failed here", "server_error")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_STALLED):
                if not started:
                    await _error(refusal)(scope, _nothing, send)
                else:
                    count.status = refusal.status
                    event = f"data: {json.dumps(_form(refusal))}\n\n".encode()
                    await send({"type": "http.response.body", "body": event, "more_body": False})

    def _route(self, scope: _Scope, count: _Count) -> tuple[str, Callable[..., Awaitable[None]]]:
        found = self._routes.get(scope["path"])
        if scope["method"] in ("GET", "POST"):  # others are of the client's making
            count.method = scope["method"]
        if found is None:
            count.who = self._who(scope)
            raise Refused(404, f"there is nothing here. Routes: {', '.join(self._routes)}", "not_found")
        count.route = scope["path"]
        return found

    def _who(self, scope: _Scope) -> str:
        """Return who asks, by token or, where no tokens are used, by client certificate; raises Refused."""
        if self.tokens is None:
            return str(scope.get("state", {}).get("peer") or "certificate").replace(" ", "_")
        shown = [value for name, value in scope["headers"] if name == b"authorization"]
        scheme, _, token = shown[0].decode("latin-1").partition(" ") if len(shown) == 1 else ("", "", "")
        try:
            name = self.tokens.name_of(token.strip()) if scheme.casefold() == "bearer" else None
        except FedllmError as error:
            say(f"error: {error}")
            raise Refused(503, "the file of tokens cannot be used, so nobody is let in", "server_error") from None
        if name is None:
            challenge = {"WWW-Authenticate": 'Bearer realm="fedllm"'}
            raise Refused(401, "expected a token: Authorization: Bearer TOKEN", "invalid_api_key", challenge)
        return name

    async def _watched(
        self, handler: Callable[..., Awaitable[None]], scope: _Scope, receive: _Receive, send: _Send, count: _Count
    ) -> None:
        """Answer a request with a body; give up as soon as its sender has gone."""
        body = await self._body(scope, receive)
        work = asyncio.ensure_future(self._in_turn(handler, body, send, count))
        gone = asyncio.ensure_future(_gone(receive))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
        finally:
            for task in (work, gone):
                task.cancel()
            await asyncio.wait({work, gone})
            if not work.cancelled():
                work.exception()  # was raised above, or nobody is there to hear it

    async def _body(self, scope: _Scope, receive: _Receive) -> object:
        most = self.limits.body
        too_large = Refused(413, f"expected a body of at most {most} bytes", "request_too_large")
        length = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        if int(length) > most:  # h11 has looked: it is a number
            raise too_large
        parts, size, more = [], 0, True
        try:
            async with asyncio.timeout(_STALLED):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise _Gone
                    parts.append(message.get("body", b""))
                    size, more = size + len(parts[-1]), message.get("more_body", False)
                    if size > most:
                        raise too_large
        except TimeoutError:
            raise Refused(408, f"the body did not come in {_STALLED:g} s", "timeout") from None
        try:
            return json.loads(b"".join(parts))
        except (ValueError, RecursionError):
            raise openai_request.wrong("the body is not JSON") from None

    async def _in_turn(self, handler: Callable[..., Awaitable[None]], body: object, send: _Send, count: _Count) -> None:
        """Answer when it is this request's turn: first come, first served."""
        if self._slots.locked() and self._waiting >= self.limits.waiting:
            text = f"{self.limits.waiting} requests are waiting already. Try again."
            raise Refused(429, text, "rate_limit_exceeded", {"Retry-After": "1"})
        self._waiting += 1
        try:
            await self._slots.acquire()
        finally:
            self._waiting -= 1
        try:
            await handler(body, send, count)
        finally:
            self._slots.release()

    # ---- routes ------------------------------------------------------------------------------------------------------

    async def _health(self, scope: _Scope, send: _Send) -> None:
        well = self.generator is None or self.generator.alive()
        status = ("ok", 200) if well else ("failed", 503)
        await JSONResponse({"status": status[0]}, status[1])(scope, cast(Any, _nothing), cast(Any, send))

    async def _models(self, scope: _Scope, send: _Send) -> None:
        manifest = self.release.manifest
        claim = manifest.privacy.model_dump(include={"mode", "unit", "epsilon", "delta", "verdict"})
        one = {
            "id": self._name, "object": "model", "owned_by": "local", "created": int(datetime.strptime(
                f"{manifest.made} +0000", "%Y-%m-%d %H:%M %z").timestamp()),
            "release": manifest_digest(self.release.folder), "privacy": {**claim, "private": manifest.privacy.private},
        }  # fmt: skip
        await JSONResponse({"object": "list", "data": [one]})(scope, cast(Any, _nothing), cast(Any, send))

    async def _chat(self, body: object, send: _Send, count: _Count) -> None:
        known = ChatCompletionHandler._valid_params_class.__annotations__
        question = openai_request.chat(body, self._name, known)
        lead = space_before(self.release.manifest.reading)  # a completion keeps it: it is all that follows the prompt
        await self._generated(self._chat_handler, question, "chatcmpl", send, count, lead)

    async def _complete(self, body: object, send: _Send, count: _Count) -> None:
        known = CompletionHandler._valid_params_class.__annotations__
        await self._generated(
            self._completion_handler, openai_request.completion(body, self._name, known), "cmpl", send, count
        )

    async def _generated(
        self, handler: Any, question: openai_request.ModelRequest, kind: str, send: _Send, count: _Count, lead: str = ""
    ) -> None:
        """Send the answer, without `lead` before it."""
        generator, number = cast(Generator, self.generator), f"{kind}-{uuid.uuid4().hex}"
        if question.most is not None and question.most > self.limits.tokens:
            text = f"max_tokens: this server has room for {self.limits.tokens} tokens, those of the prompt included"
            raise openai_request.wrong(text)
        end = self.release.end.text
        generator.stops[number] = (*question.stop, *([end] if end else []))
        generator.leads[number] = lead
        try:
            try:
                response = await handler.handle_request(question.body, number)
            except TemplateError:  # such as two turns of a user in a row
                raise openai_request.wrong(
                    "messages: the model's chat template does not take such a conversation"
                ) from None
            await _send_all(response, send)
        finally:
            generator.stops.pop(number, None)
            generator.leads.pop(number, None)
            prompt, answer = generator.answers.pop(number, (0, None))
            count.tokens_in, count.tokens_out = prompt, answer.total_tokens if answer is not None else 0
            if answer is not None:
                answer.cancel()

    async def _classify(self, body: object, send: _Send, count: _Count) -> None:
        inputs = openai_request.classification(body, self._name)
        gone = threading.Event()
        try:
            found, count.tokens_in = await self._thread.async_submit(self._classes, inputs, gone)
        finally:
            gone.set()  # what waits in the thread's queue cannot be taken out of it
        usage = {"prompt_tokens": count.tokens_in, "completion_tokens": 0, "total_tokens": count.tokens_in}
        answer = {
            "id": f"classify-{uuid.uuid4().hex}", "object": "list", "created": int(time.time()), "model": self._name,
            "data": found, "usage": usage,
        }  # fmt: skip
        await _send_all(JSONResponse(answer), send)

    @torch.inference_mode()
    def _classes(self, inputs: list[str | dict[str, str]], gone: threading.Event) -> tuple[list[dict[str, Any]], int]:
        """Return each input's label and probabilities, in the form of vLLM's /classify, and the tokens of all.

        Ends early once `gone` is set: nobody waits any more.
        """
        release, labels = self.release, self.release.manifest.labels
        found, total = [], 0
        for number, one in enumerate(inputs):
            if gone.is_set():
                break
            ids = self._read(one, number)
            total += len(ids)
            tokens = torch.tensor([ids], device=release.device)
            logits = release.model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits[0].float()
            shares = logits.softmax(-1).tolist()
            best = max(range(len(labels)), key=shares.__getitem__)
            found.append({"index": number, "label": labels[best], "probs": shares, "num_classes": len(labels)})
        return found, total

    def _read(self, one: str | dict[str, str], number: int) -> list[int]:
        """Return the tokens of a text to classify, written as in training; raises Refused if it does not fit."""
        manifest = self.release.manifest
        template = manifest.reading.text or ""
        columns = tuple(dict.fromkeys(name for _, name, _, _ in Formatter().parse(template) if name is not None))
        given = {columns[0]: one} if isinstance(one, str) and len(columns) == 1 else one
        if not isinstance(given, dict) or given.keys() != set(columns):
            raise openai_request.wrong(f"input[{number}]: expected an object of texts by column: {', '.join(columns)}")
        try:
            text = template.format(**{name: text_of(value, name) for name, value in given.items()})
        except DataError:
            raise openai_request.wrong(f"input[{number}]: expected a text in every column, and one is empty") from None
        ids: list[int] = self.release.tokenizer(text, verbose=False)["input_ids"]
        if len(ids) > manifest.max_length:
            said = f"input[{number}] has {len(ids)} tokens, and the model was trained on at most {manifest.max_length}"
            raise openai_request.wrong(said, "context_length_exceeded")
        return ids


async def _send_all(response: Any, send: _Send) -> None:
    """Send what a handler gives, whole or in a stream; what a stream says of an error, in OpenAI's form."""
    if not isinstance(response, StreamingResponse):
        await response({"type": "http"}, _nothing, send)
        return
    await send({"type": "http.response.start", "status": 200, "headers": response.raw_headers})
    pieces = cast(Any, response.body_iterator)
    try:
        async for piece in pieces:
            if piece.endswith(_FAILED_EVENT):
                raise ReleaseError(FAILED)
            await send({"type": "http.response.body", "body": piece.encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})
    finally:
        await pieces.aclose()  # cancels the answer, if it is not over


async def _gone(receive: _Receive) -> None:
    """Return when the client has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _nothing() -> MutableMapping[str, Any]:
    return {"type": "http.disconnect"}


def _form(refusal: Refused) -> dict[str, Any]:
    kind = {401: "authentication_error", 429: "rate_limit_error"}.get(refusal.status, "invalid_request_error")
    kind = "server_error" if refusal.status >= 500 else kind
    return {"error": {"message": str(refusal), "type": kind, "param": None, "code": refusal.code}}


def _error(refusal: Refused) -> Any:
    return JSONResponse(_form(refusal), refusal.status, refusal.headers)


# ---- the server ------------------------------------------------------------------------------------------------------


class _Protocol(H11Protocol):
    """A connection that slow and silent clients cannot hold."""

    since = 0.0  # monotonic seconds of its last request, or of its beginning
    _late: asyncio.TimerHandle | None = None
    _stalled: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a request, and note whose certificate was shown."""
        super().connection_made(transport)
        self.since = self.loop.time()
        self._make_room()
        shown = cast(dict[str, Any], transport.get_extra_info("peercert") or {})
        subject = {name: value for part in shown.get("subject", ()) for name, value in part}
        self.app_state = {**self.app_state, "peer": subject.get("commonName")}
        self._expect()

    @property
    def is_silent(self) -> bool:
        """Whether no request is here that waits for an answer; of one that has it, nobody reads the rest of a body."""
        return self.conn.their_state is h11.IDLE or self.conn.our_state is h11.DONE

    def _make_room(self) -> None:
        """Where all places are taken, let the connection go that has asked nothing for longest: it locks nobody out."""
        if len(self.connections) < cast(int, self.limit_concurrency):
            return
        silent = [one for one in cast(set[_Protocol], self.connections) if one is not self and one.is_silent]
        oldest = min(silent, key=lambda one: one.since, default=self)
        self.connections.discard(oldest)
        oldest.transport.abort()

    def data_received(self, data: bytes) -> None:
        """Read on; the head of a request has to come as a whole."""
        super().data_received(data)
        self._expect()

    def _expect(self) -> None:
        if not self.is_silent:
            self.since = self.loop.time()
            self._late = self._cancelled(self._late)
        elif self._late is None:
            self._late = self.loop.call_later(_HEAD_PATIENCE, self.transport.abort)

    def pause_writing(self) -> None:
        """Wait for a reader that is behind, but not for ever."""
        super().pause_writing()
        self._stalled = self.loop.call_later(_STALLED, self.transport.abort)

    def resume_writing(self) -> None:
        """Go on: it has read."""
        super().resume_writing()
        self._stalled = self._cancelled(self._stalled)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        super().connection_lost(exc)
        self._late, self._stalled = self._cancelled(self._late), self._cancelled(self._stalled)

    @staticmethod
    def _cancelled(timer: asyncio.TimerHandle | None) -> None:
        if timer is not None:
            timer.cancel()


class _Server(uvicorn.Server):
    """Ends with exit code 0 when it is asked to, and looks every second whether it can go on."""

    def __init__(self, config: uvicorn.Config, look: Callable[[], bool]) -> None:
        super().__init__(config)
        self._look, self.well = look, True

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Stop at SIGTERM and SIGINT, and do not die of them afterwards, as uvicorn's own does."""
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    async def on_tick(self, counter: int) -> bool:
        """Look; ten times a second."""
        if counter % 10 == 0 and not self._look():
            self.well, self.should_exit = False, True
        return await super().on_tick(counter)


class _Certificate:
    """The server's certificate; renewed while it runs, whenever its files were replaced."""

    def __init__(self, certificate: Path, key: Path, client_ca: Path | None) -> None:
        """Raises ConfigError, FolderError or CryptoError if they cannot be used."""
        self._files = (certificate, key)
        facts = read_certificates(read(certificate))[0]
        if not facts.begins <= now() < facts.ends:
            raise ConfigError(
                f"{certificate} is valid from {facts.begins:%Y-%m-%d} to {facts.ends:%Y-%m-%d}, and the clock here "
                f"says {now():%Y-%m-%d %H:%M} UTC. Have a new one made, or set the clock."
            )
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.minimum_version = ssl.TLSVersion.TLSv1_3
        self.context.set_alpn_protocols(["http/1.1"])
        self._stamp = stamp(*self._files)
        try:
            self._load()
            if client_ca is not None:
                read(client_ca)
                self.context.verify_mode = ssl.CERT_REQUIRED
                self.context.load_verify_locations(client_ca)
        except ssl.SSLError as error:
            raise ConfigError(
                f"{certificate} and {key} are no certificate with its key, or --client-ca is no certificate "
                f"({error.reason}). They are PEM, the key without a password."
            ) from None

    def _load(self) -> None:
        read(self._files[1])  # its error names the file
        # first into a context that nobody uses: one that fails has lost its key, and answers nobody any more
        for context in (ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), self.context):
            context.load_cert_chain(*self._files, password="")  # nobody is there to be asked

    def renew(self) -> None:
        """Take up the files if they were replaced; keeps what it has if they cannot be used."""
        try:
            state = stamp(*self._files)
            if state != self._stamp:
                self._stamp = state
                self._load()
                say("the certificate was renewed")
        except (FedllmError, OSError) as error:
            say(f"error: the certificate was not renewed: {_place(error)}")


def check_access(access: Access) -> bool:
    """Whether tokens are demanded; raises ConfigError if anybody could come in, or listen."""
    if (access.certificate is None) != (access.key is None):
        raise ConfigError("a certificate and its key go together: --tls-cert and --tls-key, or --office")
    if access.certificate is None:
        if not _is_loopback(access.host):
            raise ConfigError(
                f"--plaintext is for this machine alone, and {access.host} is not its loopback, 127.0.0.1"
            )
        if access.client_ca is not None:
            raise ConfigError("--client-ca: client certificates need TLS. Leave out --plaintext.")
    # a file without tokens is one whose last token was revoked: that must not let more people in than before
    if access.client_ca is None or access.tokens.exists():
        if not read_tokens(access.tokens):
            raise ConfigError(
                f"nobody has a token ({access.tokens}), so nobody could ask. First: fedllm serve token add NAME. To "
                "demand client certificates alone: give --client-ca, and remove that file if it exists."
            )
        return True
    return False


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens; raises ConfigError with the reason if it cannot."""
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        opened = socket.socket(family, kind, protocol)  # of TCP by name: else asyncio leaves TCP_NODELAY out
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.bind(place)
        opened.listen(2048)
        opened.setblocking(False)
        return opened
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(
            f"cannot listen at {address(host, port)}: {reason}. Give a host of this machine and a free port: --host, "
            "--port"
        ) from None


def run(release: Release, access: Access, limits: Limits, ready: Callable[[str], None]) -> None:
    """Serve a release that was verified, until the process is asked to stop; `ready` hears its address.

    Raises ConfigError if it cannot begin, ReleaseError if it cannot go on.
    """
    demands_tokens = check_access(access)
    certificate = None
    if access.certificate is not None and access.key is not None:
        certificate = _Certificate(access.certificate, access.key, access.client_ca)
    opened = listen(access.host, access.port)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, _OPEN_FILES)), hard))
    generator = None
    if release.manifest.task == "causal-lm":
        own = release.model.generation_config
        ends = own.eos_token_id or []
        ends = [ends] if isinstance(ends, int) else ends
        own.eos_token_id = list(dict.fromkeys((*release.end.tokens, *ends))) or None
        own.pad_token_id = release.tokenizer.pad_token_id
        generator = Generator(release, limits.concurrency, limits.tokens)
        if generator.why_not is not None:
            say(f"warning: answers are made one after another: {generator.why_not}")
    tell_nothing()
    try:
        app = Application(release, limits, Gatekeeper(access.tokens) if demands_tokens else None, generator)

        def look() -> bool:
            if certificate is not None:
                certificate.renew()
            return generator is None or generator.alive()

        room = _CONNECTIONS + limits.concurrency + limits.waiting
        config = uvicorn.Config(
            cast(Any, app), http=_Protocol, ws="none", loop="asyncio", lifespan="off", log_config=None,
            access_log=False, server_header=False, proxy_headers=False, limit_concurrency=room,
            timeout_keep_alive=30, timeout_graceful_shutdown=_GRACE,
            ssl_context_factory=None if certificate is None else lambda *_: certificate.context,
        )  # fmt: skip
        server = _Server(config, look)
        at = address(*opened.getsockname()[:2])
        ready(f"{'http' if certificate is None else 'https'}://{at}")
        server.run([opened])
        well = server.well
    except Exception as error:
        raise ReleaseError(f"the server failed: {_place(error)}") from None  # its text stays here
    finally:
        opened.close()
        if generator is not None:
            generator.stop()
    if not well:
        raise ReleaseError("the model's thread has failed, so nothing can be answered. Start the server again.")
