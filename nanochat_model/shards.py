"""Corpus to token shards: row groups are tokenized by several processes and written in order; an interrupted build goes on
with the first shard file that is not finished. Memory: a few row groups (4 MB of text) a process."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import shutil
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nanochat_model.artifacts import Progress, build_folder, sha256_file
from nanochat_model.corpus import SPLITS, CorpusInfo, open_corpus, split_files
from nanochat_model.errors import ConfigError
from nanochat_model.identity import content_hash, write_atomic
from nanochat_model.shard_set import (
    MANIFEST_FILE,
    SCHEMA_VERSION,
    TOKEN_BYTES_FILE,
    ShardSet,
    file_entry,
    manifest_hash,
    read_manifest,
)  # fmt: skip
from nanochat_model.tokenizer import Tokenizer

__all__ = ["ShardSet", "build_shards"]
SHARD_BYTES = 256 << 20  # of text in one shard file, about 64 million tokens at 4 bytes each
DONE_FOLDER = "done"
WINDOW_TOKENS = 1 << 28  # documents are shuffled and packed within windows of whole shard files of this many tokens
Task = tuple[Path, int]  # parquet file, row group
Tokenized = tuple[np.ndarray, np.ndarray, int]  # ids with BOS, length of each document, bytes of text


def build_shards(
    corpus_dir: str | Path,
    tokenizer: Tokenizer,
    out_dir: str | Path,
    *,
    num_workers: int = 1,
    progress: Progress | None = None,
    shard_bytes: int = SHARD_BYTES,
    window_tokens: int = WINDOW_TOKENS,
    executor: Executor | None = None,
) -> ShardSet:
    """Tokenize a corpus into `out_dir`, or find it there. The result does not depend on `num_workers`, the processes that share
    the work; with more than one, a script that calls this needs the usual `if __name__ == "__main__":`.

    `executor` runs the work elsewhere (processes or a cluster, never threads), `num_workers` row groups at a time.

    Raises ConfigError when `out_dir` holds shards of another corpus or tokenizer, or something else.
    """
    if num_workers < 1:
        raise ConfigError(f"num_workers {num_workers} must be at least 1")
    corpus, out_dir = open_corpus(corpus_dir), Path(out_dir)
    wanted = {
        "schema_version": SCHEMA_VERSION, "corpus_hash": corpus.hash, "tokenizer_hash": tokenizer.hash,
        "vocab_size": tokenizer.vocab_size, "bos_id": tokenizer.bos_id,
        "dtype": "<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4", "shard_bytes": shard_bytes, "window_tokens": window_tokens,
    }  # fmt: skip

    def existing() -> ShardSet | None:
        manifest = read_manifest(out_dir)
        if manifest is None:
            if out_dir.exists() and any(out_dir.iterdir()):
                raise ConfigError(f"{out_dir} is not empty and holds no {MANIFEST_FILE}; choose another folder or remove it")
            return None
        for key, value in wanted.items():
            if manifest.get(key) != value:
                raise ConfigError(
                    f"{out_dir} already holds shards with {key} {manifest.get(key)!r}, asked for {value!r}; choose another folder "
                    f"or remove this one"
                )
        return ShardSet.open(out_dir)

    def build(work: Path) -> None:
        _Build(corpus, tokenizer, work, wanted, progress).run(num_workers, executor)

    return build_folder(out_dir, content_hash(wanted), existing=existing, build=build, keep_unfinished=True)


class _Build:
    """One build in its work folder. done/ holds a record of each finished shard file: its manifest entry, and how many row
    groups of the split are done with it."""

    def __init__(self, corpus: CorpusInfo, tokenizer: Tokenizer, work: Path, wanted: dict, progress: Progress | None) -> None:
        self.corpus, self.tokenizer, self.work, self.wanted, self.progress = corpus, tokenizer, work, wanted, progress
        self.done_bytes = 0

    def run(self, num_workers: int, executor: Executor | None = None) -> None:
        (self.work / MANIFEST_FILE).unlink(missing_ok=True)  # of a build that ended between writing it and the renaming
        self.tokenizer.save(self.work)
        splits = {}
        with _Pool(self.tokenizer, self.work, num_workers, executor) as pool:
            for split in SPLITS:
                files = self._split(split, pool)
                totals = {k: sum(f[k] for f in files) for k in ("num_docs", "num_tokens", "num_bytes")}
                splits[split] = {**totals, "files": files}
        np.save(self.work / TOKEN_BYTES_FILE, self.tokenizer.token_bytes())
        manifest = {**self.wanted, "token_bytes": file_entry(self.work / TOKEN_BYTES_FILE), "splits": splits}
        write_atomic(self.work / MANIFEST_FILE, json.dumps({**manifest, "hash": manifest_hash(manifest)}, indent=1))
        shutil.rmtree(self.work / DONE_FOLDER)

    def _split(self, split: str, pool: _Pool) -> list[dict]:
        tasks = [(path, group) for path in split_files(self.corpus, split) for group in range(_num_row_groups(path))]
        files: list[dict] = []
        at = 0
        while at < len(tasks) and (done := self._finished(split, len(files))) is not None:
            files.append(done["entry"])
            at = done["row_groups"]
            self._report(done["entry"]["num_bytes"])
        results = pool.map(tasks[at:])
        while at < len(tasks):
            entry, groups = self._write(split, len(files), results)
            at += groups
            write_atomic(self._done_file(split, len(files)), json.dumps({"entry": entry, "row_groups": at}))
            files.append(entry)
        return files

    def _done_file(self, split: str, number: int) -> Path:
        return self.work / DONE_FOLDER / f"{split}_{number:05d}.json"

    def _finished(self, split: str, number: int) -> dict | None:
        """The record of a shard file of an earlier, interrupted build, when its files still are what it says."""
        path = self._done_file(split, number)
        if not path.exists():
            return None
        done = json.loads(path.read_text(encoding="utf8"))
        for kind in ("tokens", "offsets"):
            wanted, file = done["entry"][kind], self.work / done["entry"][kind]["name"]
            if not file.exists() or file.stat().st_size != wanted["size"] or sha256_file(file) != wanted["sha256"]:
                return None
        return done

    def _write(self, split: str, number: int, results: Iterator[Tokenized]) -> tuple[dict, int]:
        """One shard file from the next results, until it holds `shard_bytes` of text: its entry and how many row groups."""
        tokens_path = self.work / f"{split}_{number:05d}.bin"
        offsets_path = self.work / f"{split}_{number:05d}.offsets.npy"
        lengths, num_bytes, groups = [np.zeros(1, np.int64)], 0, 0
        with tokens_path.open("wb") as f:
            for ids, doc_lengths, text_bytes in results:
                f.write(ids.astype(self.wanted["dtype"], copy=False).data)
                lengths.append(doc_lengths)
                num_bytes += text_bytes
                groups += 1
                self._report(text_bytes)
                if num_bytes >= self.wanted["shard_bytes"]:
                    break
        offsets = np.cumsum(np.concatenate(lengths))
        np.save(offsets_path, offsets)
        entry = {
            "tokens": file_entry(tokens_path), "offsets": file_entry(offsets_path), "num_docs": len(offsets) - 1,
            "num_tokens": int(offsets[-1]), "num_bytes": num_bytes,
        }  # fmt: skip
        return entry, groups

    def _report(self, text_bytes: int) -> None:
        self.done_bytes += text_bytes
        if self.progress is not None:
            self.progress(self.done_bytes, self.corpus.num_bytes)


class _Pool:
    """Tokenizes row groups in order, in this process or in several others, a few ahead of the reader."""

    def __init__(self, tokenizer: Tokenizer, tokenizer_dir: Path, num_workers: int, executor: Executor | None) -> None:
        self._tokenizer, self._num_workers, self._folder = tokenizer, num_workers, str(tokenizer_dir.absolute())
        self._executor, self._owned = executor, False
        if executor is None and num_workers > 1:  # spawn: a fork of a process with threads (tokenizers, torch, ray) can hang
            self._executor, self._owned = ProcessPoolExecutor(num_workers, multiprocessing.get_context("spawn")), True

    def map(self, tasks: Iterable[Task]) -> Iterator[Tokenized]:
        if self._executor is None:
            yield from (_tokenize(self._tokenizer, task) for task in tasks)
            return
        remaining, pending = iter(tasks), deque[Future[Tokenized]]()
        while True:
            for task in itertools.islice(remaining, 2 * self._num_workers - len(pending)):
                pending.append(self._executor.submit(_tokenize_in_worker, self._folder, self._tokenizer.hash, task))
            if not pending:
                return
            yield pending.popleft().result()

    def __enter__(self) -> _Pool:
        return self

    def __exit__(self, *_: object) -> None:
        if self._executor is not None and self._owned:
            self._executor.shutdown(cancel_futures=True)


@lru_cache(maxsize=1)
def _worker_tokenizer(folder: str, tokenizer_hash: str) -> Tokenizer:
    """Of a worker process, which may serve several builds one after another: hence the hash in the key."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # processes are the parallelism here
    return Tokenizer.load(folder)


