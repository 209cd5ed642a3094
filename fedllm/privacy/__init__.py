"""Mechanism, accounting and ledger: what is released, what it costs, and who wrote the cost down."""
