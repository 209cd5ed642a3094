"""Answers made for many at once are those of `generate`, each with its own settings, and nothing of them stays."""

import asyncio
import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from fedllm.errors import Refused, ReleaseError
from fedllm.release import batching
from fedllm.release.batching import Generator
from fedllm.release.loading import Release
from tests.fedllm.release.served import loaded, talking

PROMPTS = ["hello", "안녕하세요", "a" * 40, "x", "How do I open an account?", "1 2 3", "비밀번호를 잊었어요", "?"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Release:
    return loaded(talking(tmp_path_factory))


@pytest.fixture(scope="module")
def batched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Generator]:
    generator = Generator(loaded(talking(tmp_path_factory)), 4, 256)
    assert generator.why_not is None
    yield generator
    generator.stop()


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Generator:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Generator, "_try", lambda _: "a test wants it")
        return Generator(loaded(talking(tmp_path_factory)), 4, 256)


@pytest.fixture(params=["batched", "alone"])
def generator(request: pytest.FixtureRequest) -> Generator:
    found: Generator = request.getfixturevalue(request.param)
    return found


def settings(model: Release, most: int = 24, **changes: Any) -> GenerationConfig:
    config = GenerationConfig.from_dict(model.model.generation_config.to_dict())
    config.update(max_new_tokens=most, do_sample=False)
    config.update(**changes)
    return config


def bare(model: Release, prompt: str, most: int = 24) -> tuple[str, list[int]]:
    """Answer with nothing but the library's `generate`."""
    ids = model.tokenizer(prompt, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        made = model.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=most, do_sample=False
        )
    tokens = made[0, ids.shape[1] :].tolist()
    return str(model.tokenizer.decode(tokens, skip_special_tokens=True)), tokens


async def whole(generator: Generator, model: Release, prompt: str, number: str = "0", **changes: Any) -> str:
    inputs = model.tokenizer(prompt)
    config = settings(model, **changes)
    text, prompt_tokens, tokens = await generator.generate_non_streaming(
        model.model, model.tokenizer, inputs, config, number
    )
    assert prompt_tokens == len(inputs["input_ids"])
    assert len(tokens) <= generator.answers.pop(number)[1].total_tokens
    return text


async def streamed(generator: Generator, model: Release, prompt: str, number: str = "0", **changes: Any) -> str:
    queue, _ = generator.generate_streaming(
        model.model, model.tokenizer, model.tokenizer(prompt), settings(model, **changes), number
    )
    parts = []
    while (piece := await queue.get()) is not None:
        assert isinstance(piece, str), piece
        parts.append(piece)
    generator.answers.pop(number)
    return "".join(parts)


def test_answers_that_are_made_together_are_those_of_generate(generator: Generator, model: Release) -> None:
    async def all_at_once() -> list[str]:
        return await asyncio.gather(*(whole(generator, model, text, str(i)) for i, text in enumerate(PROMPTS)))

    expected = [bare(model, text)[0] for text in PROMPTS]
    assert asyncio.run(all_at_once()) == expected
    assert len(set(expected)) > 4, "the test would see nothing"


def test_a_streamed_answer_is_the_whole_one_in_pieces(generator: Generator, model: Release) -> None:
    async def both(prompt: str) -> tuple[str, str]:
        return await whole(generator, model, prompt), await streamed(generator, model, prompt)

    for prompt in PROMPTS[:3]:
        text, pieces = asyncio.run(both(prompt))
        assert pieces
        assert text == pieces


@pytest.mark.parametrize("how", [whole, streamed])
def test_an_answer_of_one_token_ends(generator: Generator, model: Release, how: Any) -> None:
    async def some() -> list[str]:
        return await asyncio.gather(*(how(generator, model, text, f"one{i}", most=1) for i, text in enumerate(PROMPTS)))

    assert len(asyncio.run(some())) == len(PROMPTS)


@pytest.mark.parametrize("how", [whole, streamed])
def test_an_answer_ends_before_a_stop_text_wherever_it_falls(generator: Generator, model: Release, how: Any) -> None:
    text = bare(model, PROMPTS[4])[0]
    stop = next(text[i : i + 3] for i in range(4, len(text)) if text.index(text[i : i + 3]) == i)
    generator.stops["0"] = (stop, "never said")
    assert asyncio.run(how(generator, model, PROMPTS[4])) == text.partition(stop)[0]


@pytest.mark.parametrize("how", [whole, streamed])
def test_what_training_wrote_before_an_answer_is_no_part_of_it(generator: Generator, model: Release, how: Any) -> None:
    """All of it or nothing: an answer that begins otherwise stays whole."""
    text = bare(model, PROMPTS[4])[0]
    for lead, expected in ((text[:2], text[2:]), (text[0] + "\n", text), ("", text)):
        generator.leads["0"] = lead
        assert asyncio.run(how(generator, model, PROMPTS[4])) == expected
    generator.leads["0"], generator.stops["0"] = text[:2], (text[4],)
    assert asyncio.run(how(generator, model, PROMPTS[4])) == text[2:].partition(text[4])[0]


