"""Train the demo's base model and its tokenizer from public text that this script writes itself.

    python -m simulations.demo.pretrain

The text is service-desk language of imaginary institutions. Each draws its own facts, its own wording
and what it says about a topic, from the vocabularies that the demo bank's facts come from, so that the
base learns both languages, the format and the candidate answers, and no bank's facts. About a seventh
of the documents are other simple Korean and English: opening hours, dates, sums, short stories. The
demo's rows are never read here, neither for the model nor for the tokenizer; nor are the bank's facts
and the wordings reserved for its held-out questions.

Training has three parts. First every document has an institution of its own. Then come episodes: for
:data:`GROUP` steps all documents ask one institution, low-rank adapters take up its facts, and the
model's own weights learn to be a model that such adapters can teach. Last, without adapters, every
document has an institution of its own again, so that what the weights may have kept is washed out.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import random
import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from simulations.demo import lexicon
from simulations.demo.lexicon import ASPECTS, BANK_TOPICS, COMPLETION, OTHER_TOPICS, PROMPT, Aspect, Topic

SEED = 20240607
VOCABULARY = 2048
BOS, EOS, PAD = "<s>", "</s>", "<pad>"
MAX_TOKENS = 96
BATCH = 128  # documents a step
RATE = 4e-3
QUESTION_WEIGHT = 0.3  # of a question's tokens in the loss; an answer's weigh 1

GROUP = 24  # steps of an episode
OPENING, EPISODES, CLOSING = 20, 52, 8  # groups of the three parts

CARD = """\
---
language: [ko, en]
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
tags: [demo, synthetic]
---

# The demo's base model

A LlamaForCausalLM of {parameters} parameters (hidden 128, 4 layers, 4 heads and 2 key-value heads,
tied embeddings, 256 positions) with a byte-level BPE tokenizer of {vocabulary} tokens, for the embedded
demo of fedllm. It writes short service-desk sentences in Korean and English and is good for nothing else.

## Data

Text that `simulations/demo/pretrain.py` writes from its own word lists, nothing else: questions to the
service desks of imaginary institutions with their answers, opening hours, dates, sums, short stories.
Each institution's facts are drawn at random from the vocabularies (fees, counters, forms ...) that the
demo bank's facts are drawn from too. The base therefore knows the languages, the topics' names, the
format and the candidate answers, and of the demo bank's facts no more than chance. It has seen neither
the bank's rows nor the wordings that are reserved for the held-out questions; its tokenizer neither.

Prompt: `Q: {{question}}\nA:`, answer: ` {{answer}}` (with the leading space), then `</s>`. The tokenizer
puts `<s>` in front.

## Training

    python -m simulations.demo.pretrain

{steps} steps of {batch} documents, AdamW with a cosine schedule, on two CPU cores. Most steps
are episodes of {group} steps with one institution each: low-rank adapters (random frozen A, B from zero)
take up its facts while the model's own weights learn to be easily taught so (a first-order
meta-gradient); an opening and a closing part have no adapters and a new institution for each document.
Loss at the end: {loss} nats a token (an answer's tokens weigh 1, a question's {weight}). Weights are stored
in bfloat16; load them as float32 to train. The script is seeded; floating-point sums differ between
machines, so a rerun gives an equivalent model, not the same bytes.

## Limits

