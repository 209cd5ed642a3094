"""Answer a question with a served model, and show the passages of the office's documents beside it, with their source.

pip install openai bm25s
FEDLLM_URL=https://127.0.0.1:8443/v1 FEDLLM_CA=ca.pem FEDLLM_TOKEN=... \
    python examples/serving/rag.py examples/serving/documents "오티피 기계 교체 수수료가 얼마예요?"

Documents, index and search stay in this process; the served model is all that it speaks to. The search takes the
model's answer along: the model has learnt which words of the bank a customer's words mean, and a wrong answer has them,
too (hypothetical document embeddings, Gao et al. 2022, https://arxiv.org/abs/2212.10496, with BM25 for embeddings).
With --read the model then answers once more, from the passages: for models that were taught to read.
"""

import argparse
import os
import re
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import bm25s
from openai import DefaultHttpxClient, OpenAI


@dataclass(frozen=True)
class Passage:
    """A paragraph of a document."""

    source: str  # file, and which of its paragraphs
    text: str


def passages(folder: Path) -> list[Passage]:
    """Return the paragraphs of the .md and .txt files in a folder, without headings."""
    files = sorted(path for path in folder.rglob("*") if path.suffix in (".md", ".txt"))
    return [
        Passage(f"{path.relative_to(folder)}, paragraph {number}", text.strip())
        for path in files
        for number, text in enumerate(re.split(r"\n\s*\n", path.read_text("utf-8")))
        if text.strip() and not text.startswith("#")
    ]


def pairs(text: str) -> list[str]:
    """Return every two neighbouring letters of every word: Korean particles and endings then need no dictionary."""
    return re.findall(r"(?=(\w\w))", text.lower())


class Index:
    """Passages, to be found by the pairs of letters that a text shares with them (BM25)."""

    def __init__(self, found: Sequence[Passage]) -> None:
        self.passages = found
        self._bm25 = bm25s.BM25()
        self._bm25.index([pairs(passage.text) for passage in found], show_progress=False)

    def search(self, text: str, most: int = 3) -> list[Passage]:
        """Return the passages that fit a text best, the best first; none if they share nothing."""
        scores = self._bm25.get_scores([pair for pair in pairs(text) if pair in self._bm25.vocab_dict])
        best = sorted(range(len(self.passages)), key=lambda number: -scores[number])[:most]
        return [self.passages[number] for number in best if scores[number] > 0]


class Office:
    """The model that an office serves."""

    def __init__(self, line: DefaultHttpxClient) -> None:
        self._client = OpenAI(base_url=os.environ["FEDLLM_URL"], api_key=os.environ["FEDLLM_TOKEN"], http_client=line)
        self._model = self._client.models.list().data[0].id  # a server has one

    def ask(self, question: str) -> str:
        """Return the model's likeliest answer."""
        done = self._client.chat.completions.create(
            model=self._model, messages=[{"role": "user", "content": question}], max_tokens=60, temperature=0
        )
        return (done.choices[0].message.content or "").strip()


def main() -> None:
    """Answer one question."""
    parser = argparse.ArgumentParser(description="a served model's answer, beside the office's own documents")
    parser.add_argument("documents", type=Path, help="folder of .md and .txt files")
    parser.add_argument("question")
    parser.add_argument("--read", action="store_true", help="let the model answer again, from the passages")
    arguments = parser.parse_args()
    index = Index(passages(arguments.documents))
    trusted = ssl.create_default_context(cafile=os.environ["FEDLLM_CA"])
    with DefaultHttpxClient(verify=trusted) as line:
        office = Office(line)
        answer = office.ask(arguments.question)
        found = index.search(f"{arguments.question} {answer}")
        print("model:", answer)
        if arguments.read:
            read = "\n".join(passage.text for passage in found)
            print("model, from the passages:", office.ask(f"{read}\n{arguments.question}"))
    for number, passage in enumerate(found, start=1):
        print(f"[{number}] {passage.text}\n    {passage.source}")


if __name__ == "__main__":
    main()
