"""Generate the demo's corpus: the service desk of the eight sites of an invented bank.

    python -m simulations.demo.corpus
    python -m simulations.demo.corpus --branches 1000 --out runs/thousand    # of a bank with many small branches

Every name, number and fact is drawn from a public seed, so the files come out the same byte for byte.
A row has ``branch`` (the site), ``customer_id`` (the privacy unit: a customer belongs to one branch and
has one to four rows), ``lang``, ``question`` and ``answer``. An answer states one fact of this bank in
the bank's one wording of it for that language, so that an exact match is well defined. The facts are
random draws: no model knows them before it has been trained on the branches' rows.

The branches differ (non-IID): each has its own mix of topics and of languages, and every fact occurs in
at least three branches. The held-out rows are the server's own: other wordings, other names.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from simulations.demo import lexicon
from simulations.demo.lexicon import ASPECTS, BANK_TOPICS

SEED = "daon-bank-1"

# (topic, what is asked about it).
_FACTS: tuple[tuple[str, str], ...] = (
    ("remit", "fee"),
    ("inward", "days"),
    ("exchange", "until"),
    ("fxdeposit", "counter"),
    ("foreigner", "form"),
    ("arc", "menu"),
    ("refund", "counter"),
    ("passbook", "fee"),
    ("debit", "days"),
    ("credit", "menu"),
    ("lost", "desk"),
    ("netbank", "form"),
    ("otp", "fee"),
    ("translimit", "form"),
    ("vault", "fee"),
    ("wealth", "desk"),
    ("fund", "until"),
    ("pension", "days"),
    ("mortgage", "desk"),
    ("research", "limit"),
    ("jeonse", "limit"),
    ("prepay", "counter"),
    ("letter", "until"),
    ("export", "days"),
    ("forward", "desk"),
    ("terminal", "days"),
    ("balance", "fee"),
    ("history", "menu"),
    ("coin", "until"),
    ("tuition", "menu"),
    ("inherit", "form"),
    ("localtax", "counter"),
)


@dataclass(frozen=True)
class Fact:
    """One fact of the bank and its canonical wording in each language."""

    topic: str
    aspect: str
    ko: str
    en: str

    def answer(self, lang: str) -> str:
        """The bank's one wording of the fact in ``lang``."""
        return self.ko if lang == "ko" else self.en


@dataclass(frozen=True)
class Branch:
    """A site (a site).

    Attributes:
        name: the site's name.
        customers: how many customers it has.
        english: the share of its rows in English.
        home: topics it is asked about most; the others come up now and then, ``never`` not at all.
    """

    name: str
    ko: str
    en: str
    code: str
    customers: int
    english: float
    home: tuple[str, ...]
    never: tuple[str, ...]


BRANCHES: tuple[Branch, ...] = (
    Branch("seoul-gangnam", "강남", "Gangnam", "GN", 1110, 0.20,
           ("wealth", "fund", "pension", "vault", "mortgage", "inherit", "credit", "prepay"),
           ("export", "letter", "refund", "coin")),
    Branch("seoul-mapo", "마포", "Mapo", "MP", 1090, 0.25,
           ("terminal", "debit", "jeonse", "netbank", "lost", "translimit", "coin", "passbook"),
           ("export", "letter", "forward", "research")),
    Branch("seoul-itaewon", "이태원", "Itaewon", "IT", 1060, 0.80,
           ("foreigner", "arc", "remit", "inward", "debit", "otp", "tuition", "lost"),
           ("inherit", "research", "localtax", "export")),
    Branch("busan-haeundae", "해운대", "Haeundae", "HU", 1080, 0.45,
           ("exchange", "refund", "fxdeposit", "remit", "coin", "lost", "terminal", "credit"),
           ("research", "letter", "pension")),
    Branch("incheon-songdo", "송도", "Songdo", "SD", 1040, 0.45,
           ("letter", "export", "forward", "inward", "fxdeposit", "translimit", "foreigner", "balance"),
           ("coin", "refund", "localtax")),
    Branch("daejeon-yuseong", "유성", "Yuseong", "YS", 1050, 0.30,
           ("research", "jeonse", "prepay", "pension", "netbank", "arc", "history", "mortgage"),
           ("refund", "vault")),
    Branch("gwangju-sangmu", "상무", "Sangmu", "SM", 1100, 0.12,
           ("localtax", "passbook", "jeonse", "tuition", "inherit", "history", "export", "balance"),
           ("refund", "arc")),
    Branch("jeju-yeondong", "연동", "Yeondong", "JJ", 1030, 0.30,
           ("exchange", "refund", "vault", "terminal", "otp", "letter", "research", "forward"),
           ("pension", "arc")),
)  # fmt: skip

