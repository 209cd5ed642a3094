"""The embedded demo's public data: eight sites of an invented bank, and a small base model.

Everything in this folder is generated from public seeds: the corpus by :mod:`simulations.demo.corpus`,
the base model by :mod:`simulations.demo.pretrain`.
"""

from __future__ import annotations

from pathlib import Path

_HERE = Path(__file__).resolve().parent

BASE = _HERE / "base"
"""Hugging Face folder of the base model and its tokenizer."""

TRAIN = _HERE / "data" / "train.jsonl"
"""The branches' private rows, one JSON object a line."""

HELDOUT = _HERE / "data" / "heldout.jsonl"
"""The server's public held-out rows, in the same format."""
