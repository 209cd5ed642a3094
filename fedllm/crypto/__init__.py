"""Cryptography: `identity` signs and seals, `certificates` are for TLS, `signed_documents` are JSON and DSSE envelopes.

`hash_chain` makes ledgers and run logs of these. `primitives` and `shamir` are what secure aggregation is made of.
"""