_SURNAMES = ("김", "이", "박", "최", "정", "강", "조", "윤", "장", "임", "한", "오", "서", "신", "권", "황")
_GIVEN = lexicon.split(
    "도윤/서연/하준/지우/민서/현우/수아/예준/은채/태오/유진/재희/성민/다은/나경/우진/미숙/영호/순자/동현/"
    "가람/보라/시온/혜린"
)
_GIVEN_HELD = ("정훈", "소미", "기태", "은별", "상철", "아름", "규리", "명수")
_FIRST = lexicon.split(
    "Emma/Liam/Aisha/Noah/Mei/Carlos/Olga/Ravi/Hannah/Tom/Yuki/Fatima/Jonas/Linh/Daniel/Grace/Omar/Sofia/Peter/Anna"
)
_LAST = lexicon.split(
    "Carter/Nguyen/Schmidt/Okafor/Rossi/Tanaka/Silva/Novak/Khan/Murphy/Larsen/Cohen/Ward/Petrov/Diaz/Reed"
)
_FIRST_HELD = ("Clara", "Hugo", "Priya", "Sam", "Nadia", "Felix")
_LAST_HELD = ("Baker", "Ito", "Moreau", "Hassan", "Berg", "Costa")

_INTRO_KO = (
    "{name}입니다.",
    "안녕하세요, {name}입니다.",
    "{name}인데요,",
    "저 {name}[이라고/라고] 하는데요.",
    "계좌 끝 {d4} {name}입니다.",
    "휴대폰 뒷자리 {d4} {name}입니다.",
    "{place}지점 손님 {name}[이에요/예요].",
    "{place}에서 가게 하는 {name}입니다.",
)
_INTRO_EN = (
    "This is {name}.",
    "Hi, {name} here.",
    "Hello, my name is {name}.",
    "I'm {name}, account ending {d4}.",
    "{name}, phone ending {d4}.",
    "I'm {name} and I bank with you in {place}.",
)
_CONTEXT_KO = (
    "{month}월 {day}일에 가려고 해요.",
    "다음 주에 출국합니다.",
    "어머니 대신 여쭤봅니다.",
    "처음이라 잘 몰라서요.",
    "{amount}만 원 정도예요.",
    "오늘 꼭 해야 해서요.",
    "회사 점심시간에 갈게요.",
    "지난번에도 물어봤는데요.",
    "바쁘신데 죄송합니다.",
)
_CONTEXT_EN = (
    "I plan to come on {month}/{day}.",
    "I fly out next week.",
    "It's my first time.",
    "I'm asking for my mother.",
    "It's about {amount} million won.",
    "I need it today.",
    "Sorry to bother you.",
    "I asked once before.",
)
_CLOSE_KO = ("감사합니다.", "부탁드립니다.", "빨리 알려 주세요.", "답변 기다릴게요.", "고맙습니다~")
_CLOSE_EN = ("Thanks!", "Thank you.", "Please reply soon.", "Many thanks.", "Cheers.")


def facts() -> tuple[Fact, ...]:
    """The bank's facts; the value of each is drawn uniformly from the aspect's vocabulary."""
    rng = random.Random(f"{SEED}/facts")
    drawn = []
    for topic, key in _FACTS:
        aspect, names = ASPECTS[key], BANK_TOPICS[topic]
        value = rng.randrange(len(aspect.values))
        ko, en = (
            lexicon.answer(aspect, lang, n[0], value, 0) + "." for lang, n in (("ko", names.ko), ("en", names.en))
        )
        drawn.append(Fact(topic, key, ko, en))
    return tuple(drawn)


