"""Cryptography of the federation: identities, signatures, certificates, and the primitives under them."""