def test_the_thread_that_samples_does_not_disturb_the_one_that_does_not(batched: Generator, model: Release) -> None:
    """With one configuration between them, answers would lose their causal mask, or a thread would die."""

    async def mixed() -> list[str]:
        hot = {"do_sample": True, "temperature": 2.0, "top_p": 0.9}
        return await asyncio.gather(
            *(whole(batched, model, text, f"{text}{i}{j}", **(hot if i else {})) for text in PROMPTS for i in (0, 1)
              for j in range(3))
        )  # fmt: skip

    expected = [bare(model, text)[0] for text in PROMPTS]
    assert asyncio.run(mixed())[0::6] == expected
    assert batched.alive()
    models = [manager.model for manager in batched._managers.values()]
    assert len({id(one.config) for one in models}) == len(models) == 2
    weights = [{weight.data_ptr() for weight in one.parameters()} for one in models]
    assert weights[0] == weights[1], "the weights would be in memory twice"


def test_every_request_is_sampled_by_its_own_settings(generator: Generator, model: Release) -> None:
    """The library's own manager would take those of the first."""

    async def mixed() -> list[str]:
        cold = {"do_sample": True, "temperature": 1e-4, "top_p": 1.0}
        hot = {"do_sample": True, "temperature": 2.0, "top_p": 1.0}
        narrow = {"do_sample": True, "temperature": 2.0, "top_p": 1e-6}
        asked = [hot, cold, {}, narrow, hot]
        return await asyncio.gather(
            *(whole(generator, model, PROMPTS[4], f"s{i}", **one) for i, one in enumerate(asked))
        )

    hot, cold, greedy, narrow, again = asyncio.run(mixed())
    assert cold == greedy == narrow == bare(model, PROMPTS[4])[0]
    assert hot != greedy
    assert hot != again


def test_a_prompt_that_leaves_no_room_is_refused_and_an_answer_ends_where_room_does(
    generator: Generator, model: Release
) -> None:
    with pytest.raises(Refused, match="256"):
        asyncio.run(whole(generator, model, "x" * 256))
    generator.answers.clear()

    async def long() -> int:
        config = settings(model, 10_000)
        inputs = model.tokenizer("x" * 250)
        *_, tokens = await generator.generate_non_streaming(model.model, model.tokenizer, inputs, config, "0")
        generator.answers.clear()
        assert config.max_new_tokens == 6  # by which the handler tells why an answer has ended
        return len(tokens)

    assert asyncio.run(long()) <= 6


def test_nothing_of_a_request_stays_when_it_is_over_or_given_up(batched: Generator, model: Release) -> None:
    secret = "S3CR3T-8714"
    ids = model.tokenizer(secret)["input_ids"]

    async def some() -> None:
        await asyncio.gather(*(whole(batched, model, secret + str(i), f"w{i}") for i in range(3)))
        for number in range(3):
            _, answer = batched.generate_streaming(
                model.model, model.tokenizer, model.tokenizer(secret), settings(model, 200), f"c{number}"
            )
            if number:
                await answer.queue.get()
            answer.cancel()
            batched.answers.pop(f"c{number}")
        processor = batched._managers[False].batch_processor
        for _ in range(200):  # the thread hears of it at its next step
            if not processor.scheduler.has_pending_requests() and not processor.scheduler._requests_to_cancel:
                break
            await asyncio.sleep(0.05)
        await whole(batched, model, "something else", "after")

    asyncio.run(some())
    gc.collect()
    manager = batched._managers[False]
    assert not manager.output_router.result_handlers
    assert manager.output_router.output_queue.empty()
    assert manager.input_queue.empty()
    assert not manager.batch_processor.scheduler.active_requests
    assert not manager.batch_processor.scheduler.waiting_requests
    assert not batched.stops
    assert not batched.leads
    assert not batched.answers
    kept = [one for one in gc.get_objects() if type(one) is list and one is not ids and one[: len(ids)] == ids]
    assert not kept


def test_an_error_inside_the_model_is_told_without_its_text(
    alone: Generator, model: Release, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("S3CR3T")

    monkeypatch.setattr(alone._release.model, "forward", broken)
    with pytest.raises(ReleaseError) as failed:
        asyncio.run(whole(alone, model, "hello"))
    assert str(failed.value) == batching.FAILED
    monkeypatch.undo()
    alone.answers.clear()
    assert asyncio.run(whole(alone, model, "hello")) == bare(model, "hello")[0]


def test_answers_that_part_at_a_tie_are_the_same_and_others_are_not(batched: Generator, model: Release) -> None:
    prompt = model.tokenizer("hello")["input_ids"]
    ids = torch.tensor([prompt])
    best, second = model.model(ids).logits[0, -1].topk(2).indices.tolist()
    own = batched._release.model.lm_head.weight
    assert batched._same(prompt, [best, 7], [best, 7])
    assert not batched._same(prompt, [best, 7], [best])
    assert not batched._same(prompt, [best, 7], [second, 7])
    kept = own[second].clone()
    own[second] = own[best]  # the same logit, to the last bit
    try:
        assert batched._same(prompt, [best, 7], [second, 9])
    finally:
        own[second] = kept


def test_a_model_whose_batched_answers_differ_is_answered_one_after_another(
    model: Release, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = Generator._generate

    def other(self: Generator, prompt: list[int], *rest: Any) -> list[int]:
        return [*honest(self, prompt, *rest)[:-1], 5]

    monkeypatch.setattr(Generator, "_generate", other)
    generator = Generator(model, 2, 64)
    assert generator.why_not == "batched answers differ from those of generate"
    assert generator.alive()
    monkeypatch.setattr(type(model.model), "init_continuous_batching", lambda *_, **__: 1 / 0)
    generator = Generator(model, 2, 64)
    assert generator.why_not == "continuous batching does not take it: ZeroDivisionError"
    monkeypatch.undo()
    assert asyncio.run(whole(generator, model, "hello")) == bare(model, "hello")[0]
