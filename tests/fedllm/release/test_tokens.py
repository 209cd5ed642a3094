"""Bearer tokens: shown once, kept as digests, refused as soon as they are revoked."""

from pathlib import Path

import pytest

from fedllm.errors import ConfigError, CryptoError, FolderError
from fedllm.release.tokens import Gatekeeper, add_token, read_tokens, revoke_token


def test_a_token_lets_its_name_in_and_stands_nowhere_on_disk(tmp_path: Path) -> None:
    file = tmp_path / "place" / "tokens.json"
    token, other = add_token(file, "desk-1"), add_token(file, "desk-2")
    door = Gatekeeper(file)
    assert (door.name_of(token), door.name_of(other)) == ("desk-1", "desk-2")
    assert [door.name_of(wrong) for wrong in ("", "x", token[:-1], token + "A", token.upper())] == [None] * 5
    assert file.stat().st_mode & 0o777 == 0o600
    for path in file.parent.iterdir():
        content = path.read_text()
        assert token not in content
        assert token.removeprefix("fedllm-") not in content
    assert len(token) >= 43  # 256 bits


def test_a_token_that_was_revoked_is_refused_at_once_by_a_gatekeeper_that_knows_it(tmp_path: Path) -> None:
    file = tmp_path / "tokens.json"
    token, door = add_token(file, "desk"), Gatekeeper(file)
    assert door.name_of(token) == "desk"
    revoke_token(file, "desk")
    assert door.name_of(token) is None
    new = add_token(file, "desk")
    assert door.name_of(token) is None
    assert door.name_of(new) == "desk"
    assert set(read_tokens(file)) == {"desk"}


def test_no_name_has_two_tokens_and_nobody_unknown_is_revoked(tmp_path: Path) -> None:
    file = tmp_path / "tokens.json"
    add_token(file, "desk")
    with pytest.raises(ConfigError, match="desk has a token already"):
        add_token(file, "desk")
    with pytest.raises(ConfigError, match="Tokens have: desk"):
        revoke_token(file, "window")


@pytest.mark.parametrize("name", ["", " ", "a b", "a\nb", "x" * 65, "-", "이름", "a/b"])
def test_a_name_that_would_not_be_one_word_of_the_log_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="name="):
        add_token(tmp_path / "tokens.json", name)


def test_a_file_that_others_can_read_or_that_is_damaged_lets_nobody_in(tmp_path: Path) -> None:
    file = tmp_path / "tokens.json"
    token, door = add_token(file, "desk"), Gatekeeper(file)
    assert door.name_of(token) == "desk"
    content = file.read_bytes()
    file.unlink()
    file.write_bytes(content)
    file.chmod(0o644)
    for _ in range(2):  # it does not fall back to what it knew
        with pytest.raises(FolderError, match="mode 644"):
            door.name_of(token)
    file.unlink()
    file.touch(0o600)
    file.write_bytes(b"{}")
    for _ in range(2):
        with pytest.raises(CryptoError, match="no file of tokens"):
            door.name_of(token)
    file.unlink()
    assert door.name_of(token) is None