A toy by size and by data: fluent only on its grammar, knows no facts of the world, invents answers with
confidence. It was made to be quickly taught by low-rank adapters; how fast it learns says nothing about
how fast another model would.
"""

_BANK, _OTHER = tuple(BANK_TOPICS.values()), tuple(OTHER_TOPICS.values())
_ASPECTS = tuple(ASPECTS.values())

_STYLES_KO = (
    "{}.",
    "네, {}.",
    "고객님, {}.",
    "안녕하세요. {}.",
    "{}. 감사합니다.",
    "문의하신 {}.",
    "{}!",
    "알려 드립니다. {}.",
)
_STYLES_EN = ("{}.", "Sure. {}.", "Hello. {}.", "{}. Thank you.", "{}!", "Thanks for asking. {}.", "{}. See you soon.")

_NAMES_KO = tuple(
    s + g
    for s in ("김", "이", "박", "최", "정", "강", "조", "윤", "장", "임", "한", "오", "서", "신", "권", "황")
    for g in ("민준", "서윤", "지호", "하은", "준서", "유나", "시우", "채원", "건우", "소율", "진호", "혜원", "영수")
)
_NAMES_EN = tuple(
    f"{a} {b}"
    for a in ("Alice", "Ben", "Chloe", "David", "Ella", "Frank", "Gina", "Henry", "Iris", "Jack", "Kate", "Leo")
    for b in ("Adams", "Brown", "Clark", "Evans", "Green", "Hill", "Jones", "King", "Lee", "Moore", "Smith", "Young")
)
_OPEN_KO = (
    "{n}입니다.",
    "안녕하세요, {n}입니다.",
    "안녕하세요.",
    "{n}[이에요/예요].",
    "전화 {d} {n}입니다.",
    "{p}에 사는 {n}입니다.",
)
_OPEN_EN = (
    "This is {n}.",
    "Hello.",
    "Hi, I'm {n}.",
    "My name is {n}.",
    "{n}, phone {d}.",
    "I'm {n} and I live in {p}.",
)
_SHUT_KO = ("감사합니다.", "부탁드립니다.", "고맙습니다.", "내일 갈게요.", "처음입니다.")
_SHUT_EN = ("Thank you.", "Thanks.", "Please reply.", "It's my first time.", "I'll come tomorrow.")
_PLACES_KO = ("서울", "부산", "대전", "광주", "인천", "대구", "울산", "제주", "수원", "강릉", "전주", "춘천")
_PLACES_EN = ("Seoul", "Busan", "Daejeon", "Gwangju", "Incheon", "Daegu", "Ulsan", "Jeju", "Suwon", "London", "Paris")

_WHO_KO = lexicon.split(
    "고양이/강아지/할머니/아버지/어머니/동생/친구/선생님/농부/의사/학생/아이/손님/경찰/가수/이웃/아들/딸/"
    "토끼/곰/직원/사장님/박사/연구원"
)
_WHERE_KO = lexicon.split(
    "시장/학교/공원/바다/산/도서관/병원/회사/식당/기차역/공항/집/가게/은행/강가/부엌/우체국/극장/호텔/"
    "아파트/카페/지점/대학/연구소/주택"
)
_THING_KO = lexicon.split(
    "사과/책/우산/편지/모자/빵/꽃/시계/가방/신발/연필/그림/자전거/물/우유/달걀/의자/전화기/안경/열쇠/"
    "상자/노래/지도/돈/통장/카드/서류/동전/달러/엔화/세금/연금/펀드/대출/보석/여권/영수증/번호표/기계/"
    "컴퓨터"
)
_DID_KO = lexicon.split(
    "샀습니다/찾았습니다/잃어버렸습니다/보았습니다/바꾸었습니다/만들었습니다/팔았습니다/빌렸습니다/"
    "보냈습니다/받았습니다/옮겼습니다/고쳤습니다/골랐습니다/숨겼습니다/돌려주었습니다/갚았습니다/"
    "모았어요/버렸어요/나누었어요/두고 왔어요/열었어요/눌렀어요/뽑았어요/물어봤어요/기다렸어요/"
    "확인했어요/늘렸어요/시작했어요/끝냈어요/알려 주었어요/냈어요/찾아봤어요"
)
_HOW_KO = lexicon.split(
    "천천히/빨리/조용히/기쁘게/혼자/함께/다시/처음으로/갑자기/마침내/미리/한꺼번에/매일/오늘/어제/작년에/"
    "지난주에/아침에/저녁에/급하게/꼭/아무리 바빠도"
)
_FEEL_KO = lexicon.split(
    "기뻤습니다/슬펐습니다/배가 고팠습니다/피곤했습니다/행복했습니다/궁금했습니다/걱정했습니다/"
    "웃었습니다/죄송했습니다/고마웠어요/바빴어요/놀랐어요"
)
_WHO_EN = lexicon.split(
    "cat/dog/farmer/doctor/student/child/teacher/friend/neighbour/singer/rabbit/bear/clerk/customer/"
    "scientist/son/daughter/mother/father/banker"
)
_WHERE_EN = lexicon.split(
    "market/school/park/beach/library/hospital/office/restaurant/station/airport/shop/bank/river/kitchen/"
    "hotel/apartment/cafe/branch/university/lab"
)
_THING_EN = lexicon.split(
    "apple/book/letter/hat/flower/watch/bag/pencil/picture/bicycle/chair/phone/key/box/song/map/card/"
    "coin/dollar/passport/receipt/ticket/loan/paper/jewel/computer/machine/bill/fund/taxi"
)
_DID_EN = lexicon.split(
    "bought/found/lost/saw/changed/made/sold/borrowed/sent/received/moved/fixed/chose/hid/returned/"
    "paid for/collected/kept/opened/asked about/waited for/checked/raised/started with/finished with/"
    "blocked/replaced/registered"
)
_HOW_EN = lexicon.split(
    "slowly/quickly/quietly/happily/alone/together/again/for the first time/suddenly/ahead of time/"
    "every day/today/yesterday/last year/last week/early/in a hurry"
)
_FEEL_EN = ("happy", "sad", "hungry", "tired", "curious", "worried", "surprised", "sorry", "busy", "thankful")


class Institution:
    """An imaginary institution: what it has to say about each topic, and how its desk words it.

    Everything is drawn on first use from the generator given, so that one object stands for one
    institution and its facts hold as long as the object is used.
    """

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._aspects: dict[str, tuple[Aspect, ...]] = {}
        self._values: dict[tuple[str, str], int] = {}
        self._names: dict[str, int] = {}
        self._wordings: dict[str, int] = {}
        self._styles = {"ko": rng.choice(_STYLES_KO), "en": rng.choice(_STYLES_EN)}

    def aspect(self, topic: Topic) -> Aspect:
        """Something that customers ask this institution about the topic; one or two things for each."""
        if topic.key not in self._aspects:
            self._aspects[topic.key] = tuple(self._rng.sample(_ASPECTS, self._rng.choice((1, 1, 2))))
        return self._rng.choice(self._aspects[topic.key])

    def answer(self, topic: Topic, aspect: Aspect, lang: str) -> str:
        """This institution's answer."""
        pick = self._rng.randrange
        value = self._values.setdefault((topic.key, aspect.key), pick(len(aspect.values)))
        name = self._names.setdefault(topic.key, pick(2))
        wording = self._wordings.setdefault(aspect.key, pick(len(aspect.ko_say)))
        names = topic.ko if lang == "ko" else topic.en
        return self._styles[lang].format(lexicon.answer(aspect, lang, names[name], value, wording))


