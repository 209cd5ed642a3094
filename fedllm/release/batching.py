"""Answers of a released model, made for many at once: transformers' continuous batching, as one of its managers.

The library's own manager takes temperature and top_p of every request from the first one, drops `stop`, loses an
answer that ends before its receiver is known, and keeps what nobody fetched any more. This one hands each request's
settings on, ends an answer at a stop text, and keeps nothing of a request that is over.

A model whose batched answers are not those of `generate` is answered one request after another: `Generator` tries
both before it serves.
"""

import asyncio
import contextlib
import copy
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tokenizers.decoders import DecodeStream
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.cli.serving.utils import (
    BaseGenerateManager,
    InferenceThread,
    _StreamError,
    response_events_to_chunks,
)
from transformers.utils.chat_parsing import ResponseParser

from fedllm.errors import ReleaseError
from fedllm.release.loading import Release
from fedllm.training.adapter import generated
from fedllm.training.quantised import unseen

with unseen():
    from peft import PeftModel

FAILED = "failed"  # all that is said of an error inside the library, which may quote what was asked
_PAGE = 64  # tokens whose keys and values are kept together
_AT_ONCE = 1024  # tokens that a forward pass may read
_TRIED = ("안녕하세요, 오늘은", "One two three four five six seven")  # asked together, in lengths that differ
_LAST_BITS = 4  # units in the last place of the largest logit
_TRIED_TOKENS, _PATIENCE = 12, 120.0  # tokens of each answer; seconds for both


class _Answer:
    """One answer on its way: takes tokens, gives pieces of text on `queue`, then None, or an error.

    `put` and `end` make it a streamer of `generate`, which runs in another thread.
    """

    def __init__(
        self, tokenizer: Any, config: GenerationConfig, lead: str, stop: Sequence[str], parser: ResponseParser | None
    ) -> None:
        self.queue: asyncio.Queue[Any] = asyncio.Queue()
        self.tokens: list[int] = []
        self._tokenizer, self._parser, self._stop = tokenizer._tokenizer, parser, tuple(stop)
        ends = config.eos_token_id
        self.ends = {ends} if isinstance(ends, int) else set(ends or ())
        self._decoder = DecodeStream([], skip_special_tokens=parser is None)
        self._lead = lead  # not seen yet
        self._kept = ""  # may be the beginning of it, or of a stop text
        self._held = max(map(len, self._stop), default=1) - 1
        self._loop = asyncio.get_running_loop()
        self._over = threading.Event()
        self._prompt_seen = False
        self.on_end: Callable[[], object] = lambda: None
        if parser is not None:
            self._give(parser.initial_events)

    @property
    def total_tokens(self) -> int:
        """Tokens of the answer so far; the handlers ask."""
        return len(self.tokens)

    def take(self, tokens: Sequence[int]) -> None:
        """Take the next tokens; on the event loop."""
        for token in tokens:
            if self._over.is_set():
                return
            self.tokens.append(token)
            if token in self.ends and self._parser is None:
                continue  # the end of an answer is no part of it, also where it is an ordinary token
            text = self._decoder.step(self._tokenizer, token)
            if text is not None:
                self._text(text)

    def finish(self, error: bool = False) -> None:
        """End the answer; on the event loop."""
        if self._over.is_set():
            return
        self._over.set()
        self._say(self._kept)
        self._kept = ""
        if self._parser is not None and not error:
            with contextlib.suppress(ValueError, RuntimeError):  # it ended inside a part that has a form
                self._give(self._parser.finalize()[1])
        self.queue.put_nowait(_StreamError(FAILED) if error else None)
        self.on_end()

    def cancel(self) -> None:
        """Give the answer up: nobody waits for it."""
        if not self._over.is_set():
            self._over.set()
            self.queue.put_nowait(None)
            self.on_end()

    def put(self, value: torch.Tensor) -> None:
        """Take what `generate` made, in its thread: first the prompt, then a token at a time."""
        if self._over.is_set():
            raise _Given
        if self._prompt_seen:
            self._loop.call_soon_threadsafe(self.take, value.tolist())
        self._prompt_seen = True

    def end(self) -> None:
        """Hear that `generate` is done, in its thread."""
        self._loop.call_soon_threadsafe(self.finish)

    def fail(self) -> None:
        """Hear that `generate` has failed, in its thread."""
        self._loop.call_soon_threadsafe(self.finish, True)

    @property
    def over(self) -> bool:
        """Whether nothing more is wanted."""
        return self._over.is_set()

    def _text(self, text: str) -> None:
        self._kept += text
        if self._lead:
            if len(self._kept) < len(self._lead) and self._lead.startswith(self._kept):
                return
            self._kept, self._lead = self._kept.removeprefix(self._lead), ""
        found = [place for stop in self._stop if (place := self._kept.find(stop)) >= 0]
        if found:
            self._kept = self._kept[: min(found)]
            self.finish()
            return
        ready = len(self._kept) - self._held
        if ready > 0:
            self._say(self._kept[:ready])
            self._kept = self._kept[ready:]

    def _say(self, text: str) -> None:
        if text and self._parser is not None:
            self._give(self._parser.feed(text))
        elif text:
            self.queue.put_nowait(text)

    def _give(self, events: Any) -> None:
        for item in response_events_to_chunks(events):
            self.queue.put_nowait(item)


