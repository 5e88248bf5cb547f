"""Shards: what is stored, that it does not depend on workers or interruptions, and that torn files are named."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from ray_nodes import wait_for
from small_text import small_corpus, small_shards, small_tokenizer, write_jsonl

from nanochat_model import corpus as corpus_module
from nanochat_model import shards as shards_module
from nanochat_model.corpus import build_corpus, iter_texts, open_corpus
from nanochat_model.errors import ConfigError
from nanochat_model.shards import ShardSet, build_shards
from nanochat_model.tokenizer import Tokenizer


@pytest.fixture(autouse=True)
def small_row_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus_module, "ROW_GROUP_BYTES", 4000)


def documents(shards: ShardSet, split: str) -> list[list[int]]:
    found = []
    for i in range(len(shards.files(split))):
        tokens, offsets = shards.tokens(split, i), shards.offsets(split, i)
        found += [tokens[a:b].tolist() for a, b in itertools.pairwise(offsets.tolist())]
    return found


def names(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*")}


def test_shards_hold_every_document_after_a_bos(tmp_path: Path) -> None:
    shards = small_shards(tmp_path, shard_bytes=15_000)
    corpus, tokenizer = open_corpus(tmp_path / "corpus"), shards.tokenizer
    for split in ("train", "val"):
        expected = [[tokenizer.bos_id, *tokenizer.encode(t)] for t in iter_texts(corpus, split)]
        assert documents(shards, split) == expected
        assert shards.num_docs(split) == len(expected) and shards.num_tokens(split) == sum(map(len, expected))
    assert len(shards.files("train")) > 4 and shards.dtype == np.uint16
    assert shards.num_bytes("train") == corpus.train_bytes and shards.corpus_hash == corpus.hash
    text_tokens = shards.num_tokens("train") - corpus.train_docs
    assert shards.bytes_per_token == pytest.approx(corpus.train_bytes / text_tokens)
    counted = sum(int(shards.token_bytes[d].sum()) for d in documents(shards, "train"))
    assert counted == corpus.train_bytes
    shards.verify()
    assert not any(n.startswith(("done", ".")) for n in names(shards.path))
    data = shards.data_config("keep_remainder")
    assert (data.manifest_hash, data.tokenizer_hash, data.packing) == (shards.manifest_hash, tokenizer.hash, "keep_remainder")


def test_large_vocabularies_take_four_bytes(tmp_path: Path) -> None:
    corpus = small_corpus(tmp_path)
    tokenizer = small_tokenizer(tmp_path)
    tokenizer._bytes += [b""] * (65537 - tokenizer.vocab_size)  # as if it had so many ids
    shards = build_shards(corpus, tokenizer, tmp_path / "shards")
    assert shards.dtype == np.uint32
    assert shards.files("train")[0].tokens_path.stat().st_size == 4 * shards.num_tokens("train")
    assert documents(shards, "train")[0][1:] == small_tokenizer(tmp_path).encode(next(iter_texts(open_corpus(corpus))))


def test_workers_do_not_change_the_result(tmp_path: Path) -> None:
    one = small_shards(tmp_path, shard_bytes=15_000)
    seen: list[tuple[int, int]] = []
    two = build_shards(
        tmp_path / "corpus", one.tokenizer, tmp_path / "two", num_workers=2, shard_bytes=15_000, progress=lambda *p: seen.append(p)
    )
    assert two.manifest == one.manifest and documents(two, "train") == documents(one, "train")
    total = open_corpus(tmp_path / "corpus").num_bytes
    assert seen[-1] == (total, total) and seen == sorted(seen)


def test_work_may_be_done_by_an_executor_from_elsewhere(tmp_path: Path) -> None:
    """As a Ray cluster's: tasks end in any order, the result is the same, and the executor stays usable."""
    one = small_shards(tmp_path, shard_bytes=15_000)
    with ProcessPoolExecutor(2) as executor:
        options = {"num_workers": 3, "shard_bytes": 15_000, "executor": executor}
        assert build_shards(tmp_path / "corpus", one.tokenizer, tmp_path / "two", **options).manifest == one.manifest
        assert executor.submit(int, "7").result() == 7


def test_an_interrupted_build_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = small_shards(tmp_path, shard_bytes=15_000)
    tokenizer = whole.tokenizer
    tokenized: list[object] = []
    original = shards_module._tokenize

    def until(limit: int):
        def tokenize(tok: Tokenizer, task):
            if len(tokenized) == limit:
                raise KeyboardInterrupt
            tokenized.append(task)
            return original(tok, task)

        return tokenize

    monkeypatch.setattr(shards_module, "_tokenize", until(12))
    with pytest.raises(KeyboardInterrupt):
        build_shards(tmp_path / "corpus", tokenizer, tmp_path / "again", shard_bytes=15_000)
    assert not (tmp_path / "again").exists()
    work = next(tmp_path.glob(".again.building-*"))
    finished = sorted(work.glob("done/train_*.json"))
    assert len(finished) >= 2
    kept = {p.name: p.stat().st_mtime_ns for p in work.glob("train_0000[01].bin")}
    spoiled = f"train_{len(finished) - 1:05d}.bin"  # a finished file that has changed since, but not in size
    (work / spoiled).write_bytes(bytes(b ^ 1 for b in (work / spoiled).read_bytes()))
    monkeypatch.setattr(shards_module, "_tokenize", until(10**9))
    first = len(tokenized)
    again = build_shards(tmp_path / "corpus", tokenizer, tmp_path / "again", shard_bytes=15_000)
    assert again.manifest == whole.manifest
    again.verify()
    total = sum(len(corpus_row_groups(tmp_path, split)) for split in ("train", "val"))
    assert len(tokenized) - first < total - 3  # finished files were not tokenized again
    assert all((again.path / n).stat().st_mtime_ns == t for n, t in kept.items() if n != spoiled)
    assert not list(tmp_path.glob(".again*"))


