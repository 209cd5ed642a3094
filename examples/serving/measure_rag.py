"""Measure what rag.py finds for the demo's Korean held-out questions, with the demo's model being served.

FEDLLM_URL=... FEDLLM_CA=... FEDLLM_TOKEN=... python examples/serving/measure_rag.py

Prints a table: how often the right passage comes first, and among three, if one searches by the question, by the
model's answer, or by both; and how often the answer itself is right, without and with the passages to read.
"""

import json
import os
import re
import ssl
from pathlib import Path

from openai import DefaultHttpxClient
from rag import Index, Office, Passage, pairs, passages

HERE = Path(__file__).parent
HELDOUT = HERE.parents[1] / "simulations" / "demo" / "data" / "heldout.jsonl"
# What an answer states. The passage that states the same about the topic, the answer's first word, is the right one.
VALUE = re.compile(r"[\d,]+(?:만 원|억 원|원|영업일|번 창구)|내선 \d+번|서식 \d+호|오[전후] \d+시(?: \d+분)?|'\w+'")


def right(answer: str, known: list[Passage]) -> Passage:
    """Return the passage that holds the fact of a right answer."""
    topic, value = set(pairs(answer.split(maxsplit=1)[0])), VALUE.findall(answer)[-1]
    return max((passage for passage in known if value in passage.text), key=lambda p: len(topic & set(pairs(p.text))))


def main() -> None:
    """Ask and search, question by question."""
    rows = [json.loads(line) for line in HELDOUT.read_text("utf-8").splitlines()]
    rows = [row for row in rows if row["lang"] == "ko"]
    known = passages(HERE / "documents")
    index = Index(known)
    counts: dict[str, list[int]] = {}
    trusted = ssl.create_default_context(cafile=os.environ["FEDLLM_CA"])
    with DefaultHttpxClient(verify=trusted) as line:
        office = Office(line)
        for row in rows:
            question, answer = row["question"], office.ask(row["question"])
            wanted, texts = right(row["answer"], known), {"question": question, "answer": answer}
            texts["both"] = f"{question} {answer}"
            for name, text in texts.items():
                found = index.search(text)
                counts.setdefault(f"by {name}: first", []).append(found[:1] == [wanted])
                counts.setdefault(f"by {name}: among three", []).append(wanted in found)
            read = "\n".join(passage.text for passage in found)
            counts.setdefault("answer right", []).append(answer == row["answer"])
            counts.setdefault("answer right, with --read", []).append(
                office.ask(f"{read}\n{question}") == row["answer"]
            )
            if answer != row["answer"]:
                counts.setdefault("by both: among three, of wrong answers", []).append(wanted in found)
    for name, hits in counts.items():
        print(f"{name:40} {100 * sum(hits) / len(hits):5.1f} % of {len(hits)}")


if __name__ == "__main__":
    main()
