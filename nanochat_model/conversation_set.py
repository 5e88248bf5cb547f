"""Rendered conversations, in memory or mapped from files, and padded best-fit batches of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nanochat_model import packing as packers
from nanochat_model.conversations import Conversation, render_conversation
from nanochat_model.errors import ConfigError
from nanochat_model.identity import content_hash
from nanochat_model.loader import rank_rows
from nanochat_model.tokenizer import Tokenizer

IGNORED = -1  # target that no loss is taken of


class ConversationSet:
    """Rendered conversations, one after another: `ids` (tokens,) and whether each is learned, `mask` (tokens,).

    `order` (n,) lists those of one pass over the set, some of them several times. `hash` names all of it and the tokenizer.
    """

    def __init__(
        self, *, ids: np.ndarray, mask: np.ndarray, lengths: np.ndarray, bos_id: int, hash: str, order: np.ndarray | None = None
    ) -> None:
        self.ids, self.mask, self.lengths = ids, mask, np.asarray(lengths, np.int64)
        self.starts = np.cumsum(self.lengths) - self.lengths
        self.order = np.arange(len(self.lengths)) if order is None else np.asarray(order)
        self.bos_id, self.hash = bos_id, hash

    @classmethod
    def render(cls, conversations: Sequence[Conversation], tokenizer: Tokenizer) -> ConversationSet:
        """A set of checked conversations, each once. Raises ConfigError when there are none."""
        if not conversations:
            raise ConfigError("no conversations to train on; give at least one")
        rendered = [render_conversation(c, tokenizer) for c in conversations]
        return cls(
            ids=np.concatenate([r.ids for r in rendered]),
            mask=np.concatenate([r.mask for r in rendered]),
            lengths=np.array([len(r.ids) for r in rendered], np.int64),
            bos_id=tokenizer.bos_id,
            hash=content_hash([tokenizer.hash, [c["messages"] for c in conversations]]),
        )

    def __len__(self) -> int:
        return len(self.order)

    @property
    def num_supervised_tokens(self) -> int:
        """In one pass."""
        return int(np.add.reduceat(self.mask, self.starts, dtype=np.int64)[self.order].sum())


class ConversationLoader:
    """Batches of rows of T + 1 ids, packed best-fit and padded with BOS, never cropped; a conversation longer than a row is cut
    at its end (`num_truncated`). Global batch k is a pure function of (hash, sequence_len, seed, k)."""

    def __init__(self, conversations: ConversationSet, *, sequence_len: int, rows_per_batch: int, seed: int = 0) -> None:
        if sequence_len < 1 or rows_per_batch < 1:
            raise ConfigError(f"sequence_len {sequence_len} and rows_per_batch {rows_per_batch} must be at least 1")
        self.conversations, self.sequence_len, self.rows_per_batch, self.seed = conversations, sequence_len, rows_per_batch, seed
        lengths = conversations.lengths[conversations.order]
        self.num_truncated = int((lengths > sequence_len + 1).sum())
        self._lengths = np.minimum(lengths, sequence_len + 1)
        self._plans: dict[int, packers.RowPlan] = {}
        self._ends: list[int] = []  # the row after the last one of each epoch

    @property
    def rows_per_epoch(self) -> int:
        """Rows of the first epoch (another shuffle may pack into a few more or fewer)."""
        return self._plan(0).num_rows

    def batch(self, k: int, rank: int = 0, world_size: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets of this rank's rows of global batch k: int64 (rows, T); targets not learned are -1, which may be
        all of them."""
        first, last = rank_rows(self.rows_per_batch, rank, world_size)
        base = k * self.rows_per_batch
        rows = range(base + first, base + last)
        return self._render([self._locate(row) for row in rows])

    def epoch(self, max_rows: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """One pass, as the rows of the first epoch (0: all of them): for validation."""
        return self._render([(0, row) for row in range(min(self.rows_per_epoch, max_rows or self.rows_per_epoch))])

    def _locate(self, row: int) -> tuple[int, int]:
        """Epoch of a row, and its number within it."""
        while not self._ends or self._ends[-1] <= row:
            self._ends.append((self._ends[-1] if self._ends else 0) + self._plan(len(self._ends)).num_rows)
        epoch = int(np.searchsorted(self._ends, row, side="right"))
        return epoch, row - (self._ends[epoch - 1] if epoch else 0)

    def _plan(self, epoch: int) -> packers.RowPlan:
        if epoch not in self._plans:
            while len(self._plans) >= 2:
                del self._plans[next(iter(self._plans))]
            key = (self.conversations.hash, self.seed, epoch)
            self._plans[epoch] = packers.best_fit_padded(self._lengths, self.sequence_len, *key)
        return self._plans[epoch]

    def _render(self, rows: Sequence[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
        data = self.conversations
        ids = np.full((len(rows), self.sequence_len + 1), data.bos_id, np.int64)
        learned = np.zeros(ids.shape, bool)
        for i, (epoch, row) in enumerate(rows):
            plan, at = self._plan(epoch), 0
            for span in range(plan.row_ptr[row], plan.row_ptr[row + 1]):
                start, length = data.starts[data.order[plan.doc[span]]], plan.length[span]
                ids[i, at : at + length] = data.ids[start : start + length]
                learned[i, at : at + length] = data.mask[start : start + length]
                at += length
        return ids[:, :-1].copy(), np.where(learned[:, 1:], ids[:, 1:], IGNORED)