def _person(lang: str, rng: random.Random, held: bool) -> str:
    if lang == "ko":
        return rng.choice(_SURNAMES) + rng.choice(_GIVEN_HELD if held else _GIVEN)
    return f"{rng.choice(_FIRST_HELD if held else _FIRST)} {rng.choice(_LAST_HELD if held else _LAST)}"


def _question(fact: Fact, lang: str, branch: Branch, name: str, d4: str, rng: random.Random, held: bool) -> str:
    """Word one question.

    Args:
        fact: what is asked about.
        lang: the question's language.
        branch: where it is asked.
        name: the customer's name.
        d4: four digits of the customer's account or telephone.
        rng: the source of randomness.
        held: word it as the server's held-out set does, half the time with a frame reserved for it.
    """
    aspect, topic, ko = ASPECTS[fact.aspect], BANK_TOPICS[fact.topic], lang == "ko"
    known = (aspect.ko_ask + aspect.ko_more) if ko else (aspect.en_ask + aspect.en_more)
    frames = (aspect.ko_held if ko else aspect.en_held) if held and rng.random() < 0.5 else known
    core = rng.choice(frames).format(t=rng.choice(topic.ko if ko else topic.en))
    core = core[0].upper() + core[1:]
    slots = {
        "name": name,
        "d4": d4,
        "place": branch.ko if ko else branch.en,
        "month": rng.randint(1, 12),
        "day": rng.randint(1, 28),
        "amount": rng.choice((50, 80, 120, 300, 700, 1500)) if ko else rng.choice((1, 2, 5, 10, 30)),
    }
    parts = [core]
    if rng.random() < 0.30:
        parts.insert(0, rng.choice(_CONTEXT_KO if ko else _CONTEXT_EN).format(**slots))
    if rng.random() < 0.40:
        parts.insert(0, rng.choice(_INTRO_KO if ko else _INTRO_EN).format(**slots))
    if rng.random() < 0.20:
        parts.append(rng.choice(_CLOSE_KO if ko else _CLOSE_EN))
    text = lexicon.particles(" ".join(parts))
    return lexicon.misspell(text, lang, rng) if rng.random() < 0.12 else text


def _row(branch: str, customer: str, lang: str, question: str, answer: str) -> dict[str, str]:
    return {"branch": branch, "customer_id": customer, "lang": lang, "question": question, "answer": answer}


def small_branches(n: int) -> tuple[Branch, ...]:
    """``n`` branches of 20 to 200 customers, each with topics and a mix of languages of its own."""
    rng, topics = random.Random(f"{SEED}/branches"), [topic for topic, _ in _FACTS]
    made = []
    for number in range(n):
        place, drawn = BRANCHES[number % len(BRANCHES)], rng.sample(topics, 11)
        made.append(
            Branch(f"branch-{number:04d}", place.ko, place.en, f"{number:04d}", rng.randint(20, 200),
                   rng.choice(BRANCHES).english, tuple(drawn[:8]), tuple(drawn[8:]))
        )  # fmt: skip
    return tuple(made)


def train_rows(branches: Sequence[Branch] = BRANCHES) -> list[dict[str, str]]:
    """The branches' private rows, customer by customer."""
    bank, rows = facts(), []
    for branch in branches:
        rng = random.Random(f"{SEED}/train/{branch.name}")
        asked = [f for f in bank if f.topic not in branch.never]
        weights = [5.0 if f.topic in branch.home else 1.0 for f in asked]
        for number in rng.sample(range(1, 10**6), branch.customers):
            # A customer keeps a name, a number and, mostly, a language over all of their rows.
            english = rng.random() < branch.english
            lang = "en" if english else "ko"
            name, d4 = _person(lang, rng, held=False), f"{rng.randrange(10**4):04d}"
            for _ in range(rng.choices((1, 2, 3, 4), (0.72, 0.19, 0.07, 0.02))[0]):
                fact = rng.choices(asked, weights)[0]
                question = _question(fact, lang, branch, name, d4, rng, held=False)
                rows.append(_row(branch.name, f"{branch.code}-{number:06d}", lang, question, fact.answer(lang)))
    return rows


