"""The tokenizer's split rule for text: fast where it can be, and exactly the rule of `tokenizers` where it matters.

Python's own `re` is several times faster than the engine inside `tokenizers` but knows no \\p{L}. So the rule is spelled out for
ASCII, and other text is split through a stand-in of the same length in which every character is replaced by an ASCII one of its
class. Characters whose class is not beyond doubt (assigned after Unicode 3.2, or reclassified since, or equal to an ASCII letter
when case is ignored) have no stand-in; text that holds them is left to `tokenizers`, so ids never depend on which version of
Unicode this Python knows.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Iterator

# The split rule of GPT-4 (public in OpenAI's tiktoken) with numbers in groups of at most 2 digits (nanochat tokenizer.py).
SPLIT_PATTERN = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
# \s is spelled out as well, since Python counts four control characters to it that Unicode does not.
_ASCII_SPLIT = re.compile(
    r"'(?:[sdmtSDMT]|[lL][lL]|[vV][eE]|[rR][eE])|[^\r\nA-Za-z0-9]?+[A-Za-z]+|[0-9]{1,2}| ?[^\t-\r A-Za-z0-9]++[\r\n]*"
    r"|[\t-\r ]*[\r\n]|[\t-\r ]+(?![^\t-\r ])|[\t-\r ]+"
)
# No word of the rule reaches over a newline that is followed by a visible character, and none looks past it: a text may be cut
# there and its pieces split on their own.
_SAFE_CUT = re.compile(r"(?<=\n)(?=[!-~])")
_WIDE_SPACES = frozenset("\x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B))))
_LETTER, _NUMBER, _SPACE, _OTHER = "A", "0", "\t", "#"


class _StandIns(dict[int, int]):
    """Code point -> code point of its ASCII stand-in, or of itself when it has none; filled as characters are met."""

    def __missing__(self, code: int) -> int:
        self[code] = ord(stand_in(chr(code)) or chr(code))
        return self[code]


def stand_in(character: str) -> str | None:
    """An ASCII character of the same class (letter, number, space or other) for the split rule; None where that is in doubt."""
    if character.isascii():
        return character
    old, new = unicodedata.ucd_3_2_0.category(character), unicodedata.category(character)
    if character in _WIDE_SPACES:
        return _SPACE
    if "Cn" in (old, new) or old[0] != new[0] or any(c.isascii() for c in character.casefold()) or new[0] == "Z":
        return None
    return {"L": _LETTER, "N": _NUMBER}.get(new[0], _OTHER)


_STAND_INS = _StandIns()


def split_words(text: str) -> Iterator[tuple[list[str], bool]]:
    """Pieces of `text` in order as (words, True), or as ([piece], False) where a piece must be split by `tokenizers`."""
    if text.isascii():
        yield _ASCII_SPLIT.findall(text), True
        return
    for is_ascii, group in itertools.groupby(_SAFE_CUT.split(text), key=str.isascii):
        piece = "".join(group)
        if is_ascii:
            yield _ASCII_SPLIT.findall(piece), True
            continue
        shape = piece.translate(_STAND_INS)
        if shape.isascii():
            ends = list(itertools.accumulate(map(len, _ASCII_SPLIT.findall(shape))))
            yield [piece[a:b] for a, b in itertools.pairwise([0, *ends])], True
        else:
            yield [piece], False