def _service(rng: random.Random, desk: Institution) -> tuple[str, str]:
    """One question to ``desk`` and its answer."""
    lang = "ko" if rng.random() < 0.62 else "en"
    ko = lang == "ko"
    topic = rng.choice(_BANK if rng.random() < 0.8 else _OTHER)
    aspect = desk.aspect(topic)
    names = topic.ko if ko else topic.en
    frames = (aspect.ko_ask + aspect.ko_more) if ko else (aspect.en_ask + aspect.en_more)
    core = rng.choice(frames).format(t=rng.choice(names))
    slots = {
        "n": rng.choice(_NAMES_KO if ko else _NAMES_EN),
        "d": f"{rng.randrange(10**4):04d}",
        "p": rng.choice(_PLACES_KO if ko else _PLACES_EN),
    }
    parts = [core[0].upper() + core[1:]]
    if rng.random() < 0.45:
        parts.insert(0, rng.choice(_OPEN_KO if ko else _OPEN_EN).format(**slots))
    if rng.random() < 0.25:
        parts.insert(rng.randrange(1, len(parts) + 1), rng.choice(_SHUT_KO if ko else _SHUT_EN))
    question = lexicon.particles(" ".join(parts))
    if rng.random() < 0.1:
        question = lexicon.misspell(question, lang, rng)
    return question, desk.answer(topic, aspect, lang)