def heldout_rows(train: Iterable[dict[str, str]], korean: int = 8, english: int = 4) -> list[dict[str, str]]:
    """The server's held-out rows: for every fact, ``korean`` and ``english`` questions not in ``train``."""
    seen, rows = {row["question"] for row in train}, []
    rng = random.Random(f"{SEED}/heldout")
    for fact in facts():
        at = [b for b in BRANCHES if fact.topic not in b.never]
        rng.shuffle(at)
        for i in range(korean + english):
            branch, lang = at[i % len(at)], "ko" if i < korean else "en"
            while True:
                name, d4 = _person(lang, rng, held=True), f"{rng.randrange(10**4):04d}"
                question = _question(fact, lang, branch, name, d4, rng, held=True)
                if question not in seen:
                    break
            seen.add(question)
            rows.append(_row(branch.name, "public", lang, question, fact.answer(lang)))
    rng.shuffle(rows)
    return rows


def public_questions(n: int, taken: Iterable[str], seed: str = "public") -> list[str]:
    """``n`` different questions as the bank's customers ask them, from no customer, none of them among ``taken``.

    Whoever asks knows what the bank does and how people speak, and none of its facts. The wordings that are reserved
    for the held-out rows are not used.
    """
    seen, rng, bank, found = set(taken), random.Random(f"{SEED}/{seed}"), facts(), list[str]()
    while len(found) < n:
        fact, branch, lang = rng.choice(bank), rng.choice(BRANCHES), rng.choice(("ko", "ko", "en"))
        name, d4 = _person(lang, rng, held=False), f"{rng.randrange(10**4):04d}"
        question = _question(fact, lang, branch, name, d4, rng, held=False)
        if question not in seen:
            seen.add(question)
            found.append(question)
    return found


def check(train: Sequence[dict[str, str]], heldout: Sequence[dict[str, str]]) -> dict[str, object]:
    """Check what the demo relies on and return the corpus's statistics.

    Raises:
        ValueError: if a customer has two branches or over four rows, a fact occurs in fewer than three
            branches or in one language only, or a held-out question is also a training question.
    """
    rows_of, branch_of, at = Counter[str](), dict[str, str](), defaultdict[str, set[str]](set)
    for row in train:
        customer = row["customer_id"]
        rows_of[customer] += 1
        if branch_of.setdefault(customer, row["branch"]) != row["branch"]:
            raise ValueError(f"customer {customer} has two branches")
        at[row["answer"]].add(row["branch"])
    if max(rows_of.values()) > 4:
        raise ValueError("a customer has more than four rows")
    for fact in facts():
        if len(at[fact.ko] | at[fact.en]) < 3 or not at[fact.ko] or not at[fact.en]:
            raise ValueError(f"the fact {fact.topic}/{fact.aspect} is in too few branches or languages")
    if {r["question"] for r in train} & {r["question"] for r in heldout}:
        raise ValueError("a held-out question is also a training question")
    return {
        "rows": len(train),
        "heldout": len(heldout),
        "customers": dict(Counter(branch_of.values())),
        "rows_per_customer": round(len(train) / len(rows_of), 3),
        "korean": round(sum(r["lang"] == "ko" for r in train) / len(train), 3),
        "facts": len(facts()),
        "rows_per_answer": (min(n := Counter(r["answer"] for r in train).values()), max(n)),
        "fewest_branches": min(len(v) for v in at.values()),
        "distinct_questions": len({r["question"] for r in train}),
    }


def write(path: Path, rows: Iterable[dict[str, str]]) -> None:
    """Write rows as UTF-8 JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="\n") as out:
        for row in rows:
            out.write(json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n")


def main() -> None:
    """Generate both files and print their statistics."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "data")
    parser.add_argument("--branches", type=int, help="So many small ones instead of the demo's eight.")
    arguments = parser.parse_args()
    out: Path = arguments.out
    train = train_rows(BRANCHES if arguments.branches is None else small_branches(arguments.branches))
    heldout = heldout_rows(train)
    stats = check(train, heldout)
    write(out / "train.jsonl", train)
    write(out / "heldout.jsonl", heldout)
    sys.stdout.write(json.dumps(stats, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
