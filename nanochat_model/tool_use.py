"""Python calls in a reply: what the model writes between <|python_start|> and <|python_end|> is computed, and the result is put
into its mouth between <|output_start|> and <|output_end|>, before it goes on. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from nanochat_model.calculator import calculate
from nanochat_model.tokenizer import Tokenizer


class PythonCalls:
    """The `tool` of a generation request: given all tokens of a reply so far, the ids to be said next (mostly none).

    A call that `compute` has no answer to is left alone: the model goes on by itself, as nanochat's engine lets it.
    """

    def __init__(self, tokenizer: Tokenizer, compute: Callable[[str], str | None] = calculate) -> None:
        self._tokenizer, self._compute = tokenizer, compute
        self._start, self._end = tokenizer.special_id("<|python_start|>"), tokenizer.special_id("<|python_end|>")
        self._output = tokenizer.special_id("<|output_start|>"), tokenizer.special_id("<|output_end|>")

    def __call__(self, made: Sequence[int]) -> list[int]:
        if made[-1] != self._end:
            return []
        call: list[int] = []
        for token in reversed(made[:-1]):
            if token == self._start:
                break
            if token == self._end:
                return []
            call.append(token)
        else:
            return []
        result = self._compute(self._tokenizer.decode(reversed(call)))
        return [] if result is None else [self._output[0], *self._tokenizer.encode(result), self._output[1]]


def reply_parts(ids: Sequence[int], tokenizer: Tokenizer) -> list[tuple[str, str]]:
    """A reply's ids as (kind, text): kinds as in conversations, "text", "python" and "python_output"; markers are left out."""
    kinds = {
        tokenizer.special_id("<|python_start|>"): "python",
        tokenizer.special_id("<|output_start|>"): "python_output",
        tokenizer.special_id("<|python_end|>"): "text",
        tokenizer.special_id("<|output_end|>"): "text",
    }
    parts: list[tuple[str, list[int]]] = [("text", [])]
    for token in ids:
        if token in kinds:
            parts.append((kinds[token], []))
        else:
            parts[-1][1].append(token)
    return [(kind, tokenizer.decode(part)) for kind, part in parts if part]