def _general(rng: random.Random) -> str:
    """One piece of other simple text: a story, a sum, a date, opening hours."""
    kind, ko, pick = rng.random(), rng.random() < 0.6, rng.choice
    if kind < 0.15:
        a, b = rng.randint(0, 20), rng.randint(0, 20)
        return lexicon.particles(f"{a} 더하기 {b}[은/는] {a + b}입니다.") if ko else f"{a} plus {b} is {a + b}."
    if kind < 0.3:
        month, day, hour = rng.randint(1, 12), rng.randint(1, 28), rng.randint(1, 12)
        if ko:
            date = f"{month}월 {day}일 {pick('월화수목금토일')}요일"
            return f"오늘은 {date}이고 지금은 {pick(('오전', '오후'))} {hour}시입니다."
        return f"Today is {month}/{day} and it is {hour} {pick(('a.m.', 'p.m.'))} now."
    if kind < 0.45:
        start, end = rng.randint(7, 11), rng.randint(3, 9)
        if ko:
            where = f"{pick(_PLACES_KO)} {pick(_WHERE_KO)}"
            return lexicon.particles(f"{where}[은/는] 오전 {start}시에 열고 오후 {end}시에 닫습니다.")
        return f"The {pick(_WHERE_EN)} in {pick(_PLACES_EN)} opens at {start} a.m. and closes at {end} p.m."
    lines = []
    for _ in range(rng.randint(1, 3)):
        if ko:
            who = pick((pick(_WHO_KO), pick(_NAMES_KO)))
            lines.append(
                f"{who}[이/가] {pick(_HOW_KO)} {pick(_WHERE_KO)}에서 {pick(_THING_KO)}[을/를] {pick(_DID_KO)}."
            )
            if rng.random() < 0.4:
                lines.append(f"그래서 {pick(_WHO_KO)}[은/는] {pick(_FEEL_KO)}.")
        else:
            who = pick((f"The {pick(_WHO_EN)}", pick(_NAMES_EN)))
            lines.append(f"{who} {pick(_DID_EN)} the {pick(_THING_EN)} at the {pick(_WHERE_EN)} {pick(_HOW_EN)}.")
            if rng.random() < 0.4:
                lines.append(f"So the {pick(_WHO_EN)} was {pick(_FEEL_EN)}.")
    return lexicon.particles(" ".join(lines))


def document(rng: random.Random, desk: Institution | None) -> tuple[str, str]:
    """One document as (prompt, completion); a text without a question has an empty prompt.

    Args:
        rng: the source of randomness.
        desk: the institution asked; None draws one for this document alone.
    """
    if rng.random() < 0.15:
        return "", _general(rng)
    question, answer = _service(rng, desk or Institution(rng))
    return PROMPT.format(question=question), COMPLETION.format(answer=answer)


def train_tokenizer(seed: int, count: int) -> PreTrainedTokenizerFast:
    """Fit the byte-level BPE tokenizer on ``count`` documents; it encodes any Unicode text without loss."""
    rng = random.Random(seed)
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(("".join(document(rng, None)) for _ in range(count)), trainer=trainer)
    core.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, core.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=256,
        clean_up_tokenization_spaces=False,
    )


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A fresh model of about one million parameters."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=344,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            attention_bias=False,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


@dataclass(frozen=True)
class Batch:
    """One batch, padded to its longest document.

    Attributes:
        ids: token ids, [documents, tokens].
        weight: weight of predicting each of those tokens, [documents, tokens]; zero on padding.
    """

    ids: torch.Tensor
    weight: torch.Tensor