def _tokenize_in_worker(folder: str, tokenizer_hash: str, task: Task) -> Tokenized:
    return _tokenize(_worker_tokenizer(folder, tokenizer_hash), task)


def _tokenize(tokenizer: Tokenizer, task: Task) -> Tokenized:
    path, group = task
    try:
        with pq.ParquetFile(path) as file:
            texts = file.read_row_group(group, columns=["text"]).column(0).to_pylist()
    except (pa.ArrowException, OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"{path}: cannot be read ({str(e).splitlines()[0]}); remove the corpus and build it again") from None
    bos = np.array([tokenizer.bos_id], np.int32)
    pieces = [p for text in texts for p in (bos, tokenizer.encode_array(text))]
    lengths = np.array([1 + len(p) for p in pieces[1::2]], np.int64)
    ids = np.concatenate(pieces)
    return (ids.astype(np.uint16) if tokenizer.vocab_size <= 1 << 16 else ids), lengths, sum(len(t.encode()) for t in texts)


def _num_row_groups(path: Path) -> int:
    try:
        with pq.ParquetFile(path) as file:
            return file.num_row_groups
    except (pa.ArrowException, OSError) as e:
        raise ConfigError(f"{path}: cannot be read ({str(e).splitlines()[0]}); remove the corpus and build it again") from None
