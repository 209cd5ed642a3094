"""One definition of usable text, and conversations through the chat template with the loss on the assistant alone."""

import copy
import unicodedata
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from fedllm.config import ModelConfig, TextConfig
from fedllm.errors import ConfigError, DataError
from fedllm.training.data import IGNORE, Tokeniser, Tokens, check_named, render, text_of
from fedllm.training.text_files import Record
from fedllm.values import parse

CHATML = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
# writes what was thought only in the last turn, as Qwen3 does
THINKING = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}"
    "{{ m.content }}</end>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
NEEDS_SYSTEM = "{% if messages[0].role != 'system' %}{{ raise_exception('no system turn') }}{% endif %}" + CHATML
HI = [
    {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"},
    {"role": "user", "content": "desk?"}, {"role": "assistant", "content": "floor 1"},
]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer: one token a byte."""
    return PreTrainedTokenizerFast.from_pretrained(tiny_llama)


def chatting(tokenizer: PreTrainedTokenizerFast, template: str = CHATML, **data: Any) -> Tokeniser:
    chatty = copy.deepcopy(tokenizer)
    chatty.chat_template = template
    text = parse(TextConfig, {"messages": "messages", **data})
    return Tokeniser(chatty, ModelConfig(source="chatty", max_length=512), text)


def read(tokeniser: Tokeniser, messages: object) -> Tokens:
    (found,) = tokeniser.read([{"messages": messages}])
    if isinstance(found, DataError):
        raise found
    return found


def learned(tokenizer: PreTrainedTokenizerFast, tokens: Tokens, limit: int = 512) -> tuple[str, list[str]]:
    """Return the whole text, and the stretches of it that are learned."""
    record = tokens.record(limit, ())
    parts: list[list[int]] = [[]]
    for token, label in zip(record.input_ids.tolist(), record.labels.tolist(), strict=True):
        if label == IGNORE and parts[-1]:
            parts.append([])
        elif label != IGNORE:
            assert label == token
            parts[-1].append(token)
    return str(tokenizer.decode(record.input_ids.tolist())), [str(tokenizer.decode(part)) for part in parts if part]


@pytest.mark.parametrize(
    "value", [None, "", "   ", "\n\t", "\u200b", "\u3000", float("nan"), Decimal("nan"), ["a"], {"a": 1}, b"a", []]
)
def test_what_is_no_text_is_refused_wherever_text_is_wanted(value: object) -> None:
    for template in ("{answer}", "Q: {question} A: {answer}"):
        with pytest.raises(DataError, match=r"record 3: answer (is empty|holds)"):
            render(template, {"question": "q", "answer": value}, 2)


def test_what_is_only_given_may_be_blank_but_not_missing() -> None:
    """As the column `input` of many instruction data sets is."""
    template = "{instruction}\n{input}"
    for blank in ("", "  "):
        assert render(template, {"instruction": "a", "input": blank}, 0, given=True) == f"a\n{blank}"
    for missing in (None, float("nan"), ["a"]):
        with pytest.raises(DataError, match=r"input (is empty|holds)"):
            render(template, {"instruction": "a", "input": missing}, 0, given=True)


@pytest.mark.parametrize(("value", "text"), [(0, "0"), (1.0, "1"), (False, "False"), (" a ", " a "), ("None", "None")])
def test_text_and_numbers_are_used_as_they_are(value: object, text: str) -> None:
    assert text_of(value, "answer") == text


def test_an_error_names_the_place_of_the_record() -> None:
    with pytest.raises(DataError, match=r"^train\.jsonl, line 7: answer is empty"):
        render("{answer}", Record({"answer": None}, "train.jsonl, line 7"), 0)


def test_a_column_is_found_whatever_its_unicode_form_and_may_have_a_short_name() -> None:
    row = Record({unicodedata.normalize("NFD", "질문"): "a", " 질문 내용(필수)": "b"}, "here")
    assert render("{질문}", row, 0) == render("{" + unicodedata.normalize("NFD", "질문") + "}", row, 0) == "a"
    data = parse(TextConfig, {"text": "{q}{질문}", "columns": {"q": "질문 내용(필수)"}})
    check_named(list(row), data)
    assert render(data.text or "", row, 0, data.columns) == "ba"
    with pytest.raises(DataError, match="missing column 질문"):
        check_named(["질문 내용(필수)"], data)


# Conversations


@pytest.mark.parametrize("template", [CHATML, THINKING])
def test_only_what_the_assistant_says_is_learned(tokenizer: PreTrainedTokenizerFast, template: str) -> None:
    thought = "<think></think>" if template == THINKING else ""
    whole, parts = learned(tokenizer, read(chatting(tokenizer, template), HI))
    assert whole == f"<user>hi</end><assistant>hello</end><user>desk?</end><assistant>{thought}floor 1</end>"
    assert parts == ["hello</end>", f"{thought}floor 1</end>"]


def test_a_conversation_ends_with_the_assistant_and_is_cut_at_its_end(tokenizer: PreTrainedTokenizerFast) -> None:
    tokens = read(chatting(tokenizer), [*HI, {"role": "user", "content": "thanks"}])
    assert "thanks" not in learned(tokenizer, tokens)[0]
    whole, parts = learned(tokenizer, tokens, 30)
    assert len(tokenizer(whole, add_special_tokens=False)["input_ids"]) == 30
    assert parts == ["hello</end>"]


def test_a_system_turn_is_put_before_what_has_none(tokenizer: PreTrainedTokenizerFast) -> None:
    for template in (CHATML, NEEDS_SYSTEM):
        tokeniser = chatting(tokenizer, template, system="Be brief.")
        assert learned(tokenizer, read(tokeniser, HI))[0].startswith("<system>Be brief.</end><user>hi")
        own = [{"role": "system", "content": "Own."}, *HI]
        assert learned(tokenizer, read(tokeniser, own))[0].startswith("<system>Own.</end><user>hi")
    single = chatting(tokenizer, NEEDS_SYSTEM, messages=None, chat=True, prompt="{q}", text="{a}", system="Be brief.")
    whole, parts = learned(tokenizer, next(found for found in single.read([{"q": "hi", "a": "hello"}]) if found))  # type: ignore[arg-type]
    assert (whole, parts) == ("<system>Be brief.</end><user>hi</end><assistant>hello</end>", ["hello</end>"])


def test_a_template_that_wants_a_system_turn_says_what_to_set(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ConfigError, match=r"data\.messages=messages: .* refuses .*no system turn.*set data\.system"):
        chatting(tokenizer, NEEDS_SYSTEM)
    with pytest.raises(ConfigError, match=r"data\.messages=messages, but .* has no chat template"):
        Tokeniser(tokenizer, ModelConfig(source="plain"), TextConfig(messages="messages"))


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        (None, "messages is empty"),
        ("hi", "is no conversation"),
        (["hi"], "is no conversation"),
        ([], "no turn of the assistant"),
        ([{"role": "user", "content": "hi"}], "no turn of the assistant"),
        ([{"from": "human", "value": "hi"}], "has no role"),
        ([{"role": "bot", "content": "hi"}], "has no role, or none of"),
        ([{"role": ["user"], "content": "hi"}], "has no role, or none of"),
        ([{"role": "user", "content": "hi"}, {"role": "assistant", "content": " "}], "content of a turn is empty"),
        ([{"role": "user", "content": [{"text": "hi"}]}, HI[1]], "a part that is no text"),
        ([{"role": "user", "content": [{"type": "image", "text": "hi"}]}, HI[1]], "a part that is no text"),
        ([HI[0], {**HI[1], "tool_calls": [{"id": "1"}]}], "a turn has tool_calls, and only content is learned"),
    ],
)
def test_what_is_no_conversation_is_refused(tokenizer: PreTrainedTokenizerFast, messages: Any, words: str) -> None:
    with pytest.raises(DataError, match=f"record 1: messages.*{words}|record 1: {words}"):
        read(chatting(tokenizer), messages)


@pytest.mark.parametrize("template", [CHATML, THINKING])
def test_the_assistant_may_speak_first(tokenizer: PreTrainedTokenizerFast, template: str) -> None:
    for system in (None, "be kind"):
        whole, parts = learned(tokenizer, read(chatting(tokenizer, template, system=system), [HI[1], *HI[:2]]))
        assert whole.startswith("<system>be kind</end><assistant>" if system else "<assistant>")
        assert [part.removeprefix("<think></think>") for part in parts] == ["hello</end>", "hello</end>"]


def test_a_turn_may_come_in_parts_of_text(tokenizer: PreTrainedTokenizerFast) -> None:
    parts = [{"type": "text", "text": "h", "image": None}, {"type": "text", "text": "i"}]
    cut = [{"role": "user", "content": parts}, {**HI[1], "tool_calls": None}]
    assert learned(tokenizer, read(chatting(tokenizer), cut)) == learned(tokenizer, read(chatting(tokenizer), HI[:2]))


def test_what_is_asked_and_expected_is_the_last_turn(tokenizer: PreTrainedTokenizerFast) -> None:
    tokeniser = chatting(tokenizer)
    row = {"messages": HI}
    assert tokeniser.question(row, 0) == ("desk?", "floor 1")
    assert (
        tokenizer.decode(tokeniser.prompt_ids(row))
        == "<user>hi</end><assistant>hello</end><user>desk?</end><assistant>"
    )
    assert tokenizer.decode(tokeniser.answer_ids(row)) == "floor 1</end>"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, r"data\.text"),
        ({"messages": "m", "label": "l"}, "choose one"),
        ({"text": "{a}", "system": "s"}, r"needs data\.chat=true or data\.messages"),
        ({"text": "{a}", "label": "  "}, "name of a column"),
    ],
)
def test_settings_of_text_that_do_not_fit_are_refused(values: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse(TextConfig, values)
