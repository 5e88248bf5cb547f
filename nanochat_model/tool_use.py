"""Python calls in a reply: what the model writes between <|python_start|> and <|python_end|> is computed, and the result is put
into its mouth between <|output_start|> and <|output_end|>, before it goes on. One state machine a row; no torch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from nanochat_model.calculator import calculate
from nanochat_model.tokenizer import Tokenizer

Tool = Callable[[str], str | None]


class ToolUse:
    """Follows one row's reply. `choose` is asked for every token; `forced` says whether the last one came from the tool."""

    def __init__(self, tokenizer: Tokenizer, tool: Tool = calculate) -> None:
        self._tokenizer, self._tool = tokenizer, tool
        self._start, self._end = tokenizer.special_id("<|python_start|>"), tokenizer.special_id("<|python_end|>")
        self._output = [tokenizer.special_id("<|output_start|>")], [tokenizer.special_id("<|output_end|>")]
        self._call: list[int] | None = None  # ids since <|python_start|>
        self._waiting: deque[int] = deque()
        self.forced = False
        self.calls: list[tuple[str, str | None]] = []  # expression and result, None where the tool had none

    def choose(self, sampled: int) -> int:
        """The next token of the row: the one the tool put in line, else `sampled`."""
        self.forced = bool(self._waiting)
        token = self._waiting.popleft() if self._waiting else sampled
        if self.forced:
            return token
        if token == self._start:
            self._call = []
        elif token == self._end and self._call is not None:
            self._answer(self._tokenizer.decode(self._call))
            self._call = None
        elif self._call is not None:
            self._call.append(token)
        return token

    def _answer(self, expression: str) -> None:
        result = self._tool(expression)
        self.calls.append((expression, result))
        if result is not None:  # without one the model goes on by itself, as nanochat's engine lets it
            start, end = self._output
            self._waiting.extend([*start, *self._tokenizer.encode(result), *end])
