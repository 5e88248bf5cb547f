"""Batches as a pure function of (manifest, packing, seed, k): whoever asks, in whatever order and split."""

from __future__ import annotations

import itertools
import multiprocessing
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from small_text import small_shards

from nanochat_model import corpus
from nanochat_model import packing as packers
from nanochat_model.errors import ConfigError
from nanochat_model.loader import Loader
from nanochat_model.row_stream import COUNTS_FOLDER, RowStream
from nanochat_model.shards import ShardSet

PACKINGS = ("best_fit", "keep_remainder")
T = 48


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    return small_shards(tmp_path_factory.mktemp("one"))


@pytest.fixture(scope="module")
def windows(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """Many shard files in windows of two or three."""
    folder, row_group = tmp_path_factory.mktemp("many"), corpus.ROW_GROUP_BYTES
    corpus.ROW_GROUP_BYTES = 4000
    try:
        found = small_shards(folder, shard_bytes=10_000, window_tokens=12_000)
    finally:
        corpus.ROW_GROUP_BYTES = row_group
    assert len(found.files("train")) >= 6
    return found


def loader(shards: ShardSet, packing: str = "best_fit", rows: int = 8, seed: int = 0, sequence_len: int = T) -> Loader:
    return Loader(shards, packing=packing, sequence_len=sequence_len, rows_per_batch=rows, seed=seed)  # type: ignore[arg-type]


def documents(shards: ShardSet, split: str = "train") -> list[list[int]]:
    found = []
    for i in range(len(shards.files(split))):
        tokens, offsets = shards.tokens(split, i), shards.offsets(split, i).tolist()
        found += [tokens[a:b].tolist() for a, b in itertools.pairwise(offsets)]
    return found


def epoch_rows(load: Loader, epoch: int) -> np.ndarray:
    stream = RowStream(load.shards, load.split, load.packing, load.sequence_len, load.seed)
    first = sum(stream.epoch_rows(e) for e in range(epoch))
    return stream.rows(first, first + stream.epoch_rows(epoch))


def test_rows_are_the_packers_plan_filled_with_tokens(shards: ShardSet) -> None:
    docs = documents(shards)
    lengths = np.array([len(d) for d in docs])
    for packing in PACKINGS:
        rows = []
        for epoch in range(3):
            key = (shards.manifest_hash, "train", packing, 5, epoch, 0)
            plan = (packers.best_fit if packing == "best_fit" else packers.keep_remainder)(lengths, T, *key)
            spans = list(zip(plan.doc, plan.begin, plan.length, strict=True))
            rows += [[t for d, b, n in spans[i:j] for t in docs[d][b : b + n]] for i, j in itertools.pairwise(plan.row_ptr)]
        load = loader(shards, packing, rows=7, seed=5)
        for k in (len(rows) // 7 - 1, 0, 3, load.rows_per_epoch // 7):  # the last one crosses into epoch 1
            inputs, targets = load.batch(k)
            assert inputs.dtype == targets.dtype == np.int64 and inputs.shape == targets.shape == (7, T)
            assert inputs.flags.c_contiguous and targets.flags.c_contiguous
            assert [[*i, j[-1]] for i, j in zip(inputs.tolist(), targets.tolist(), strict=True)] == rows[7 * k : 7 * k + 7]
            assert (inputs[:, 1:] == targets[:, :-1]).all()


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("name", ["shards", "windows"])
def test_any_world_size_sees_the_same_global_batch(name: str, packing: str, request: pytest.FixtureRequest) -> None:
    one = loader(request.getfixturevalue(name), packing)
    for world_size in (1, 2, 3, 5, 8, 11):  # 8 rows: 3 and 5 divide nothing, 11 leaves some ranks without rows
        for k in (0, 1, 60, 400):
            parts = [one.batch(k, rank, world_size) for rank in range(world_size)]
            assert max(len(i) for i, _ in parts) - min(len(i) for i, _ in parts) <= 1
            for side in (0, 1):
                assert (np.concatenate([p[side] for p in parts]) == one.batch(k)[side]).all()


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("name", ["shards", "windows"])
def test_a_resumed_loader_gives_the_same_batches(name: str, packing: str, request: pytest.FixtureRequest) -> None:
    shards = request.getfixturevalue(name)
    through = loader(shards, packing)
    expected = [through.batch(k) for k in range(300)]
    for k in (299, 0, 150, 151, 37):
        fresh = loader(ShardSet.open(shards.path), packing)
        for side in (0, 1):
            assert (fresh.batch(k)[side] == expected[k][side]).all()
            assert (through.batch(k)[side] == expected[k][side]).all()


def batch_bytes(path: str, packing: str, k: int) -> bytes:
    return loader(ShardSet.open(path), packing).batch(k)[0].tobytes()


def test_another_process_gives_the_same_batches(windows: ShardSet) -> None:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        for packing in PACKINGS:
            assert pool.apply(batch_bytes, (str(windows.path), packing, 123)) == batch_bytes(str(windows.path), packing, 123)


@pytest.mark.parametrize("packing", PACKINGS)
def test_batch_sizes_read_the_same_rows_in_the_same_order(shards: ShardSet, packing: str) -> None:
    big, small = loader(shards, packing, rows=12), loader(shards, packing, rows=3)
    for k in (0, 7, 80):
        assert (big.batch(k)[0] == np.concatenate([small.batch(4 * k + i)[0] for i in range(4)])).all()


@pytest.mark.parametrize("packing", PACKINGS)
def test_seeds_epochs_and_packers_shuffle(shards: ShardSet, packing: str) -> None:
    load = loader(shards, packing)
    first, second, other = epoch_rows(load, 0), epoch_rows(load, 1), epoch_rows(loader(shards, packing, seed=1), 0)
    for rows in (second, other):
        shared = len({r.tobytes() for r in first} & {r.tobytes() for r in rows})
        assert not (first[:5] == rows[:5]).all() and shared < len(first)
    if packing == "best_fit":
        assert (first[:, 0] == shards.bos_id).all()


@pytest.mark.parametrize("name", ["shards", "windows"])
def test_keep_remainder_loses_no_token_in_an_epoch(name: str, request: pytest.FixtureRequest) -> None:
    shards = request.getfixturevalue(name)
    available = Counter(t for d in documents(shards) for t in d)
    load = loader(shards, "keep_remainder")
    num_windows = 1 if name == "shards" else len(RowStream(shards, "train", "keep_remainder", T, 0)._files(0))
    for epoch in (0, 1):
        used = Counter(epoch_rows(load, epoch)[:, 1:].ravel().tolist())
        assert not available - used
        assert (used - available).total() < T * num_windows  # where each window's ring closes
    assert load.dropped_fraction == 0


def test_best_fit_uses_no_token_twice_and_says_what_it_drops(shards: ShardSet, windows: ShardSet) -> None:
    for found in (shards, windows):
        load = loader(found)
        used = Counter(epoch_rows(load, 0).ravel().tolist())
        assert not used - Counter(t for d in documents(found) for t in d)
        if found is shards:
            assert load.dropped_fraction == pytest.approx(1 - used.total() / found.num_tokens("train"))
        assert 0.05 < load.dropped_fraction < 0.95


def test_opening_a_loader_plans_one_window(windows: ShardSet, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "shards"
    shutil.copytree(windows.path, path, ignore=shutil.ignore_patterns(COUNTS_FOLDER))
    planned: list[object] = []
    original = packers.best_fit

    def counted(*args, **kwargs):
        planned.append(args)
        return original(*args, **kwargs)

    monkeypatch.setattr(packers, "best_fit", counted)
    load = loader(ShardSet.open(path))
    assert load.dropped_fraction > 0 and load.batch(0)[0].shape == (8, T)
    assert len(planned) == 1


def test_windows_hold_whole_files_within_their_size_and_change_with_the_epoch(windows: ShardSet) -> None:
    stream = RowStream(windows, "train", "best_fit", T, 0)
    sizes = [f.num_tokens for f in windows.files("train")]
    epochs = [[list(w) for w in stream._files(e)] for e in range(3)]
    for groups in epochs:
        assert sorted(i for g in groups for i in g) == list(range(len(sizes)))
        assert all(sum(sizes[i] for i in g) <= 12_000 or len(g) == 1 for g in groups) and len(groups) > 1
    assert epochs[0] != epochs[1] != epochs[2]


def test_row_counts_are_kept_for_a_jump_and_survive_a_torn_line(
    windows: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "shards"
    shutil.copytree(windows.path, path, ignore=shutil.ignore_patterns(COUNTS_FOLDER))
    through = loader(windows)
    expected = {k: through.batch(k)[0] for k in (200, 400)}
    loader(ShardSet.open(path)).batch(200)
    (counts,) = (path / COUNTS_FOLDER).glob("*.txt")
    lines = counts.read_text().splitlines()
    torn = max(i for i, line in enumerate(lines) if len(line.split()[2]) > 1)
    assert torn > 3
    counts.write_text("\n".join(lines[: torn + 1])[:-1])  # a crash in the middle of a line
    planned: list[object] = []
    original = packers.best_fit

    def counted(*args, **kwargs):
        planned.append(args)
        return original(*args, **kwargs)

    monkeypatch.setattr(packers, "best_fit", counted)
    assert (loader(ShardSet.open(path)).batch(200)[0] == expected[200]).all()
    assert len(planned) < 10 < len(lines)
    assert (loader(ShardSet.open(path)).batch(400)[0] == expected[400]).all()  # past the window of the torn line
    assert not (loader(ShardSet.open(path), seed=1).batch(200)[0] == expected[200]).all()
    assert len(list((path / COUNTS_FOLDER).glob("*.txt"))) == 2


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("name", ["shards", "windows"])
def test_validation_is_fixed_and_counts_no_token_twice(name: str, packing: str, request: pytest.FixtureRequest) -> None:
    shards = request.getfixturevalue(name)
    inputs, targets = loader(shards, packing).validation(500)
    assert inputs.shape == targets.shape == (-(-500 // T), T)
    for other in (loader(shards, packing, seed=9), loader(shards, packing, rows=1)):
        assert (other.validation(500)[0] == inputs).all()
    parts = [loader(shards, packing).validation(500, rank, 4) for rank in range(4)]
    assert (np.concatenate([p[1] for p in parts]) == targets).all()
    whole_inputs, whole_targets = loader(shards, packing).validation(10**9)
    assert (whole_inputs[: len(inputs)] == inputs).all()
    available = Counter(t for d in documents(shards, "val") for t in d)
    used = Counter(whole_targets.ravel().tolist())
    assert not used - available
    if packing == "keep_remainder":
        num_windows = len(RowStream(shards, "val", "keep_remainder", T, 0)._files(0))
        assert available.total() - used.total() <= (T + 1) * num_windows


def test_rows_longer_than_a_window_still_hold_whole_rows(windows: ShardSet) -> None:
    load = loader(windows, "keep_remainder", rows=3, sequence_len=5000)
    rows = np.concatenate([load.batch(k)[1] for k in range(load.rows_per_epoch // 3)])
    assert rows.shape[1] == 5000 and (rows == windows.bos_id).any(axis=1).all()


def test_bad_arguments_say_what_is_possible(shards: ShardSet) -> None:
    with pytest.raises(ConfigError, match="packing 'fit' is unknown; give 'best_fit' or 'keep_remainder'"):
        loader(shards, "fit")
    with pytest.raises(ConfigError, match="sequence_len 0 and rows_per_batch 8 must be at least 1"):
        loader(shards, sequence_len=0)
    for packing in PACKINGS:
        with pytest.raises(ConfigError, match=r"split 'train' of .* holds \d+ tokens, not enough for one row of 1000000 \+ 1"):
            loader(shards, packing, sequence_len=1_000_000)
        tokens = shards.num_tokens("val")
        with pytest.raises(ConfigError, match=f"split 'val' of .* holds {tokens} tokens"):
            loader(shards, packing, sequence_len=tokens).validation(10)
