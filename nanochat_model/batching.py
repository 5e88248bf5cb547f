"""Continuous batching: requests join and leave a running batch between two steps, each with its own settings and seed.

The cache is allocated once: `max_rows` rows of `max_tokens` positions. Running requests fill its first rows without a gap (when
one leaves, the last takes its place), so a step reads a plain slice. A prompt is read in pieces into a spare row, between
steps, so that a long one holds nobody up for longer than one piece; then it joins. What a request says does not depend on
who shares the batch: the same tokens as `engine.generate` with this prompt alone, up to rounding of the logits.

Not thread-safe: one thread calls everything.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from nanochat_model.engine import KVCache, check_prompts
from nanochat_model.errors import ConfigError
from nanochat_model.sampling import Sampling, choose

if TYPE_CHECKING:
    from nanochat_model.gpt import GPT

FinishReason = Literal["stop", "length", "cancelled"]
Tool = Callable[[list[int]], Sequence[int]]
PREFILL_TOKENS = 256  # prompt tokens read between two steps: what a new prompt may hold the others up


@dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt to continue. `tool` sees all tokens made so far after each of them and may return ids to say next, unsampled
    (a calculator's result); they count as made."""

    prompt: Sequence[int]
    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop_ids: frozenset[int] = frozenset()
    tool: Tool | None = None


@dataclass(frozen=True)
class Event:
    """A token of one request; `token` is None where it ended without one (cancelled). The last has a finish reason."""

    request_id: int
    token: int | None
    finish: FinishReason | None = None


class _Sequence:
    """A request on its way: `length` tokens of it are in the cache."""

    def __init__(self, request_id: int, request: Request) -> None:
        self.id = request_id
        self.request = request
        self.length = 0
        self.made: list[int] = []
        self.forced: deque[int] = deque()  # what a tool wants said
        self.draws = request.sampling.draws()

    def accept(self, sampled: int) -> Event:
        """Take the next token (a forced one goes first)."""
        token = self.forced.popleft() if self.forced else sampled
        self.made.append(token)
        finish: FinishReason | None = None
        if token in self.request.stop_ids:
            finish = "stop"
        elif len(self.made) == self.request.max_tokens:
            finish = "length"
        elif self.request.tool is not None and not self.forced:
            self.forced.extend(self.request.tool(self.made))
        return Event(self.id, token, finish)


