"""Packers against slow, obvious ones: which documents make a row, what is lost, and that nothing else decides it."""

from __future__ import annotations

import hashlib
from collections import Counter

import numpy as np
import pytest

from nanochat_model.packing import BUFFER_DOCS, best_fit, best_fit_padded, keep_remainder, permutation

Row = list[tuple[int, int, int]]  # (document, begin, length)


def rows_of(plan) -> list[Row]:
    spans = list(zip(plan.doc.tolist(), plan.begin.tolist(), plan.length.tolist(), strict=True))
    return [spans[a:b] for a, b in zip(plan.row_ptr.tolist(), plan.row_ptr.tolist()[1:], strict=False)]


def reference_best_fit(lengths: list[int], capacity: int, buffer_docs: int, crop: bool) -> list[list[tuple[int, int]]]:
    """Rows of (document, length): take the longest that fits, the earliest of equals; else cut the shortest (or pad)."""
    waiting = list(enumerate(lengths))
    buffer: list[tuple[int, int]] = []
    rows: list[list[tuple[int, int]]] = []
    while True:
        row: list[tuple[int, int]] = []
        room = capacity
        while room:
            while waiting and len(buffer) < buffer_docs:
                buffer.append(waiting.pop(0))
            if not buffer:
                break
            fitting = [(-n, i) for i, n in buffer if n <= room]
            if fitting:
                n, i = min(fitting)
                row.append((i, -n))
            elif crop:
                n, i = min((n, i) for i, n in buffer)
                row.append((i, room))
            else:
                break
            buffer = [(j, n) for j, n in buffer if j != row[-1][0]]
            room -= row[-1][1]
        if (room and crop) or not row:
            return rows
        rows.append(row)


@pytest.mark.parametrize("buffer_docs", [1, 7, BUFFER_DOCS])
@pytest.mark.parametrize("T", [1, 5, 32, 200])
def test_best_fit_is_the_obvious_packer(T: int, buffer_docs: int) -> None:
    for seed, count in ((0, 0), (1, 1), (2, 40), (3, 300)):
        lengths = np.random.default_rng(seed).integers(1, 2 * T + 6, count)
        order = permutation(count, "key", seed, "documents")
        expected = reference_best_fit(lengths[order].tolist(), T + 1, buffer_docs, crop=True)
        found = rows_of(best_fit(lengths, T, "key", seed, buffer_docs=buffer_docs))
        shuffle = permutation(len(expected), "key", seed, "rows")
        assert found == [[(order[i], 0, n) for i, n in expected[r]] for r in shuffle]
        assert all(sum(n for _, _, n in row) == T + 1 for row in found)
        short = np.minimum(lengths, T + 1)
        padded = reference_best_fit(short[order].tolist(), T + 1, buffer_docs, crop=False)
        found = rows_of(best_fit_padded(short, T, "key", seed, buffer_docs=buffer_docs))
        shuffle = permutation(len(padded), "key", seed, "rows")
        assert found == [[(order[i], 0, n) for i, n in padded[r]] for r in shuffle]
        assert sorted(d for row in found for d, _, _ in row) == list(range(count))


@pytest.mark.parametrize("T", [1, 2, 7, 31, 100, 5000])
@pytest.mark.parametrize("ring", [True, False])
def test_keep_remainder_cuts_one_ring_of_shuffled_documents(T: int, ring: bool) -> None:
    for seed, count in ((0, 1), (1, 3), (2, 50)):
        lengths = np.random.default_rng(seed).integers(1, 90, count)
        total = int(lengths.sum())
        ring_of_tokens = [(d, i) for d in permutation(count, seed, "documents").tolist() for i in range(lengths[d])]
        num_rows = -(-total // T) if ring else (total - 1) // T
        expected = [
            [ring_of_tokens[(r * T + i) % total] for i in range(T + 1)] for r in permutation(num_rows, seed, "rows").tolist()
        ]
        plan = keep_remainder(lengths, T, seed, ring=ring)
        assert [[(d, b + i) for d, b, n in row for i in range(n)] for row in rows_of(plan)] == expected


def test_keep_remainder_makes_every_token_a_target() -> None:
    rng = np.random.default_rng(0)
    for total_modulo in range(5):
        lengths = rng.integers(1, 300, 200)
        lengths[0] += (total_modulo - int(lengths.sum())) % 5  # with and without a ring that closes exactly
        targets: Counter[tuple[int, int]] = Counter()
        for row in rows_of(keep_remainder(lengths, 5, "x")):
            targets.update([(d, b + i) for d, b, n in row for i in range(n)][1:])
        assert set(targets) == {(d, i) for d in range(200) for i in range(lengths[d])}
        assert sum(targets.values()) - len(targets) == (5 - total_modulo) % 5 and max(targets.values()) <= 2


def test_rows_of_few_documents_are_shuffled_too() -> None:
    lengths = np.random.default_rng(0).integers(1, 40, 60)
    first, second = (rows_of(best_fit(lengths, 99, "x", epoch)) for epoch in (0, 1))
    assert first != second


def test_permutation_depends_on_its_key_alone() -> None:
    # These values must never change: a resumed run would read other tokens.
    assert permutation(8, "a", 1).tolist() == PINNED
    assert permutation(8, "a", 1).tolist() == PINNED
    assert permutation(8, "a", 2).tolist() != PINNED
    assert sorted(permutation(1000, "b").tolist()) == list(range(1000))
    assert permutation(0, "b").tolist() == [] and permutation(1, "b").tolist() == [0]


def test_what_a_packers_name_means_never_changes() -> None:
    lengths = np.arange(1, 200) * 7919 % 97 + 1
    plans = [pack(lengths, 31, "pinned", 0) for pack in (best_fit, keep_remainder)]
    digests = [hashlib.sha256(repr(rows_of(plan)).encode()).hexdigest()[:16] for plan in plans]
    assert digests == PINNED_PLANS


def test_permutations_are_uniform() -> None:
    counts = Counter(tuple(permutation(3, i).tolist()) for i in range(6000))
    assert len(counts) == 6 and all(abs(n - 1000) < 150 for n in counts.values())  # 5 standard deviations


def test_long_documents_are_dropped_by_best_fit_only() -> None:
    lengths = np.full(100, 1000)
    assert best_fit(lengths, 99, "x").num_rows == 100  # each row is the start of one document: 90% lost
    assert keep_remainder(lengths, 99, "x").num_rows == -(-100_000 // 99)


PINNED = [0, 3, 5, 2, 7, 1, 6, 4]
PINNED_PLANS = ["3a845f79ebe2b7c6", "df0a6c08685358cd"]