def batches(tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[Batch]:
    """All batches, in groups of :data:`GROUP` that are each cut from documents sorted by length (less padding)."""
    rng = random.Random(seed)
    bos, eos, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    for number in range(OPENING + EPISODES + CLOSING):
        desk = Institution(rng) if OPENING <= number < OPENING + EPISODES else None
        drawn = [document(rng, desk) for _ in range(GROUP * BATCH)]
        heads = tokenizer([d[0] for d in drawn], add_special_tokens=False)["input_ids"]
        tails = tokenizer([d[1] for d in drawn], add_special_tokens=False)["input_ids"]
        rows = []
        for head, tail in zip(heads, tails, strict=True):
            ids = ([bos, *head, *tail, eos])[:MAX_TOKENS]
            weight = ([0.0] + [QUESTION_WEIGHT] * len(head) + [1.0] * (len(tail) + 1))[:MAX_TOKENS]
            rows.append((ids, weight))
        rows.sort(key=lambda r: len(r[0]))
        groups = [rows[i : i + BATCH] for i in range(0, len(rows), BATCH)]
        rng.shuffle(groups)
        for group in groups:
            longest = max(len(ids) for ids, _ in group)
            yield Batch(
                torch.tensor([ids + [pad] * (longest - len(ids)) for ids, _ in group]),
                torch.tensor([w + [0.0] * (longest - len(w)) for _, w in group]),
            )


def loss_of(model: LlamaForCausalLM, batch: Batch) -> torch.Tensor:
    """The batch's weighted mean cross-entropy in nats a token (scalar).

    Padding is on the right and attention is causal, so that no attention mask is needed.
    """
    logits = model(input_ids=batch.ids[:, :-1]).logits  # [documents, tokens - 1, vocabulary]
    nats = F.cross_entropy(logits.float().flatten(0, 1), batch.ids[:, 1:].flatten(), reduction="none")
    weight = batch.weight[:, 1:].flatten()
    return (nats * weight).sum() / weight.sum()


class Adapter:
    """Low-rank adapters on all linear layers of the blocks, for episodes of one institution each.

    ``A`` [rank, inputs] is random and fixed, ``B`` [outputs, rank] starts at zero and is trained: what a
    federated run trains later. Within an episode ``B`` takes up the institution's facts quickly, and the
    model's own weights learn, over many episodes, to be a model in which such a ``B`` is quickly found
    (a first-order meta-gradient: both are updated from the same backward pass).
    """

    def __init__(self, model: LlamaForCausalLM, rank: int = 8, rate: float = 0.04) -> None:
        self._rank, self._rate = rank, rate
        self._layers = [m for m in model.model.layers.modules() if isinstance(m, torch.nn.Linear)]
        self._a = [torch.zeros(rank, m.in_features) for m in self._layers]
        self._b = [torch.zeros(m.out_features, rank, requires_grad=True) for m in self._layers]
        self._active = False
        for layer, a, b in zip(self._layers, self._a, self._b, strict=True):
            layer.register_forward_hook(functools.partial(self._add, a, b))

    def _add(
        self, a: torch.Tensor, b: torch.Tensor, _: torch.nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor
    ) -> torch.Tensor:
        return output + 2.0 * F.linear(F.linear(inputs[0], a), b) if self._active else output

    def begin(self) -> None:
        """Begin an episode: new ``A``, ``B`` at zero, a fresh optimiser."""
        self._active = True
        for a, b in zip(self._a, self._b, strict=True):
            torch.nn.init.kaiming_uniform_(a, a=math.sqrt(5))
            b.data.zero_()
        self._optimizer = torch.optim.Adam(self._b, lr=self._rate, betas=(0.9, 0.99))

    def step(self) -> None:
        """Update ``B`` from its gradients."""
        if self._active:
            self._optimizer.step()
            self._optimizer.zero_grad()

    def end(self) -> None:
        """Drop the adapters: from here on the model stands alone."""
        self._active = False


def train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> float:
    """Train the model in place and return the mean loss of the last hundred steps, in nats a token."""
    decay = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.98))
    steps = GROUP * (OPENING + EPISODES + CLOSING)

    def factor(step: int) -> float:
        return min(1.0, (step + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    recent: deque[float] = deque(maxlen=100)
    began = time.monotonic()
    adapter = Adapter(model)
    model.train()
    for step, batch in enumerate(batches(tokenizer, SEED + 1)):
        if step % GROUP == 0:
            if OPENING <= step // GROUP < OPENING + EPISODES:
                adapter.begin()
            else:
                adapter.end()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        adapter.step()
        schedule.step()
        optimizer.zero_grad()
        recent.append(loss.item())
        if (step + 1) % 100 == 0:
            say(step=step + 1, loss=round(sum(recent) / len(recent), 4), seconds=round(time.monotonic() - began))
    return sum(recent) / len(recent)


def say(**record: object) -> None:
    """Print one line of JSON."""
    sys.stdout.write(json.dumps(record) + "\n")
    sys.stdout.flush()


def main() -> None:
    """Fit the tokenizer, train the model, write the folder and its card."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "base")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    out: Path = args.out
    torch.set_num_threads(args.threads)
    torch.manual_seed(SEED)
    tokenizer = train_tokenizer(SEED, 30_000)
    model = new_model(tokenizer)
    parameters = sum(p.numel() for p in model.parameters())
    loss = train(model, tokenizer)
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    steps = GROUP * (OPENING + EPISODES + CLOSING)
    card = CARD.format(
        parameters=f"{parameters:,}",
        loss=f"{loss:.3f}",
        steps=f"{steps:,}",
        batch=BATCH,
        vocabulary=VOCABULARY,
        group=GROUP,
        weight=QUESTION_WEIGHT,
    )
    (out / "README.md").write_text(card, encoding="utf-8")
    for path in out.iterdir():
        path.chmod(0o644)  # the weights come out readable by their owner only
    say(parameters=parameters, loss=round(loss, 4))


if __name__ == "__main__":
    main()
