"""Batches of tokens: global batch k is a pure function of (manifest, packing, seed, k).

The rows of epoch 0, 1, 2, … follow one another; batch k takes rows k·n … k·n + n - 1 of them, so candidates with the same seed
and another batch size read the same rows in the same order, and a run can be resumed at any k on any number of ranks.

Big corpora are planned window by window: each epoch shuffles the shard files, groups them into windows of `window_tokens`
(manifest), and shuffles and packs the documents of a window, so memory is bounded by one window's plan. Under best_fit the rows
of a window are known only after packing it (about 1 µs a document); a first jump far into a corpus of many windows packs those
before it once.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np

from nanochat_model import packing as packers
from nanochat_model.config import Packing
from nanochat_model.errors import ConfigError
from nanochat_model.shard_set import ShardSet

_KEPT_WINDOWS = 2
VALIDATION_SEED = 0


@dataclass(frozen=True, kw_only=True)
class _Window:
    """A planned window: row r is spans row_ptr[r]..row_ptr[r+1], each `length` tokens from `start` in tokens[`file`]."""

    row_ptr: np.ndarray
    file: np.ndarray
    start: np.ndarray
    length: np.ndarray

    @property
    def num_rows(self) -> int:
        return len(self.row_ptr) - 1


class RowStream:
    """All rows of one split in order, over endless epochs: rows(first, last) is the tokens of those, (rows, T + 1)."""

    def __init__(self, shards: ShardSet, split: str, packing: Packing, sequence_len: int, seed: int, *, ring: bool = True) -> None:
        self._shards, self._split, self._packing = shards, split, packing
        self._row_tokens, self._seed, self._ring = sequence_len, seed, ring
        self._windows: OrderedDict[tuple[int, int], _Window] = OrderedDict()
        self._groups: dict[int, list[list[int]]] = {}
        self._ends: list[int] = []  # the row after the last one of each window, over all epochs so far
        self._keys: list[tuple[int, int]] = []  # (epoch, window) of each entry of _ends

    def rows(self, first: int, last: int) -> np.ndarray:
        """Tokens of rows first..last-1: (last - first, T + 1) in the shards' dtype."""
        out = np.empty((last - first, self._row_tokens + 1), self._shards.dtype)
        row = first
        while row < last:
            at = self._find(row)
            begin = self._ends[at - 1] if at else 0
            count = min(last, self._ends[at]) - row
            self._gather(self._window(*self._keys[at]), row - begin, out[row - first : row - first + count])
            row += count
        return out

    def epoch_rows(self, epoch: int) -> int:
        """Rows of one epoch."""
        return sum(self._num_rows(epoch, w) for w in range(len(self._group(epoch))))

    def _find(self, row: int) -> int:
        """Index into _ends of the window that holds a row."""
        while not self._ends or self._ends[-1] <= row:
            epoch, window = self._keys[-1] if self._keys else (0, -1)
            epoch, window = (epoch, window + 1) if window + 1 < len(self._group(epoch)) else (epoch + 1, 0)
            self._ends.append((self._ends[-1] if self._ends else 0) + self._num_rows(epoch, window))
            self._keys.append((epoch, window))
        return int(np.searchsorted(self._ends, row, side="right"))

    def _group(self, epoch: int) -> list[list[int]]:
        """The shard files of each window of an epoch."""
        if epoch not in self._groups:
            files = self._shards.files(self._split)
            groups: list[list[int]] = []
            room = 0
            for i in packers.permutation(len(files), *self._key(epoch), "files").tolist():
                if not groups or files[i].num_tokens > room:
                    groups.append([])
                    room = self._shards.window_tokens
                groups[-1].append(i)
                room -= files[i].num_tokens
            self._groups[epoch] = groups
        return self._groups[epoch]

    def _key(self, epoch: int) -> list[object]:
        return [self._shards.manifest_hash, self._packing, self._seed, epoch]

    def _num_rows(self, epoch: int, window: int) -> int:
        if self._packing == "keep_remainder" and self._ring:
            files = self._shards.files(self._split)
            return packers.keep_remainder_rows(sum(files[i].num_tokens for i in self._group(epoch)[window]), self._row_tokens)
        return self._window(epoch, window).num_rows

    def _window(self, epoch: int, window: int) -> _Window:
        key = (epoch, window)
        if key not in self._windows:
            while len(self._windows) >= _KEPT_WINDOWS:
                self._windows.popitem(last=False)
            self._windows[key] = self._plan(epoch, window)
        self._windows.move_to_end(key)
        return self._windows[key]

    def _plan(self, epoch: int, window: int) -> _Window:
        files = self._group(epoch)[window]
        offsets = [self._shards.offsets(self._split, i) for i in files]
        starts = np.concatenate([o[:-1] for o in offsets])
        lengths = np.concatenate([np.diff(o) for o in offsets])
        doc_file = np.repeat(files, [len(o) - 1 for o in offsets])
        key = [*self._key(epoch), window]
        if self._packing == "keep_remainder":
            plan = packers.keep_remainder(lengths, self._row_tokens, *key, ring=self._ring)
        else:
            plan = packers.best_fit(lengths, self._row_tokens, *key)
        return _Window(row_ptr=plan.row_ptr, file=doc_file[plan.doc], start=starts[plan.doc] + plan.begin, length=plan.length)

    def _gather(self, window: _Window, first: int, out: np.ndarray) -> None:
        """Copy rows first.. of a window into out (rows, T + 1)."""
        spans = slice(window.row_ptr[first], window.row_ptr[first + len(out)])
        flat = out.reshape(-1)
        sources = {i: self._shards.tokens(self._split, i) for i in np.unique(window.file[spans]).tolist()}
        at = 0
        for i, start, length in zip(
            window.file[spans].tolist(), window.start[spans].tolist(), window.length[spans].tolist(), strict=True
        ):
            flat[at : at + length] = sources[i][start : start + length]
            at += length
        assert at == flat.size, (at, flat.size)


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
        """Rows of the first epoch (under best_fit another shuffle may give a few more or fewer)."""
        return self._stream.epoch_rows(0)

    @property
    def dropped_fraction(self) -> float:
        """Share of the split's tokens that no row of the first epoch holds."""
        if self.packing == "keep_remainder":
            return 0.0
        return 1 - self.rows_per_epoch * (self.sequence_len + 1) / self.shards.num_tokens(self.split)

    def _check_rows(self, split: str, stream: RowStream | None = None) -> None:
        tokens = self.shards.num_tokens(split)
        if tokens <= self.sequence_len or (stream is not None and stream.epoch_rows(0) == 0):
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
