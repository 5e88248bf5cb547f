"""The endless sequence of rows of one split: epoch 0, 1, 2, …, each shuffled anew, readable from any row on.

A big split is planned window by window: each epoch shuffles the shard files and groups them into windows of `window_tokens`
(manifest); the documents of a window are shuffled and packed together. So memory is bounded by the plans of two windows (some 20
bytes a document and 24 a row) and shuffling reaches 2^28 tokens far, over files from anywhere in the corpus.

Under best_fit the rows of a window are known only after packing it (about 1 µs a document). A jump far into a split of several
windows has to pack those before it; their counts are kept beside the shards, so that a resumed run need not do it again.
"""

from __future__ import annotations

import bisect
import os
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nanochat_model import packing as packers
from nanochat_model.config import Packing
from nanochat_model.identity import content_hash
from nanochat_model.shard_set import ShardSet

_KEPT_WINDOWS = 2
COUNTS_FOLDER = "row_counts"
Window = tuple[int, int]  # epoch, number within the epoch


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """Row r is spans row_ptr[r]..row_ptr[r+1], each `length` tokens from `start` in sources[`source`]."""

    row_ptr: np.ndarray
    source: np.ndarray
    start: np.ndarray
    length: np.ndarray
    sources: list[np.ndarray]


class RowStream:
    """Rows of T + 1 tokens. `ring`: whether keep_remainder closes its ring of tokens (training) or not (validation)."""

    def __init__(self, shards: ShardSet, split: str, packing: Packing, sequence_len: int, seed: int, *, ring: bool = True) -> None:
        self._shards, self._split, self._packing = shards, split, packing
        self._row_tokens, self._seed, self._ring = sequence_len, seed, ring
        self._plans: OrderedDict[Window, _Plan] = OrderedDict()
        self._windows: list[Window] = []  # in order, as far as was needed
        self._ends: list[int] = []  # the row after the last one of each of them
        self._epoch_files: tuple[int, list[list[int]]] = (-1, [])
        total = sum(f.num_tokens for f in shards.files(split))
        self._counts = _RowCounts(shards.path, [*self._key(), sequence_len], total > shards.window_tokens)

    def rows(self, first: int, last: int) -> np.ndarray:
        """Rows first..last-1: (last - first, T + 1) in the shards' dtype."""
        out = np.empty((last - first, self._row_tokens + 1), self._shards.dtype)
        row = first
        while row < last:
            at = self._find(row)
            begin = self._ends[at - 1] if at else 0
            count = min(last, self._ends[at]) - row
            _gather(self._plan(self._windows[at]), row - begin, out[row - first : row - first + count])
            row += count
        return out

    def epoch_rows(self, epoch: int) -> int:
        """Rows of one epoch."""
        return sum(self._num_rows((epoch, i)) for i in range(len(self._files(epoch))))

    def has_rows(self) -> bool:
        """Whether the first epoch has any row; plans no more than it takes to know."""
        return any(self._num_rows((0, i)) for i in range(len(self._files(0))))

    def dropped_fraction(self) -> float:
        """Share of tokens that no row holds, in the first window of the first epoch."""
        if self._packing == "keep_remainder":
            return 0.0
        files = self._shards.files(self._split)
        tokens = sum(files[i].num_tokens for i in self._files(0)[0])
        return 1 - self._num_rows((0, 0)) * (self._row_tokens + 1) / tokens

    def _find(self, row: int) -> int:
        """Index into _windows of the one that holds a row."""
        while not self._ends or self._ends[-1] <= row:
            epoch, number = self._windows[-1] if self._windows else (0, -1)
            window = (epoch, number + 1) if number + 1 < len(self._files(epoch)) else (epoch + 1, 0)
            self._ends.append((self._ends[-1] if self._ends else 0) + self._num_rows(window))
            self._windows.append(window)
        return bisect.bisect_right(self._ends, row)

    def _key(self) -> list[object]:
        return [self._shards.manifest_hash, self._split, self._packing, self._seed]

    def _files(self, epoch: int) -> list[list[int]]:
        """The shard files of each window of an epoch."""
        if self._epoch_files[0] != epoch:
            files = self._shards.files(self._split)
            windows: list[list[int]] = []
            room = 0
            for i in packers.permutation(len(files), *self._key(), epoch, "files").tolist():
                if not windows or files[i].num_tokens > room:
                    windows.append([])
                    room = self._shards.window_tokens
                windows[-1].append(i)
                room -= files[i].num_tokens
            self._epoch_files = (epoch, windows)
        return self._epoch_files[1]

    def _num_rows(self, window: Window) -> int:
        if self._packing == "keep_remainder":
            files = self._shards.files(self._split)
            tokens = sum(files[i].num_tokens for i in self._files(window[0])[window[1]])
            return packers.keep_remainder_rows(tokens, self._row_tokens, ring=self._ring)
        known = self._counts.get(window)
        if known is None:
            known = len(self._plan(window).row_ptr) - 1
            self._counts.put(window, known)
        return known

    def _plan(self, window: Window) -> _Plan:
        plan = self._plans.get(window)
        if plan is None:
            while len(self._plans) >= _KEPT_WINDOWS:
                self._plans.popitem(last=False)
            plan = self._plans[window] = self._make_plan(window)
        else:
            self._plans.move_to_end(window)
        return plan

    def _make_plan(self, window: Window) -> _Plan:
        files = self._files(window[0])[window[1]]
        offsets = [self._shards.offsets(self._split, i) for i in files]
        starts = np.concatenate([o[:-1] for o in offsets])
        lengths = np.concatenate([np.diff(o) for o in offsets])
        source = np.repeat(np.arange(len(files)), [len(o) - 1 for o in offsets])
        key = [*self._key(), *window]
        if self._packing == "keep_remainder":
            plan = packers.keep_remainder(lengths, self._row_tokens, *key, ring=self._ring)
        else:
            plan = packers.best_fit(lengths, self._row_tokens, *key)
        return _Plan(
            row_ptr=plan.row_ptr,
            source=source[plan.doc],
            start=starts[plan.doc] + plan.begin,
            length=plan.length,
            sources=[self._shards.tokens(self._split, i) for i in files],
        )


