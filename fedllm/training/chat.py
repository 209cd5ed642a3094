"""Where a model's answer ends: known once, from the tokenizer and its chat template."""

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

ANSWER = "QZX"  # stands for an answer, in no template


@dataclass(frozen=True)
class AnswerEnd:
    """What ends an answer."""

    tokens: tuple[int, ...]  # one of these ends it: the end of the sequence, and the special token that closes a turn
    text: str = ""  # or this text, where the template closes a turn without a special token

    def cut(self, answer: list[int]) -> list[int]:
        """Return the tokens of an answer up to its end."""
        return answer[: next((place for place, token in enumerate(answer) if token in self.tokens), len(answer))]


def answer_end(tokenizer: PreTrainedTokenizerBase, chat: bool) -> AnswerEnd:
    """Return what ends the answers of a model that learns from records; `chat`: through its chat template."""
    eos = () if tokenizer.eos_token_id is None else (int(tokenizer.eos_token_id),)
    if not chat:
        return AnswerEnd(eos)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": ANSWER}]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False)
    except Exception:  # a template raises anything; some ask for a system turn
        text = tokenizer.apply_chat_template([{"role": "system", "content": "a"}, *turns], tokenize=False)
    closing = str(text).rpartition(ANSWER)[2]
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    ids = tokenizer(closing, add_special_tokens=False)["input_ids"]
    first = next((token for token in ids if token in special), None)
    if first is None:
        return AnswerEnd(eos, closing.strip())
    return AnswerEnd(tuple(dict.fromkeys((*eos, first))))
