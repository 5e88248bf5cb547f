"""A chat model's reply as text for people: its calculator calls and what they gave stand between « and »."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nanochat_model.chat import Piece


def marked(pieces: Iterable[Piece]) -> Iterator[str]:
    """The text of each piece as it comes, with marks between the kinds: «7 + 5 → 12» is a python call and its result."""
    shown = "text"
    for piece in pieces:
        if piece.kind != shown:
            mark = _between(shown, piece.kind)
            yield mark.rstrip() if piece.text[:1].isspace() else mark
            shown = piece.kind
        yield piece.text
    yield _between(shown, "text").rstrip()


def _between(old: str, new: str) -> str:
    """What stands where a reply goes from one kind of piece to another."""
    if old == "python" and new == "python_output":
        return " → "
    return ("" if old == "text" else "» ") + ("" if new == "text" else "«")