def _gather(plan: _Plan, first: int, out: np.ndarray) -> None:
    """Copy rows first, first + 1, … of a plan into out (rows, T + 1)."""
    spans = slice(int(plan.row_ptr[first]), int(plan.row_ptr[first + len(out)]))
    flat, sources, at = out.reshape(-1), plan.sources, 0
    if len(sources) == 1:
        tokens = sources[0]
        for start, length in zip(plan.start[spans].tolist(), plan.length[spans].tolist(), strict=True):
            flat[at : at + length] = tokens[start : start + length]
            at += length
    else:
        where = zip(plan.source[spans].tolist(), plan.start[spans].tolist(), plan.length[spans].tolist(), strict=True)
        for source, start, length in where:
            flat[at : at + length] = sources[source][start : start + length]
            at += length
    assert at == flat.size, (at, flat.size)


class _RowCounts:
    """Rows of each packed window, in a file beside the shards when there are several windows. Lines are appended whole, by any
    number of processes; where the folder may not be written to, the counts stay in memory."""

    def __init__(self, shards: Path, key: list[object], several: bool) -> None:
        self._known: dict[Window, int] = {}
        self._path = shards / COUNTS_FOLDER / f"{content_hash([*key, packers.BUFFER_DOCS])}.txt"
        self._writable = several and os.access(shards, os.W_OK)
        if several and self._path.exists():
            for line in self._path.read_text().splitlines(keepends=True):
                fields = line.split()
                if line.endswith("\n") and len(fields) == 3 and all(f.isdigit() for f in fields):
                    self._known[int(fields[0]), int(fields[1])] = int(fields[2])

    def get(self, window: Window) -> int | None:
        return self._known.get(window)

    def put(self, window: Window, rows: int) -> None:
        self._known[window] = rows
        if self._writable:
            self._path.parent.mkdir(exist_ok=True)
            with self._path.open("a") as f:
                f.write(f"{window[0]} {window[1]} {rows}\n")
