"""Talking to a fine-tuned model: a conversation with its history, replies that stream, python calls that are worked out."""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nanochat_model.batching import Batcher, Request
from nanochat_model.checkpoint import load_model, tokenizer_dir
from nanochat_model.engine import generate
from nanochat_model.errors import ConfigError
from nanochat_model.sampling import Sampling
from nanochat_model.tokenizer import SPECIAL_TOKENS, Tokenizer
from nanochat_model.tool_use import PythonCalls

SAMPLE_PROMPTS = ("def ", "import ", "The ", "Once upon a time", "In the year 19", "class ")
SAMPLE_TOKENS = 24


@dataclass(frozen=True)
class Piece:
    """Some text of a reply. `kind`: "text", "python" (a call being written) or "python_output" (what came back)."""

    kind: str
    text: str


class Chat:
    """One conversation. `turns` holds the ids of each exchange as the model saw and made them; `clear` starts anew."""

    def __init__(self, model: Any, tokenizer: Tokenizer, *, system: str = "") -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.system = system  # put before the first user message, as in training
        self.turns: list[list[int]] = []
        special = tokenizer.special_id
        self._end = special("<|assistant_end|>")
        # Any of these means that the assistant is done; only the first is a proper end.
        self._stop = frozenset((self._end, tokenizer.bos_id, special("<|user_start|>")))
        self._kinds = {
            special("<|python_start|>"): "python", special("<|python_end|>"): "text",
            special("<|output_start|>"): "python_output", special("<|output_end|>"): "text",
        }  # fmt: skip

    @property
    def max_tokens(self) -> int:
        """Tokens of context: the length the model was trained on (it takes longer ones, at positions it has never seen)."""
        return int(self.model.config.sequence_len)

    def clear(self) -> None:
        self.turns = []

    def reply(self, text: str, *, temperature: float = 0.6, top_k: int = 50, max_tokens: int = 256, seed: int = 0) -> Iterator[str]:
        """The text of `reply_pieces`, python calls and their results left out."""
        pieces = self.reply_pieces(text, temperature=temperature, top_k=top_k, max_tokens=max_tokens, seed=seed)
        return (piece.text for piece in pieces if piece.kind == "text")

    def reply_pieces(
        self, text: str, *, temperature: float = 0.6, top_k: int = 50, max_tokens: int = 256, seed: int = 0
    ) -> Iterator[Piece]:
        """Answer `text` piece by piece, ending at <|assistant_end|> or after `max_tokens`; both sides join the history, also when
        the caller stops asking for more before the end.

        Temperature 0 takes the most likely token. No piece ends inside a character. When the history outgrows the context its
        oldest exchanges are left out. Raises ConfigError (when the iteration starts) if the message alone does not fit.
        """
        question = self._question(text)
        prompt = self._prompt(question)
        request = Request(
            prompt=prompt,
            max_tokens=min(max_tokens, self.max_tokens - len(prompt)),
            sampling=Sampling(temperature=temperature, top_k=top_k, seed=seed),
            stop_ids=self._stop,
            tool=PythonCalls(self.tokenizer),
        )
        answer: list[int] = []
        try:
            yield from self._decoded(self._tokens(request), answer)
        finally:
            self.turns.append([*question, *answer, self._end])

    def _tokens(self, request: Request) -> Iterator[int]:
        """The tokens of a reply, without the one that ends it."""
        batcher = Batcher(self.model, max_rows=1, max_tokens=self.max_tokens)
        batcher.submit(request)
        while batcher.busy:
            for event in batcher.step():
                if event.token is not None and event.token not in self._stop:
                    yield event.token

    def _decoded(self, tokens: Iterator[int], answer: list[int]) -> Iterator[Piece]:
        """Pieces of whole characters; each token is put into `answer` before its text is handed out."""
        kind, decoder = "text", codecs.getincrementaldecoder("utf8")(errors="replace")
        for token in tokens:
            answer.append(token)
            marker = token in self._kinds
            text = decoder.decode(b"" if marker else self.tokenizer.decode_bytes([token]), final=marker)
            if text:
                yield Piece(kind, text)
            kind = self._kinds.get(token, kind)
        rest = decoder.decode(b"", final=True)
        if rest:
            yield Piece(kind, rest)

    def _question(self, text: str) -> list[int]:
        """Ids of a user message and the marker after which the assistant speaks."""
        if self.system and not self.turns:
            text = f"{self.system}\n\n{text}"
        special = self.tokenizer.special_id
        return [
            special("<|user_start|>"),
            *self.tokenizer.encode(text),
            special("<|user_end|>"),
            special("<|assistant_start|>"),
        ]

    def _prompt(self, question: Sequence[int]) -> list[int]:
        """BOS, as many of the latest exchanges as fit beside a reply, and the question."""
        if 1 + len(question) >= self.max_tokens:
            raise ConfigError(
                f"the message has {len(question)} tokens, but the model's context holds {self.max_tokens}; shorten the message"
            )
        space = self.max_tokens - 1 - len(question) - min(64, self.max_tokens // 4)  # room for an answer
        kept: list[int] = []
        for turn in reversed(self.turns):
            if len(kept) + len(turn) > space:
                break
            kept = [*turn, *kept]
        return [self.tokenizer.bos_id, *kept, *question]


def load_chat(path: str, *, device: str = "cpu", dtype: torch.dtype | None = None, system: str = "") -> Chat:
    """A chat with the model of a checkpoint, run or checkpoints folder. Raises ConfigError when model or tokenizer is missing."""
    return Chat(load_model(path, device=device, dtype=dtype), Tokenizer.load(tokenizer_dir(path)), system=system)


def sample_texts(model: Any, tokenizer: Tokenizer, prompts: Sequence[str] = SAMPLE_PROMPTS) -> list[str]:
    """The most likely continuation of each prompt, prompt included: a look at what a base model has learned."""
    was_training = model.training
    model.eval()
    try:
        rows = [[tokenizer.bos_id, *tokenizer.encode(p)] for p in prompts]
        out: list[list[int]] = [[] for _ in rows]
        done = [False] * len(rows)
        specials = [tokenizer.special_id(t) for t in SPECIAL_TOKENS]
        for ids in generate(model, rows, max_tokens=SAMPLE_TOKENS, temperature=0.0, top_k=0, seed=0, stop_ids=specials):
            for i, token in enumerate(ids):
                done[i] = done[i] or token in specials
                if not done[i]:
                    out[i].append(token)
    finally:
        model.train(was_training)
    return [tokenizer.decode([*row[1:], *more]) for row, more in zip(rows, out, strict=True)]