def corpus_row_groups(folder: Path, split: str) -> list[int]:
    return [g for p in sorted((folder / "corpus" / split).glob("*")) for g in range(pq.ParquetFile(p).num_row_groups)]


def build_slowly(folder: str, delay: float) -> None:
    original = shards_module._tokenize

    def slow(tokenizer: Tokenizer, task):
        time.sleep(delay)
        return original(tokenizer, task)

    shards_module._tokenize = slow
    build_shards(Path(folder) / "corpus", Tokenizer.load(Path(folder) / "shards"), Path(folder) / "killed", shard_bytes=15_000)


def test_kill_9_and_two_builders_at_once(tmp_path: Path) -> None:
    whole = small_shards(tmp_path, shard_bytes=15_000)
    context = multiprocessing.get_context("spawn")
    victim = context.Process(target=build_slowly, args=(str(tmp_path), 0.1))
    victim.start()
    wait_for(lambda: list(tmp_path.glob(".killed.building-*/done/train_00001.json")), every=0.02)
    assert victim.pid is not None
    os.kill(victim.pid, signal.SIGKILL)
    victim.join()
    assert not (tmp_path / "killed").exists() and list(tmp_path.glob(".killed.building-*"))
    builders = [context.Process(target=build_slowly, args=(str(tmp_path), 0.01)) for _ in range(2)]
    for p in builders:
        p.start()
    for p in builders:
        p.join()
    assert [p.exitcode for p in builders] == [0, 0]
    assert ShardSet.open(tmp_path / "killed").manifest == whole.manifest
    assert not list(tmp_path.glob(".killed*"))


def test_existing_shards_are_reused_and_never_overwritten(tmp_path: Path) -> None:
    shards = small_shards(tmp_path)
    stamp = (shards.path / "train_00000.bin").stat().st_mtime_ns
    assert build_shards(tmp_path / "corpus", shards.tokenizer, shards.path).manifest_hash == shards.manifest_hash
    assert (shards.path / "train_00000.bin").stat().st_mtime_ns == stamp
    other = small_tokenizer(tmp_path, 300)
    with pytest.raises(ConfigError, match="already holds shards with tokenizer_hash"):
        build_shards(tmp_path / "corpus", other, shards.path)
    source = write_jsonl(tmp_path / "other.jsonl", [f"text {i} about something" for i in range(40)])
    build_corpus(str(source), tmp_path / "corpus2")
    with pytest.raises(ConfigError, match="already holds shards with corpus_hash"):
        build_shards(tmp_path / "corpus2", shards.tokenizer, shards.path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("x")
    with pytest.raises(ConfigError, match=r"not empty and holds no manifest\.json"):
        build_shards(tmp_path / "corpus", shards.tokenizer, tmp_path / "full")
    with pytest.raises(ConfigError, match="num_workers 0"):
        build_shards(tmp_path / "corpus", shards.tokenizer, tmp_path / "new", num_workers=0)
    assert ShardSet.open(shards.path).manifest == shards.manifest and names(tmp_path / "full") == {"precious"}


def test_torn_missing_and_changed_files_are_named(tmp_path: Path) -> None:
    whole = small_shards(tmp_path)
    for name in ("train_00000.bin", "val_00000.offsets.npy", "token_bytes.npy"):
        for spoil, message in (
            (lambda p: p.write_bytes(p.read_bytes()[:-2]), rf"{name} has \d+ bytes, the manifest says \d+"),
            (lambda p: p.unlink(), f"{name} is missing"),
        ):
            broken = tmp_path / "broken"
            shutil.copytree(whole.path, broken)
            spoil(broken / name)
            with pytest.raises(ConfigError, match=message):
                ShardSet.open(broken)
            shutil.rmtree(broken)
    data = bytearray((whole.path / "train_00000.bin").read_bytes())
    data[1000] ^= 1
    (whole.path / "train_00000.bin").write_bytes(data)
    with pytest.raises(ConfigError, match=r"train_00000\.bin: content is not what the manifest vouches for"):
        ShardSet.open(whole.path).verify()


def test_a_broken_manifest_is_named(tmp_path: Path) -> None:
    shards = small_shards(tmp_path)
    file = shards.path / "manifest.json"
    manifest = json.loads(file.read_text())
    for text, message in (
        (file.read_text()[:200], "not valid JSON"),
        (json.dumps({**manifest, "schema_version": 7}), "manifest schema 7, this version reads 1"),
        (json.dumps({**manifest, "vocab_size": 999}), "was changed after it was written"),
        ("[]", "manifest schema 'list'"),
    ):
        file.write_text(text)
        with pytest.raises(ConfigError, match=message):
            ShardSet.open(shards.path)
    with pytest.raises(ConfigError, match=r"no token shards at .*nowhere"):
        ShardSet.open(tmp_path / "nowhere")


def test_a_corrupt_corpus_file_is_named(tmp_path: Path) -> None:
    shards = small_shards(tmp_path)
    file = tmp_path / "corpus" / "train" / "00000.parquet"
    data = bytearray(file.read_bytes())
    data[-4:] = b"XXXX"
    file.write_bytes(data)
    with pytest.raises(ConfigError, match=r"00000\.parquet: cannot be read"):
        build_shards(tmp_path / "corpus", shards.tokenizer, tmp_path / "new")


def test_a_shard_set_travels_to_another_process(tmp_path: Path) -> None:
    shards = small_shards(tmp_path)
    tokens = shards.tokens("train", 0)
    again = pickle.loads(pickle.dumps(shards))
    assert (again.tokens("train", 0) == tokens).all() and len(pickle.dumps(shards)) < 20_000
