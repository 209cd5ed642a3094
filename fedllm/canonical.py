"""One form for what means the same: cells that identify somebody or something, and JSON that is signed."""

import hashlib
import json
import re
import unicodedata
from decimal import Decimal
from typing import Any

# Invisible without being control or format characters: joiners, fillers and selectors (Default_Ignorable_Code_Point of
# Unicode's DerivedCoreProperties, as far as its categories do not say so already), and the empty Braille cell.
_INVISIBLE = {
    0x034F, 0x115F, 0x1160, 0x17B4, 0x17B5, *range(0x180B, 0x1810), 0x2800, 0x3164, *range(0xFE00, 0xFE10), 0xFFA0,
    *range(0xE0100, 0xE01F0),
}  # fmt: skip
# A number with a point or an exponent: what programs make of whole numbers in a column with a gap.
_FLOAT = re.compile(r"[-+]?[0-9]{1,40}(\.[0-9]{0,40}([eE]\+?[0-9]{1,2})?|[eE]\+?[0-9]{1,2})")


def canonical(value: object) -> str:
    """Return the one spelling of a cell that identifies: a person, a site, a label, a column, a part of a record.

    NFC; white space trimmed, and a single space within; no invisible characters; a float that is a whole number, also
    one that is written out as text, as that number. Applied to its own result it changes nothing.
    """
    text = str(value)
    if not text.isprintable() or not text.isascii():
        text = text.translate(_SHOWN)
        text = unicodedata.normalize("NFC", text)
    text = " ".join(text.split())
    if _FLOAT.fullmatch(text):
        number = Decimal(text)
        if number == number.to_integral_value():
            return str(int(number))
    return text


class _Shown(dict[int, int | None]):
    """What becomes of a character, found out when it is first met: itself, or nothing if it is invisible."""

    def __missing__(self, code: int) -> int | None:
        sign = chr(code)
        gone = code in _INVISIBLE or (unicodedata.category(sign) in ("Cc", "Cf") and not sign.isspace())
        return self.setdefault(code, None if gone else code)


_SHOWN = _Shown()


def read_json(data: bytes | str) -> Any:
    """Read JSON that says one thing to every reader; raises ValueError if a key is given twice."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            raise ValueError(f"{next(key for key in keys if keys.count(key) > 1)!r:.100} is given twice")
        return found

    return json.loads(data, object_pairs_hook=once)


def canonical_json(content: object) -> bytes:
    """Return the one form in which JSON is signed: keys sorted, no spaces, UTF-8.

    Raises ValueError on what has none: a number that is not finite, or text that is not valid Unicode.
    """
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode()


def digest_of(content: object) -> str:
    """Return the SHA-256, in hex, of the canonical JSON of `content`."""
    return hashlib.sha256(canonical_json(content)).hexdigest()
