"""What a request may ask for: all that is not supported is refused by name, and nothing of it is quoted."""

from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers.cli.serving.chat_completion import ChatCompletionHandler

from fedllm.errors import Refused
from fedllm.release import openai_request

KNOWN = ChatCompletionHandler._valid_params_class.__annotations__
HELLO = {"messages": [{"role": "user", "content": "hello"}]}
SECRET = "S3CR3T"


def chat(**fields: Any) -> openai_request.ModelRequest:
    return openai_request.chat({**HELLO, **fields}, "model", KNOWN)


def test_a_plain_request_is_handed_on() -> None:
    found = chat(model="model", temperature=0, max_tokens=5, stream=True, stop=["a", "b", "a"], user="me", n=1)
    assert found.body == {**HELLO, "temperature": 0.0, "max_tokens": 5, "stream": True}
    assert found.stop == ("a", "b")
    assert chat().body == {**HELLO, "stream": False}


@pytest.mark.parametrize(
    "field",
    ["n", "logprobs", "top_logprobs", "tools", "tool_choice", "functions", "response_format", "logit_bias", "store",
     "presence_penalty", "frequency_penalty", "audio", "prediction", "modalities", "reasoning_effort",
     "web_search_options", "generation_config", "chat_template_kwargs"],
)  # fmt: skip
def test_a_field_that_would_change_the_answer_is_refused_by_its_name(field: str) -> None:
    with pytest.raises(Refused, match=field) as refused:
        chat(**{field: {SECRET: SECRET}})
    assert refused.value.status == 400
    assert SECRET not in str(refused.value)


@pytest.mark.parametrize(
    "fields",
    [{"n": None}, {"n": 1}, {"tools": []}, {"logprobs": False}, {"frequency_penalty": 0}, {"presence_penalty": 0.0},
     {"response_format": {"type": "text"}}, {"stream_options": {"include_usage": True}}, {"metadata": {"a": "b"}},
     {"seed": 7, "temperature": 0}, {"store": False}, {"parallel_tool_calls": True}],
)  # fmt: skip
def test_what_asks_for_nothing_is_accepted(fields: dict[str, Any]) -> None:
    assert chat(**fields).body["messages"] == HELLO["messages"]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"temperature": 3}, "temperature"), ({"temperature": True}, "temperature"), ({"temperature": SECRET}, "temp"),
        ({"top_p": -1}, "top_p"), ({"max_tokens": 0}, "max_tokens"), ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_completion_tokens": SECRET}, "max_completion_tokens"), ({"stream": 1}, "stream"), ({"stop": 3}, "stop"),
        ({"stop": ["a"] * 17}, "stop"), ({"stop": [3]}, "stop"), ({"seed": 3}, "seed"), ({"logprobs": 0}, "logprobs"),
        ({"seed": 3, "temperature": 1}, "seed"), ({"messages": []}, "messages"), ({"messages": SECRET}, "messages"),
        ({"messages": [SECRET]}, r"messages\[0\]"), ({"messages": [{"role": SECRET, "content": ""}]}, "role"),
        ({"messages": [{"role": "user"}]}, "content"), ({"messages": [{"role": "user", "content": "\ud800"}]}, "half"),
        ({"messages": [{"role": "user", "content": "a", "tool_calls": [SECRET]}]}, "only role and content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": SECRET}]}]}, "type text"),
        ({SECRET: 1}, "an unknown field"), ({"model": SECRET}, "one model"),
    ],
)  # fmt: skip
def test_what_is_not_well_formed_is_refused_without_being_quoted(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(Refused, match=said) as refused:
        chat(**fields)
    assert SECRET not in str(refused.value)


def test_parts_of_text_are_one_text_and_a_developer_is_the_system() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    found = chat(messages=[{"role": "developer", "content": parts}, {"role": "user", "content": "c", "name": "x"}])
    assert found.body["messages"] == [{"role": "system", "content": "ab"}, {"role": "user", "content": "c"}]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*KNOWN, "x", "input"]), inner),
    max_leaves=8,
)


@given(JSON)
def test_whatever_is_asked_it_is_accepted_or_refused(body: Any) -> None:
    for read in (
        lambda: openai_request.chat(body, "m", KNOWN), lambda: openai_request.completion(body, "m", KNOWN),
        lambda: openai_request.classification(body, "m"),
    ):  # fmt: skip
        with suppress(Refused):  # anything else would fail the test
            read()


def test_a_text_to_classify_is_one_or_several_or_in_columns() -> None:
    assert openai_request.classification({"input": "a"}, "m") == ["a"]
    assert openai_request.classification({"input": ["a", {"q": "b"}], "model": "m"}, "m") == ["a", {"q": "b"}]
    for wrong in (None, [], 3, [3], {"q": 3}, ["a"] * 1001):
        with pytest.raises(Refused, match="input"):
            openai_request.classification({"input": wrong}, "m")


@pytest.mark.parametrize("temperature", [5e-324, 1e-40, 1e-3])
def test_no_temperature_makes_logits_infinite_which_would_end_the_thread_that_answers_all(temperature: float) -> None:
    found = chat(temperature=temperature).body["temperature"]
    assert np.isfinite(np.float32(1e30) / np.float32(found))


def test_top_p_of_0_is_the_narrowest_and_not_taken_for_none() -> None:
    assert 0 < chat(top_p=0).body["top_p"] < 1e-3