class Batcher:
    """Runs requests together. `submit`, then call `step` while `busy`; each call yields at most one token a request."""

    def __init__(self, model: GPT, *, max_rows: int = 8, max_tokens: int = 0, prefill_tokens: int = PREFILL_TOKENS) -> None:
        """`max_rows` requests run at once, more wait in order; `max_tokens` of prompt and reply together (0: the length that the
        model was trained on)."""
        max_tokens = max_tokens or model.config.sequence_len
        if max_rows < 1 or prefill_tokens < 1:
            raise ConfigError(f"max_rows {max_rows} and prefill_tokens {prefill_tokens} must be at least 1")
        if not 2 <= max_tokens <= model.max_tokens:
            raise ConfigError(f"max_tokens {max_tokens} must lie in 2..{model.max_tokens}, the positions that the model can read")
        self.model = model
        self.max_rows, self.max_tokens, self.prefill_tokens = max_rows, max_tokens, prefill_tokens
        self._device = model.lm_head.weight.device
        with torch.inference_mode():  # the last row is where prompts are read
            self._cache = KVCache(model.config, max_rows + 1, max_tokens, dtype=model.compute_dtype, device=self._device)
        self._running: list[_Sequence] = []  # row i of the cache belongs to the i-th
        self._staged: _Sequence | None = None  # its prompt is being read
        self._waiting: deque[_Sequence] = deque()
        self._cancelled: set[int] = set()
        self._next_id = 0

    @property
    def num_running(self) -> int:
        return len(self._running) + (self._staged is not None)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def busy(self) -> bool:
        return bool(self._running or self._staged or self._waiting)

    def submit(self, request: Request) -> int:
        """Queue a request; returns the id that its events carry. Raises ConfigError for a prompt that is empty, not of the
        vocabulary, or too long together with max_tokens."""
        if request.max_tokens < 1:
            raise ConfigError(f"max_tokens {request.max_tokens} must be at least 1")
        check_prompts(self.model, [request.prompt], 0)
        if len(request.prompt) + request.max_tokens > self.max_tokens:
            raise ConfigError(
                f"prompt of {len(request.prompt)} and max_tokens {request.max_tokens} exceed the row of {self.max_tokens}; "
                "shorten one of them"
            )
        self._next_id += 1
        self._waiting.append(_Sequence(self._next_id, request))
        return self._next_id

    def cancel(self, request_id: int) -> None:
        """End a request at the next step, wherever it is. One that has ended already, or never was, is left alone."""
        alive = [*self._running, *self._waiting, *([self._staged] if self._staged else [])]
        self._cancelled |= {s.id for s in alive if s.id == request_id}

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """One token for every running request, then prompts for free rows; what came out."""
        events = self._drop_cancelled()
        if self._running:
            events += self._decode()
        return events + self._admit()

    def _drop_cancelled(self) -> list[Event]:
        gone, self._cancelled = self._cancelled, set()
        if not gone:
            return []
        self._waiting = deque(s for s in self._waiting if s.id not in gone)
        if self._staged and self._staged.id in gone:
            self._staged = None
        for row in reversed(range(len(self._running))):
            if self._running[row].id in gone:
                self._remove(row)
        return [Event(i, None, "cancelled") for i in sorted(gone)]

    def _decode(self) -> list[Event]:
        """The next token of every running request."""
        rows = self._running
        part = self._cache.rows(0, len(rows), max(s.length for s in rows))
        part.lengths = torch.tensor([s.length for s in rows], device=self._device)
        logits = self.model.next_logits(torch.tensor([[s.made[-1]] for s in rows], device=self._device), part)
        self._cache.last[: len(rows)] = part.last
        for sequence in rows:
            sequence.length += 1
        events = self._choose(logits, rows)
        for row in reversed(range(len(rows))):
            if events[row].finish:
                self._remove(row)
        return events

    def _admit(self) -> list[Event]:
        """Read prompts, at most `prefill_tokens` of them, for requests that have a row; those read whole join."""
        events: list[Event] = []
        budget = self.prefill_tokens
        while budget > 0:
            if self._staged is None:
                if not self._waiting or len(self._running) == self.max_rows:
                    break
                self._staged = self._waiting.popleft()
            sequence = self._staged
            piece = sequence.request.prompt[sequence.length : sequence.length + budget]
            budget -= len(piece)
            logits = self._read(sequence, piece)
            if sequence.length == len(sequence.request.prompt):
                self._staged = None
                events += self._choose(logits, [sequence])
                if not events[-1].finish:
                    self._move(self.max_rows, len(self._running), sequence.length)
                    self._running.append(sequence)
        return events

    def _read(self, sequence: _Sequence, piece: Sequence[int]) -> Tensor:
        """Logits (1, V) after one more piece of a prompt, in the spare row."""
        part = self._cache.rows(self.max_rows, self.max_rows + 1, sequence.length)
        part.lengths = torch.tensor([sequence.length], device=self._device)
        if sequence.length == 0:
            part.last = torch.zeros_like(part.last)
        logits = self.model.next_logits(torch.tensor([list(piece)], device=self._device), part)
        self._cache.last[self.max_rows :] = part.last
        sequence.length += len(piece)
        return logits

    def _choose(self, logits: Tensor, rows: Sequence[_Sequence]) -> list[Event]:
        """A forced token takes no number from its request's stream, so that a tool does not change what is sampled after it."""
        uniforms = [0.0 if s.forced else s.draws.random() for s in rows]
        tokens = choose(logits, [s.request.sampling for s in rows], uniforms).tolist()
        return [s.accept(t) for s, t in zip(rows, tokens, strict=True)]

    def _remove(self, row: int) -> None:
        """Free a row; the last running request moves into it."""
        moved = self._running.pop()
        if row < len(self._running):
            self._running[row] = moved
            self._move(len(self._running), row, moved.length)

    def _move(self, source: int, target: int, length: int) -> None:
        for kept in (self._cache.keys, self._cache.values):
            kept[:, target, :length] = kept[:, source, :length]
        self._cache.last[target] = self._cache.last[source]


def run_requests(model: GPT, requests: Iterable[Request], *, max_rows: int = 8, max_tokens: int = 0) -> list[list[int]]:
    """The tokens of each request (a stop id included), `max_rows` at a time: for evaluation."""
    batcher = Batcher(model, max_rows=max_rows, max_tokens=max_tokens)
    made: dict[int, list[int]] = {batcher.submit(request): [] for request in requests}
    while batcher.busy:
        for event in batcher.step():
            if event.token is not None:
                made[event.request_id].append(event.token)
    return list(made.values())