class _Given(Exception):
    """Ends `generate`, when nobody waits for the answer."""


class _Nowhere(queue.Queue[Any]):
    """Where results go that nobody waits for."""

    def put(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
        """Keep nothing."""


class Generator(BaseGenerateManager):  # type: ignore[misc]
    """Makes answers: batched where that gives the same ones, else one after another."""

    def __init__(self, release: Release, concurrency: int, most: int) -> None:
        """`concurrency` answers at once, of at most `most` tokens with their prompts. Raises ReleaseError."""
        self._release, self._most, self._virtual = release, most, isinstance(release.model, PeftModel)
        self._blocks = 1 + concurrency * -(-min(most, _AT_ONCE) // _PAGE) + -(-most // _PAGE)
        self._managers: dict[bool, Any] = {}  # by whether it samples
        self._thread: InferenceThread | None = None
        self.stops: dict[str, tuple[str, ...]] = {}  # by request, until its answer begins
        self.leads: dict[str, str] = {}  # likewise: what may stand before its answer, and is no part of it
        self.answers: dict[str, tuple[int, _Answer]] = {}  # with the tokens of its prompt; whoever asked removes it
        self.why_not = self._try()  # why answers are not batched, None if they are
        if self.why_not is not None:
            self.stop()
            self._thread = InferenceThread()

    # ---- what the library's handlers call ----------------------------------------------------------------------------

    def init_cb(self, model: Any, gen_config: GenerationConfig) -> None:
        """Do nothing: managers are made here when they are needed."""

    def generate_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: GenerationConfig, request_id: str,
        response_parser: ResponseParser | None = None,
    ) -> tuple[asyncio.Queue[Any], _Answer]:  # fmt: skip
        """Begin an answer that is given piece by piece."""
        answer = self._begin(processor, inputs, gen_config, request_id, response_parser, True)
        return answer.queue, answer

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: GenerationConfig, request_id: str
    ) -> tuple[str, int, list[int]]:
        """Return a whole answer, its prompt's number of tokens, and its tokens."""
        stops, lead = self.stops.get(request_id, ()), self.leads.get(request_id, "")
        answer = self._begin(processor, inputs, gen_config, request_id, None, bool(stops))
        try:
            while (piece := await answer.queue.get()) is not None:
                if isinstance(piece, _StreamError):
                    raise ReleaseError(FAILED)
        finally:
            answer.cancel()

        def decode(tokens: list[int]) -> str:
            text = processor.decode([token for token in tokens if token not in answer.ends], skip_special_tokens=True)
            return str(text).removeprefix(lead)

        tokens, text = answer.tokens, decode(answer.tokens)
        cut = min((place for stop in stops if (place := text.find(stop)) >= 0), default=len(text))
        while cut < len(decode(tokens)):  # the handler reads these anew where an answer has parts
            tokens = tokens[:-1]
        return text[:cut], self.answers[request_id][0], tokens

    def stop(self) -> None:
        """End the threads that compute."""
        for manager in self._managers.values():
            manager.stop(block=True, timeout=5, hard_stop=True)
        self._managers.clear()

    # ---- both ways ---------------------------------------------------------------------------------------------------

    def alive(self) -> bool:
        """Whether the threads that compute still do."""
        managers = self._managers.values()
        return all(one.background_thread_status.fatal_error is None and one.is_running() for one in managers)

    def _begin(
        self, tokenizer: Any, inputs: Any, config: GenerationConfig, request_id: str, parser: ResponseParser | None,
        piecewise: bool,
    ) -> _Answer:  # fmt: skip
        ids = inputs["input_ids"]
        prompt: list[int] = ids if isinstance(ids, list) else ids[0].tolist()
        self._fit(config, len(prompt))
        lead, stops = self.leads.pop(request_id, ""), self.stops.pop(request_id, ())
        answer = _Answer(tokenizer, config, lead, stops, parser)
        self.answers[request_id] = (len(prompt), answer)
        if self._thread is None:
            self._batched(answer, prompt, config, request_id, piecewise)
        else:
            self._thread.submit(self._alone, answer, prompt, config)
        return answer

    def _fit(self, config: GenerationConfig, prompt: int) -> None:
        room = self._most - prompt
        if room < 1:
            from fedllm.release.openai_request import wrong

            text = f"the prompt has {prompt} tokens, and with an answer of at least one there is room for {self._most}"
            raise wrong(text, "context_length_exceeded")
        config.max_new_tokens = min(config.max_new_tokens or room, room)

    # ---- batched -----------------------------------------------------------------------------------------------------

    def _batched(
        self, answer: _Answer, prompt: list[int], config: GenerationConfig, request_id: str, piecewise: bool
    ) -> None:
        samples = bool(config.do_sample)
        manager = self._manager(samples)
        handlers = manager.output_router.result_handlers

        def receive(output: Any) -> None:
            if output.is_finished():
                answer.on_end = lambda: None  # the manager has forgotten it
            answer.take(output.generated_tokens[len(answer.tokens) :])
            if output.is_finished():
                answer.finish(error=output.error is not None)

        def forget() -> None:
            handlers.pop(request_id, None)
            manager.cancel_request(request_id)

        manager.register_result_handler(request_id, receive)  # before it can be answered
        answer.on_end = forget
        warped = {"temperature": float(config.temperature or 1.0), "top_p": float(config.top_p or 1.0)}
        begun = manager.add_request(
            prompt, request_id=request_id, max_new_tokens=config.max_new_tokens, streaming=piecewise,
            eos_token_id=config.eos_token_id, **(warped if samples else {}),
        )  # fmt: skip
        if begun is None:
            answer.finish(error=True)

    def _manager(self, samples: bool) -> Any:
        if samples not in self._managers:
            self._managers[samples] = self._made(samples)
            self._managers[samples].output_router.output_queue = _Nowhere()
            self._managers[samples].start()
        return self._managers[samples]

    def _made(self, samples: bool) -> Any:
        """Return a manager with modules of its own around the same weights.

        A forward pass notes what it is asked in the model's configuration (transformers 5.24: `is_causal`) and takes
        it back afterwards: of two threads one would read the other's note, and answer without a causal mask.
        """
        model = self._release.model
        shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
        model = copy.deepcopy(model, shared)
        config = GenerationConfig.from_dict(self._release.model.generation_config.to_dict())
        config.do_sample, config.use_cache, config.max_new_tokens = samples, False, self._most
        # not 1, so that the manager has a place for them; every request brings its own
        config.temperature, config.top_p = (0.5, 0.5) if samples else (1.0, 1.0)
        batching = ContinuousBatchingConfig(
            page_size=_PAGE,
            num_blocks=self._blocks,
            max_batch_tokens=_AT_ONCE,
            allow_block_sharing=False,  # it keeps what was asked, for whoever asks the same
            use_cuda_graph=False,
            auto_switch_to_flash=False,  # it may fetch a kernel, which is code
            per_request_processors=samples,
            drop_unsupported_processors=False,
        )
        with torch.inference_mode():
            return model.init_continuous_batching(generation_config=config, continuous_batching_config=batching)

    # ---- one after another -------------------------------------------------------------------------------------------

    def _alone(self, answer: _Answer, prompt: list[int], config: GenerationConfig) -> None:
        if answer.over:
            return
        try:
            self._generate(prompt, config, answer)
        except _Given:
            pass
        except Exception:  # what it says may quote a prompt
            answer.fail()

    @torch.inference_mode()
    def _generate(self, prompt: list[int], config: GenerationConfig, streamer: _Answer | None) -> list[int]:
        ids, model = torch.tensor([prompt], device=self._release.device), self._release.model
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        options = {"generation_config": config, "streamer": streamer, "pad_token_id": config.pad_token_id}
        new = (
            generated(model, **given, **options)
            if self._virtual
            else model.generate(**given, **options)[:, ids.shape[1] :]
        )
        found: list[int] = new[0].tolist()
        return found

    # ---- which way ---------------------------------------------------------------------------------------------------

    def _try(self) -> str | None:
        """Answer two prompts both ways; return why they cannot be batched, None if they can."""
        if self._virtual:
            return "its adapter has virtual tokens, which cannot be merged"
        config = GenerationConfig.from_dict(self._release.model.generation_config.to_dict())
        config.do_sample, config.max_new_tokens, config.use_cache = False, _TRIED_TOKENS, True
        prompts = [self._release.tokenizer(text)["input_ids"] for text in _TRIED]
        alone = [self._generate(prompt, config, None) for prompt in prompts]
        try:
            manager = self._made(samples=False)
        except Exception as error:
            return f"continuous batching does not take it: {type(error).__name__}"
        self._managers[False] = manager
        manager.start()
        for number, prompt in enumerate(prompts):
            manager.add_request(prompt, str(number), max_new_tokens=_TRIED_TOKENS, eos_token_id=config.eos_token_id)
        found: dict[str, Any] = {}
        while len(found) < len(prompts):
            result = manager.get_result(timeout=_PATIENCE)
            if result is None or result.error is not None:
                return "continuous batching fails with it"
            found[result.request_id] = result.generated_tokens
        if not all(self._same(prompts[i], alone[i], found[str(i)]) for i in range(len(prompts))):
            return "batched answers differ from those of generate"
        manager.output_router.output_queue = _Nowhere()
        return None

    @torch.inference_mode()
    def _same(self, prompt: list[int], alone: list[int], batched: list[int]) -> bool:
        """Whether two answers are the same one; where they part, the last bits of the arithmetic may decide."""
        place = next((i for i, pair in enumerate(zip(alone, batched, strict=False)) if pair[0] != pair[1]), None)
        if place is None:
            return len(alone) == len(batched)
        ids = torch.tensor([prompt + alone[:place]], device=self._release.device)
        logits = self._release.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -1]
        gap = abs(float(logits[alone[place]] - logits[batched[place]]))
        return gap <= _LAST_BITS * torch.finfo(logits.dtype).eps * float(logits.abs().max())
