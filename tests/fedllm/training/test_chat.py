"""Where an answer ends is the same thing for training, generation, evaluation and those who use the adapter."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from fedllm.config import DataConfig
from fedllm.training.chat import AnswerEnd, answer_end
from fedllm.training.data import Tokeniser
from fedllm.training.evaluation import Evaluator
from tests.conftest import byte_tokenizer
from tests.fedllm.training.bases import adapted, language, make

TURNS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DATA = DataConfig(train="unused", prompt="{question}", text="{answer}", chat=True)


def chatting(template: str = TURNS, special: bool = True) -> PreTrainedTokenizerFast:
    """Return a tokenizer whose turns end with a token that is not its end of sequence."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=special)
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("special", [True, False])
def test_the_token_that_closes_a_turn_ends_an_answer(special: bool) -> None:
    tokenizer = chatting(special=special)
    closing = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert answer_end(tokenizer, chat=True) == AnswerEnd((2, closing))
    assert answer_end(tokenizer, chat=False) == AnswerEnd((2,))
    assert AnswerEnd((2, closing)).cut([7, 8, closing, 9, 2]) == [7, 8]
    assert AnswerEnd((2, closing)).cut([7, 8]) == [7, 8]


def test_a_template_that_closes_with_text_or_wants_a_system_turn() -> None:
    text = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }} ### {% endfor %}"
    assert answer_end(chatting(text), chat=True) == AnswerEnd((2,), "###")
    system = "{% if messages[0]['role'] != 'system' %}{{ raise_exception('no') }}{% endif %}" + TURNS
    assert answer_end(chatting(system), chat=True) == answer_end(chatting(), chat=True)
    llama2 = "{% for m in messages %}{{ m['content'] + ' ' + eos_token }}{% endfor %}"
    assert answer_end(chatting(llama2), chat=True) == AnswerEnd((2,))


@pytest.mark.parametrize("special", [True, False])
def test_a_model_that_answers_right_is_found_to_do_so(tmp_path: Path, special: bool) -> None:
    """Its turns end with a token that is not its end of sequence, as those of many chat models do."""
    tokenizer = chatting(special=special)
    folder = make(tmp_path, "llama", tokenizer=tokenizer, hidden_size=32, intermediate_size=64)
    rows = [{"question": "a?", "answer": "yes"}]
    tokeniser = Tokeniser(tokenizer, language(folder), DATA)
    model = AutoModelForCausalLM.from_pretrained(folder)
    prompt = tokeniser.prompt_ids(rows[0])
    ids = torch.tensor([prompt + tokeniser.answer_ids(rows[0])])
    labels = torch.where(torch.arange(ids.shape[1]) < len(prompt), -100, ids)
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    for _ in range(60):
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    config = language(folder, max_length=64)
    adapter = adapted(config)
    evaluator = Evaluator(adapter, rows, Tokeniser(tokenizer, config, DATA), DATA, 1)
    assert evaluator.score(adapter.initial).loss < 0.1
    rate, (sample,) = evaluator.exact_match(adapter.initial)
    assert (rate, sample.answer) == (1.0, "yes")
