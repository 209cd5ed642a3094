"""What a request in OpenAI's form asks for: checked in full before the model sees it.

A field that would change the answer, and that this server does not have, is refused by its name: an answer that
quietly ignores it would be a wrong one. No message here quotes what a request holds.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from fedllm.errors import Refused

_MOST_STOPS, _MOST_TURNS = 16, 1000
# Logits divided by less are infinite, and no number can be drawn of them: vLLM raises a temperature likewise.
_COLDEST, _NARROWEST = 0.01, 1e-6
_ROLES = ("system", "developer", "user", "assistant")
# They change no answer here: who asks, what is kept (nothing), and where it is computed.
_HARMLESS = {"user", "metadata", "stream_options", "service_tier", "safety_identifier", "prompt_cache_key",
             "prompt_cache_retention", "parallel_tool_calls"}  # fmt: skip
# Fields that this server does not have, with the values by which a client asks for nothing.
_NOTHING: dict[str, tuple[Any, ...]] = {
    "n": (1,), "best_of": (1,), "logprobs": (False,), "top_logprobs": (0,), "echo": (False,), "suffix": ("",),
    "presence_penalty": (0,), "frequency_penalty": (0,), "logit_bias": ({},), "tools": ([],), "functions": ([],),
    "tool_choice": ("none",), "function_call": ("none",), "response_format": ({"type": "text"},), "store": (False,),
    "modalities": (["text"],),
}  # fmt: skip
_OWN = {"model", "stream", "temperature", "top_p", "stop", "seed", "max_tokens"}
_CHAT, _TEXT = {"messages", "max_completion_tokens"}, {"prompt"}


@dataclass(frozen=True)
class ModelRequest:
    """A request that can be answered: what of it the library's handlers read."""

    body: dict[str, Any]
    stop: tuple[str, ...] = ()
    most: int | None = None  # tokens of the answer


def wrong(text: str, code: str = "invalid_request") -> Refused:
    """Return the refusal of a request that is not well formed."""
    return Refused(400, text, code)


def chat(body: object, model: str, known: Collection[str]) -> ModelRequest:
    """Check a request for a chat completion; `known` are all of OpenAI's fields. Raises Refused."""
    content = _fields(body, model, _OWN | _CHAT, known)
    messages = content.get("messages")
    if not isinstance(messages, list) or not 1 <= len(messages) <= _MOST_TURNS:
        raise wrong(f"messages: expected a list of 1 to {_MOST_TURNS} messages")
    turns = [_turn(message, number) for number, message in enumerate(messages)]
    return _asked(content, {"messages": turns})


def completion(body: object, model: str, known: Collection[str]) -> ModelRequest:
    """Check a request for a completion; raises Refused."""
    content = _fields(body, model, _OWN | _TEXT, known)
    prompt = content.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1:
        prompt = prompt[0]
    return _asked(content, {"prompt": _text(prompt, "prompt: expected one text")})


def classification(body: object, model: str) -> list[str | dict[str, str]]:
    """Check a request for a classification; returns texts, or columns with their texts. Raises Refused."""
    content = _fields(body, model, {"model", "input"}, {"model", "input"})
    given = content.get("input")
    inputs = given if isinstance(given, list) else [given]
    if not 1 <= len(inputs) <= _MOST_TURNS:
        raise wrong(f"input: expected a text, or a list of 1 to {_MOST_TURNS} texts")
    form = "input: expected texts, or objects of texts by column"
    return [
        {_text(name, form): _text(value, form) for name, value in one.items()}
        if isinstance(one, dict)
        else _text(one, form)
        for one in inputs
    ]


def _fields(body: object, model: str, own: Collection[str], known: Collection[str]) -> Mapping[str, Any]:
    if not isinstance(body, dict):
        raise wrong("expected a JSON object")
    for name, value in body.items():
        if name in own or name in _HARMLESS or value is None or _asks_nothing(name, value):
            continue
        named = name if name in known or name in _NOTHING else "an unknown field"  # what is unknown may be anything
        raise wrong(f"{named}: not supported here, and it would change the answer. Leave it out.", "unsupported_field")
    if body.get("model") not in (None, model):
        raise Refused(404, f"there is one model here, {model}, and the request names another", "model_not_found")
    return body


def _asks_nothing(name: str, value: object) -> bool:
    # false is no number here, though it equals 0 in Python: logprobs=0 asks for something
    return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in _NOTHING.get(name, ()))


def _asked(content: Mapping[str, Any], question: dict[str, Any]) -> ModelRequest:
    temperature = _number(content, "temperature", 0.0, 2.0)
    top_p = _number(content, "top_p", 0.0, 1.0)
    if temperature:
        temperature = max(temperature, _COLDEST)
    if top_p is not None:
        top_p = max(top_p, _NARROWEST)  # the likeliest token alone; to the library, 0 means that nothing was asked
    most = _count(content, "max_completion_tokens") or _count(content, "max_tokens")
    stream = content.get("stream") or False
    if not isinstance(stream, bool):
        raise wrong("stream: expected true or false")
    if content.get("seed") is not None and temperature != 0:
        raise wrong(
            "seed: requests share one stream of random numbers here. With temperature 0 there is none, and a seed is "
            "accepted.",
            "unsupported_field",
        )
    stop = content.get("stop")
    stops = [stop] if isinstance(stop, str) else stop or []
    if not isinstance(stops, list) or len(stops) > _MOST_STOPS:
        raise wrong(f"stop: expected a text, or a list of at most {_MOST_STOPS} texts")
    ends = tuple(dict.fromkeys(text for one in stops if (text := _text(one, "stop: expected texts"))))
    chosen = {"temperature": temperature, "top_p": top_p, "max_tokens": most}
    given = {name: value for name, value in chosen.items() if value is not None}
    return ModelRequest({**question, **given, "stream": stream}, ends, most)


def _number(content: Mapping[str, Any], name: str, least: float, most: float) -> float | None:
    value = content.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise wrong(f"{name}: expected a number from {least:g} to {most:g}")
    return float(value)


def _count(content: Mapping[str, Any], name: str) -> int | None:
    value = content.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise wrong(f"{name}: expected a whole number of tokens, 1 or more")
    return value


def _turn(message: object, number: int) -> dict[str, str]:
    where = f"messages[{number}]"
    if not isinstance(message, dict):
        raise wrong(f"{where}: expected an object with role and content")
    if any(value not in (None, [], "") for name, value in message.items() if name not in ("role", "content", "name")):
        raise wrong(f"{where}: only role and content are supported", "unsupported_field")
    role, content = message.get("role"), message.get("content")
    if role not in _ROLES:
        raise wrong(f"{where}.role: expected one of {', '.join(_ROLES)}")
    if isinstance(content, list):
        if not all(isinstance(part, dict) and part.get("type") == "text" for part in content):
            raise wrong(f"{where}.content: only parts of type text are supported", "unsupported_field")
        content = "".join(_text(part.get("text"), f"{where}.content: expected texts") for part in content)
    text = _text(content, f"{where}.content: expected a text")
    return {"role": "system" if role == "developer" else role, "content": text}


def _text(value: object, expected: str) -> str:
    if not isinstance(value, str):
        raise wrong(expected)
    try:
        value.encode()
    except UnicodeEncodeError:
        raise wrong(f"{expected}, and half of a surrogate pair is none") from None
    return value
