"""How a question is put to a released model: as in training, by a chat template and by Ollama's."""

import json
import string
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from fedllm.config import ModelConfig, TextConfig
from fedllm.errors import FedllmError
from fedllm.training.data import Tokeniser

_PROBE = "asked"
_TURNS = """\
{%- set turn = namespace(asked=none) -%}
{%- for message in messages -%}
{%- if message["role"] == "user" -%}{%- set turn.asked = message["content"] -%}{%- endif -%}
{%- endfor -%}
{%- if turn.asked is none -%}{{- raise_exception("expected a turn of the user") -}}{%- endif -%}
"""
_ANSWERED = """
{%- if messages[-1]["role"] == "assistant" -%}
"""


@dataclass(frozen=True)
class Frame:
    """A text with one hole."""

    pieces: tuple[str, ...]  # around every place of what is filled in
    field: str

    @staticmethod
    def of(template: str) -> "Frame | None":
        """Return the frame that a template of one field is; None of any other."""
        parts, texts, fields = list(string.Formatter().parse(template)), [""], set[str]()
        for literal, field, _, _ in parts:
            texts[-1] += literal
            if field is not None:
                fields.add(field)
                texts.append("")
        return Frame(tuple(texts), fields.pop()) if len(fields) == 1 else None

    def written(self, filled: str, literal: str = "{{{{- {} -}}}}") -> str:
        """Return it in another language of templates, `filled` being what stands in the hole."""
        texts = [literal.format(json.dumps(text, ensure_ascii=False)) if text else "" for text in self.pieces]
        return filled.join(texts)


def frame_of(reading: TextConfig) -> Frame | None:
    """Return what is put around a question; None if that takes more than one field, or a conversation."""
    if reading.chats:
        return None
    return Frame(("", ""), "") if not reading.prompt else Frame.of(reading.prompt)


def space_before(reading: TextConfig) -> str:
    """Return the white space that training put before every answer: the record's own text does not have it."""
    text = "" if reading.chats else reading.text or ""
    return text[: len(text) - len(text.lstrip())]


def made_template(tokenizer: PreTrainedTokenizerBase, model: ModelConfig, reading: TextConfig) -> str | None:
    """Return a chat template that puts the last turn of the user as in training; None to leave the base's as it is.

    Of a run that went through the base's template it is that one, given the system turn and the prompt of training.
    Otherwise one is made where a prompt has one field. Earlier turns, and one of the system, were not in training, and
    are left out of it. Whatever tokens the text makes are compared with those of training: some tokenizers make others
    at the beginning of a text than within.
    """
    if reading.chats:
        return _introduced(tokenizer, reading)
    frame = frame_of(reading)
    if frame is None:
        return None
    answer = Frame.of(reading.text or "") or Frame(("", ""), "")
    begin = "{{- bos_token -}}" if tokenizer.bos_token is not None else ""
    end = "{{- eos_token -}}" if tokenizer.eos_token is not None else ""
    answered = answer.written('{{- messages[-1]["content"] -}}')
    candidates = [
        f"{_TURNS}{begin}{gap}{frame.written('{{- turn.asked -}}')}{_ANSWERED}{answered}{end}{{%- endif -%}}\n"
        for gap in ("", '{{- " " -}}')
    ]
    return next((each for each in candidates if _as_in_training(tokenizer, each, model, reading)), candidates[0])


def _introduced(tokenizer: PreTrainedTokenizerBase, reading: TextConfig) -> str | None:
    """Return the base's chat template with what training put before it; None if that was nothing."""
    frame = Frame.of(reading.prompt) if reading.chat and reading.prompt else None
    before = ""
    if frame is not None and frame.pieces != ("", ""):
        asked = ' ~ message["content"] ~ '.join(json.dumps(text, ensure_ascii=False) for text in frame.pieces)
        before += (
            '{%- set kept = namespace(turns=[]) -%}{%- for message in messages -%}{%- if message["role"] == "user" -%}'
            f'{{%- set kept.turns = kept.turns + [{{"role": "user", "content": {asked}}}] -%}}'
            "{%- else -%}{%- set kept.turns = kept.turns + [message] -%}{%- endif -%}{%- endfor -%}"
            "{%- set messages = kept.turns -%}"
        )
    if reading.system is not None:
        before += (
            '{%- if messages[0]["role"] != "system" -%}{%- set messages = [{"role": "system", "content": '
            f"{json.dumps(reading.system, ensure_ascii=False)}}}] + messages -%}}{{%- endif -%}}"
        )
    return before + '{{- "" }}' + tokenizer.get_chat_template() if before else None  # no blank of the base's is cut


def _as_in_training(tokenizer: PreTrainedTokenizerBase, template: str, model: ModelConfig, reading: TextConfig) -> bool:
    """Whether a template makes the tokens of training."""
    frame = frame_of(reading)
    try:
        trained = Tokeniser(tokenizer, model, reading).prompt_ids(_Anything())
    except FedllmError:
        return False
    turns = [{"role": "user", "content": _PROBE if frame and frame.field else ""}]
    made = tokenizer.apply_chat_template(turns, chat_template=template, tokenize=True, return_dict=False)
    return list(made) == trained


class _Anything(dict[str, str]):
    """A record that has every column."""

    def get(self, key: str, default: object = None) -> str:
        return _PROBE


def ollama_template(frame: Frame) -> str:
    """Return the TEMPLATE of a Modelfile: Go's text/template, whose strings are written like those of JSON."""
    return frame.written("{{ .Prompt }}", "{{{{ {} }}}}")
