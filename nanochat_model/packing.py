"""Which spans of which documents make up a row. Pure functions of document lengths and a key; no tokens are touched.

Documents begin with BOS. A row holds T + 1 tokens: T inputs and, shifted by one, T targets.

- best_fit: every row begins with a document. From a buffer of 1000 documents the longest that still fits is put in, again and
  again; when none fits, the shortest is cut to fill the row and the rest of it is dropped (nanochat dataloader.py). Nothing is
  padded, and the rows are shuffled. With documents longer than a row most tokens are dropped.
- keep_remainder: the documents, shuffled, form one ring of tokens that is cut every T tokens; a row is such a cut and the
  token after it, and the rows are shuffled again. A document that is cut goes on in another row, which then begins without
  BOS. Every token is a target once an epoch (up to T of them twice, where the ring closes).

Losses under different packers are not comparable: rows that begin with a document are easier to predict. What a name means
never changes, since runs are resumed and compared by it: another rule gets another name.
"""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nanochat_model.identity import canonical_json
from nanochat_model.spans import spans_index

BUFFER_DOCS = 1000  # nanochat dataloader.py
PAD_BUFFER_DOCS = 100  # nanochat chat_sft.py


@dataclass(frozen=True, kw_only=True)
class RowPlan:
    """Rows as spans: row r is the spans row_ptr[r]..row_ptr[r+1] one after another, of `length` tokens from position
    `begin` of document `doc`. Each row's lengths add up to T + 1 (to at most that when padded)."""

    row_ptr: np.ndarray  # int64 (rows + 1,)
    doc: np.ndarray  # int64 (spans,)
    begin: np.ndarray  # int64 (spans,)
    length: np.ndarray  # int64 (spans,)

    @property
    def num_rows(self) -> int:
        return len(self.row_ptr) - 1


def permutation(count: int, *key: object) -> np.ndarray:
    """A shuffle of 0..count-1 that depends on `key` alone: on no machine, numpy version or earlier call (int64).

    numpy promises the raw stream of a bit generator for ever, but not the shuffles built on it; hence a stable sort of it.
    """
    seed = int.from_bytes(hashlib.sha256(canonical_json(list(key)).encode()).digest()[:16], "big")
    return np.argsort(np.random.PCG64(seed).random_raw(count), kind="stable")


def keep_remainder_rows(num_tokens: int, row_tokens: int, *, ring: bool = True) -> int:
    """Rows that keep_remainder cuts `num_tokens` into; `row_tokens` is T."""
    return -(-num_tokens // row_tokens) if ring else max(0, num_tokens - 1) // row_tokens


def keep_remainder(lengths: np.ndarray, row_tokens: int, *key: object, ring: bool = True) -> RowPlan:
    """Plan of documents of `lengths` (int64 (docs,), BOS included) in rows of `row_tokens` + 1, shuffled by `key`.

    ring=False leaves out the row that would close the ring, so no token counts twice (validation).
    """
    total = int(lengths.sum())
    order = permutation(len(lengths), *key, "documents")
    # the ring is laid out once and then begins anew, far enough for the last row
    again = np.tile(order, -(-(row_tokens + 1) // total))
    around = int(np.searchsorted(np.cumsum(lengths[again]), row_tokens + 1)) + 1
    order = np.concatenate([order, again[:around]])
    ends = np.cumsum(lengths[order])
    offsets = ends - lengths[order]
    rows = keep_remainder_rows(total, row_tokens, ring=ring)
    row_begin = permutation(rows, *key, "rows") * row_tokens
    row_end = row_begin + row_tokens + 1
    first = np.searchsorted(ends, row_begin, side="right")
    last = np.searchsorted(ends, row_end, side="left")
    counts = last - first + 1
    row_ptr = np.concatenate([[0], np.cumsum(counts)])
    row = np.repeat(np.arange(rows), counts)
    at = first[row] + np.arange(len(row)) - row_ptr[row]
    begin = np.maximum(offsets[at], row_begin[row])
    length = np.minimum(ends[at], row_end[row]) - begin
    return RowPlan(row_ptr=row_ptr, doc=order[at], begin=begin - offsets[at], length=length)


def best_fit(lengths: np.ndarray, row_tokens: int, *key: object, buffer_docs: int = BUFFER_DOCS) -> RowPlan:
    """Plan of documents of `lengths` in rows of `row_tokens` + 1, none padded; the last, incomplete row is dropped."""
    return _packed(lengths, row_tokens, key, buffer_docs, crop=True)


def best_fit_padded(lengths: np.ndarray, row_tokens: int, *key: object, buffer_docs: int = PAD_BUFFER_DOCS) -> RowPlan:
    """As `best_fit`, but a row that nothing fits into stays short and nothing is cut or dropped. No length may be over
    `row_tokens` + 1."""
    assert len(lengths) == 0 or int(lengths.max()) <= row_tokens + 1
    return _packed(lengths, row_tokens, key, buffer_docs, crop=False)


def _packed(lengths: np.ndarray, row_tokens: int, key: tuple[object, ...], buffer_docs: int, *, crop: bool) -> RowPlan:
    """Documents shuffled, packed, and the rows shuffled again: the packer takes long documents first, and of documents fewer
    than its buffer holds it makes the same rows in the same order however they were shuffled."""
    order = permutation(len(lengths), *key, "documents")
    row_ptr, docs, sizes = (np.array(a, np.int64) for a in _pack(lengths[order].tolist(), row_tokens + 1, buffer_docs, crop=crop))
    rows = permutation(len(row_ptr) - 1, *key, "rows")
    counts = np.diff(row_ptr)[rows]
    spans = spans_index(row_ptr[rows], counts)
    doc = order[docs[spans]]
    return RowPlan(row_ptr=np.concatenate([[0], np.cumsum(counts)]), doc=doc, begin=np.zeros_like(doc), length=sizes[spans])


def _pack(lengths: Sequence[int], capacity: int, buffer_docs: int, *, crop: bool) -> tuple[list[int], list[int], list[int]]:
    """Best-fit in the order given: row_ptr, document and length of every span. Of equally long documents the earliest goes
    first. The buffer is a sorted list, so a document costs a few binary searches."""
    count = len(lengths)
    bits = max(1, count).bit_length()  # a waiting document is the integer length·2^bits + (count - number): earlier is larger
    buffer = sorted((n << bits) + count - i for i, n in enumerate(lengths[:buffer_docs]))
    upcoming = len(buffer)
    row_ptr, docs, sizes = [0], [], []
    while buffer:
        room = capacity
        while room and buffer:
            at = bisect.bisect_left(buffer, (room + 1) << bits) - 1
            if at < 0:
                if not crop:
                    break
                at = bisect.bisect_left(buffer, ((buffer[0] >> bits) + 1) << bits) - 1
            document = buffer.pop(at)
            size = min(document >> bits, room)
            docs.append(count - (document & ((1 << bits) - 1)))
            sizes.append(size)
            room -= size
            if upcoming < count:
                bisect.insort(buffer, (lengths[upcoming] << bits) + count - upcoming)
                upcoming += 1
        if room and crop:  # documents ran out
            del docs[row_ptr[-1] :], sizes[row_ptr[-1] :]
            break
        row_ptr.append(len(docs))
    return row_ptr, docs, sizes
