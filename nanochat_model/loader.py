"""Batches of tokens: global batch k is a pure function of (manifest, packing, seed, k).

The rows of epoch 0, 1, 2, … follow one another (row_stream.py); batch k takes rows k·n … k·n + n - 1 of them, so candidates with
the same seed and another batch size read the same rows in the same order, and a run can be resumed at any k on any number of
ranks.
"""

from __future__ import annotations

import numpy as np

from nanochat_model.config import Packing
from nanochat_model.errors import ConfigError
from nanochat_model.row_stream import RowStream
from nanochat_model.shard_set import ShardSet

VALIDATION_SEED = 0


class Loader:
    """Training batches and the validation set of a ShardSet.

    `rows_per_batch` counts the rows of a global batch, of all ranks together. Raises ConfigError when a split holds less than
    one row.
    """

    def __init__(
        self,
        shards: ShardSet,
        split: str = "train",
        packing: Packing = "best_fit",
        *,
        sequence_len: int,
        rows_per_batch: int,
        seed: int = 0,
    ) -> None:
        if packing not in ("best_fit", "keep_remainder"):
            raise ConfigError(f"packing {packing!r} is unknown; give 'best_fit' or 'keep_remainder'")
        if sequence_len < 1 or rows_per_batch < 1:
            raise ConfigError(f"sequence_len {sequence_len} and rows_per_batch {rows_per_batch} must be at least 1")
        self.shards, self.split, self.packing = shards, split, packing
        self.sequence_len, self.rows_per_batch, self.seed = sequence_len, rows_per_batch, seed
        self._check_rows(split)
        self._stream = RowStream(shards, split, packing, sequence_len, seed)
        self._check_rows(split, self._stream)

    def batch(self, k: int, rank: int = 0, world_size: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets of this rank's rows of global batch k: int64 (rows, T) each, targets shifted by one.

        The ranks' rows in order of rank are the batch's rows; when they do not divide, some ranks hold one row more.
        """
        first, last = rank_rows(self.rows_per_batch, rank, world_size)
        base = k * self.rows_per_batch
        return _inputs_targets(self._stream.rows(base + first, base + last))

    def validation(self, num_tokens: int, rank: int = 0, world_size: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """This rank's rows of a fixed validation set: int64 (rows, T) inputs and targets.

        The set is the first ceil(num_tokens / T) rows of the validation split in a fixed shuffle (all of them when it holds
        fewer), the same for every seed, batch size and number of ranks.
        """
        self._check_rows("val")
        stream = RowStream(self.shards, "val", self.packing, self.sequence_len, VALIDATION_SEED, ring=False)
        self._check_rows("val", stream)
        rows = min(-(-num_tokens // self.sequence_len), stream.epoch_rows(0))
        return _inputs_targets(stream.rows(*rank_rows(rows, rank, world_size)))

    @property
    def rows_per_epoch(self) -> int:
        """Rows of the first epoch (under best_fit another shuffle may give a few more or fewer, and all of it has to be packed
        to know)."""
        return self._stream.epoch_rows(0)

    @property
    def dropped_fraction(self) -> float:
        """Share of the split's tokens that no row holds (of a split of several windows, in the first one)."""
        return self._stream.dropped_fraction()

    def _check_rows(self, split: str, stream: RowStream | None = None) -> None:
        tokens = self.shards.num_tokens(split)
        if tokens <= self.sequence_len or (stream is not None and not stream.has_rows()):
            raise ConfigError(
                f"split {split!r} of {self.shards.path} holds {tokens} tokens, not enough for one row of {self.sequence_len} + 1 "
                f"under {self.packing}; shorten sequence_len or give more text"
            )


def rank_rows(rows: int, rank: int, world_size: int) -> tuple[int, int]:
    """First and last + 1 of the rows that a rank takes of `rows`."""
    assert 0 <= rank < world_size, (rank, world_size)
    return rank * rows // world_size, (rank + 1) * rows // world_size


def _inputs_targets(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return rows[:, :-1].astype(np.int64), rows[:, 1:].astype(np.int64)
