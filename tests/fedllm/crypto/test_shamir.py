"""Any threshold of shares gives the secret; one share fewer fits every secret."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedllm.crypto import shamir
from fedllm.crypto.primitives import AgreementKey
from fedllm.errors import CryptoError
from tests.fedllm.secagg.secagg_federation import seeded

secrets = st.integers(0, shamir.PRIME - 1)


def naive(points: dict[int, int], at: int) -> int:
    """Lagrange's formula as it stands in a textbook."""
    value = 0
    for x, y in points.items():
        term = y
        for other in points:
            if other != x:
                term = term * (at - other) * pow(x - other, shamir.PRIME - 2, shamir.PRIME) % shamir.PRIME
        value += term
    return value % shamir.PRIME


def test_the_field_is_prime() -> None:  # Miller-Rabin; a composite passes with probability below 4^-40
    odd, twos = shamir.PRIME - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for base in range(2, 42):
        value = pow(base, odd, shamir.PRIME)
        chain = [value := pow(value, 2, shamir.PRIME) if step else value for step in range(twos)]
        assert chain[0] == 1 or shamir.PRIME - 1 in chain


@given(secrets, st.integers(1, 7), st.data())
def test_any_threshold_of_shares_gives_the_secret(secret: int, threshold: int, data: st.DataObject) -> None:
    holders = data.draw(st.integers(threshold, 9))
    shares = shamir.split(secret, threshold, holders)
    chosen = tuple(data.draw(st.permutations(range(1, holders + 1)))[:threshold])
    values = [shares[x - 1] for x in chosen]
    assert shamir.combine(shamir.weights(chosen), values) == secret
    assert naive(dict(zip(chosen, values, strict=True)), 0) == secret


@given(secrets, secrets)
def test_fewer_shares_fit_every_secret_equally_well(secret: int, other: int) -> None:
    shares = shamir.split(secret, 3, 4)
    for pair in itertools.combinations(range(1, 5), 2):
        imagined = {0: other, **{x: shares[x - 1] for x in pair}}  # a polynomial of the same degree with f(0) = other
        rest = [x for x in range(1, 5) if x not in pair]
        full = {**imagined, **{x: naive(imagined, x) for x in rest}}
        assert naive({x: full[x] for x in (1, 2, 3)}, 0) == other


def test_a_wrong_share_gives_another_secret() -> None:
    shares = shamir.split(5, 3, 5)
    assert shamir.combine(shamir.weights((1, 2, 3)), [shares[0], shares[1], shares[2] ^ 1]) != 5


def test_every_mask_key_can_be_shared() -> None:
    for private in (bytes(32), b"\xff" * 32, bytes(range(32))):
        key = AgreementKey(private)
        assert 2**254 <= key.scalar < 2**255 < shamir.PRIME
        assert AgreementKey.from_scalar(key.scalar).public == key.public
        assert AgreementKey.from_scalar(key.scalar).scalar == key.scalar
        for other in (key.scalar + 4, key.scalar + 2**255, key.scalar - 2**254, shamir.PRIME - 1):
            with pytest.raises(CryptoError, match="no private X25519 key"):
                AgreementKey.from_scalar(other)


def test_coefficients_come_from_the_one_source_of_secrets() -> None:
    with seeded("shamir"):
        first = shamir.split(123456789, 3, 5)
    with seeded("shamir"):
        coefficients = [123456789, shamir.random_number(), shamir.random_number()]
    expected = [sum(c * x**k for k, c in enumerate(coefficients)) % shamir.PRIME for x in range(1, 6)]
    assert first == expected
    assert shamir.split(123456789, 3, 5) != first


@pytest.mark.parametrize(("secret", "threshold", "holders"), [(-1, 2, 3), (shamir.PRIME, 2, 3), (1, 0, 3), (1, 4, 3)])
def test_what_cannot_be_split_is_refused(secret: int, threshold: int, holders: int) -> None:
    with pytest.raises(ValueError, match="cannot split"):
        shamir.split(secret, threshold, holders)


def test_a_holder_counts_once() -> None:
    with pytest.raises(ValueError, match="twice"):
        shamir.weights((1, 2, 2))


def test_128_holders_work() -> None:
    shares = shamir.split(7, 86, 128)
    points = tuple(range(43, 129))
    assert shamir.combine(shamir.weights(points), shares[42:]) == 7
