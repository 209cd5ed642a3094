"""Attack: a site signs an entry that two readers read differently: a key given twice, or another spelling of a number.

Stopped by `fedllm.crypto.hash_chain.open_entry` and `open_statement` of `fedllm.protocol.spending_statement`: only the
canonical form is read.
"""

import json

import pytest

from fedllm.crypto.hash_chain import ENTRY_TYPE, START, make_entry, open_entry
from fedllm.crypto.identity import Identity
from fedllm.crypto.signed_documents import open_envelope, sign_envelope
from fedllm.errors import CryptoError
from fedllm.protocol.spending_statement import STATEMENT_TYPE, Statement, open_statement, sign_statement

SIGNER = Identity.generate()
BODY = {"epsilon": 4.5, "steps": 1, "run": "서울"}
ENTRY = make_entry(0, START, "budget", 60.0, BODY, SIGNER)
STATEMENT = sign_statement(Statement("s", "r", "p", 1, 4.5, 5.0, 1e-5, 3, "d", "u"), SIGNER)
CHANGES = {
    "a key twice": (b'"epsilon":4.5', b'"epsilon":1.0,"epsilon":4.5'),
    "a space": (b'"epsilon":4.5', b'"epsilon": 4.5'),
    "another spelling": (b"4.5", b"4.50"),
    "an exponent": (b"4.5", b"45e-1"),
    "a number that is none": (b"4.5", b"NaN"),
    "an escape": (b'"epsilon"', b'"\\u0065psilon"'),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", [ENTRY_TYPE, STATEMENT_TYPE])
def test_what_can_be_read_in_two_ways_is_not_read(change: str, kind: str) -> None:
    line, read = (ENTRY, open_entry) if kind == ENTRY_TYPE else (STATEMENT, open_statement)
    read(line)
    payload, _ = open_envelope(line, kind)
    before, after = CHANGES[change]
    assert before in payload
    with pytest.raises(CryptoError, match="unknown form"):
        read(sign_envelope(payload.replace(before, after), kind, SIGNER))


def test_keys_in_another_order_are_not_read() -> None:
    payload, _ = open_envelope(ENTRY, ENTRY_TYPE)
    turned = json.dumps(dict(reversed(json.loads(payload).items())), separators=(",", ":"), ensure_ascii=False)
    with pytest.raises(CryptoError, match="unknown form"):
        open_entry(sign_envelope(turned.encode(), ENTRY_TYPE, SIGNER))
