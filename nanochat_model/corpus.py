"""Documents as parquet with a fixed train/validation split and without duplicates: `train/`, `val/` and corpus.json."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nanochat_model.artifacts import Progress, build_folder
from nanochat_model.errors import ConfigError
from nanochat_model.identity import HASH_LEN, content_hash, from_dict, write_atomic
from nanochat_model.sources import SourceFile, list_source, read_texts

SCHEMA_VERSION = 1
CORPUS_FILE = "corpus.json"
SPLITS = ("train", "val")
ROW_GROUP_BYTES = 4 << 20  # of text; the unit of work when tokenizing
FILE_BYTES = 256 << 20  # of text in one parquet file
PROGRESS_DOCS = 1000  # documents between reports
MAX_NAMES = 100  # of left-out documents in corpus.json


@dataclass(frozen=True, kw_only=True)
class CorpusInfo:
    """What corpus.json says. Bytes are UTF-8 bytes of text."""

    schema_version: int = SCHEMA_VERSION
    path: str = ""
    source: str
    fingerprint: str  # of the source's file names, sizes and times: an unchanged source is not read again
    hash: str  # of the documents, in order, and their split
    val_fraction: float
    num_docs: int
    num_bytes: int
    train_docs: int
    train_bytes: int
    val_docs: int
    val_bytes: int
    dropped: dict[str, int]  # documents left out: duplicate, empty, not_utf8
    left_out: tuple[str, ...] = ()  # names of those that are not UTF-8, the first 100
    files: dict[str, list[dict]] = field(default_factory=dict)  # split -> [{name, size, num_docs, num_bytes}]


def build_corpus(source: str, out_dir: str | Path, *, val_fraction: float = 0.05, progress: Progress | None = None) -> CorpusInfo:
    """Make (or find) the corpus of `source` in `out_dir`.

    `source`: "stdlib" (Python's standard library), "site-packages" (that and the installed packages), or a file or folder of
    parquet or jsonl with a text column. A document belongs to validation when the hash of its text is under `val_fraction`,
    so the split does not depend on order or on other documents. Raises ConfigError, with nothing written, on a source that is
    missing, empty or has a bad document, and when `out_dir` holds something else.
    """
    if not 0 < val_fraction < 1:
        raise ConfigError(f"val_fraction {val_fraction} must lie between 0 and 1, for example 0.05")
    out_dir = Path(out_dir)
    files = list_source(source)
    fingerprint = content_hash([SCHEMA_VERSION, source, val_fraction, [(f.name, f.size, f.mtime_ns) for f in files]])

    def existing() -> CorpusInfo | None:
        found = _find(out_dir)
        return found if found is not None and found.fingerprint == fingerprint else None

    found = existing()
    if found is not None:
        return found
    reader = _Reader(source, files, val_fraction, progress)
    if _find(out_dir) is None:
        return build_folder(out_dir, fingerprint, existing=existing, build=lambda work: _build(reader, work, fingerprint))
    return _check_unchanged(reader, out_dir, fingerprint)


def open_corpus(path: str | Path) -> CorpusInfo:
    """The corpus in a folder; ConfigError when there is none or a file is missing or of another size."""
    found = _find(Path(path))
    if found is None:
        raise ConfigError(f"no corpus at {path}; build one with `nanoladder data`")
    return found


def split_files(corpus: CorpusInfo, split: str) -> list[Path]:
    """Parquet files of a split, in order."""
    return [Path(corpus.path) / split / f["name"] for f in corpus.files[split]]


def iter_texts(corpus: CorpusInfo, split: str = "train") -> Iterator[str]:
    """Documents of a split in order, one row group in memory at a time."""
    for path in split_files(corpus, split):
        with pq.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                yield from file.read_row_group(group, columns=["text"]).column(0).to_pylist()


def training_texts(corpus: CorpusInfo, max_bytes: int = 512 << 20) -> Iterator[str]:
    """Documents of the training split to train a tokenizer on: all when they hold at most `max_bytes`, otherwise those whose
    text hashes under the fitting fraction (so the choice is spread evenly and repeatable)."""
    fraction = max_bytes / max(1, corpus.train_bytes)
    for text in iter_texts(corpus, "train"):
        if fraction >= 1 or _unit(hashlib.sha256(b"tokenizer" + text.encode()).digest()) < fraction:
            yield text


def _find(out_dir: Path) -> CorpusInfo | None:
    """The corpus in `out_dir`, None when the folder is missing or empty."""
    path = out_dir / CORPUS_FILE
    if not path.exists():
        if out_dir.exists() and any(out_dir.iterdir()):
            raise ConfigError(f"{out_dir} is not empty and holds no {CORPUS_FILE}; choose another folder or remove it")
        return None
    try:
        data = json.loads(path.read_text(encoding="utf8"))
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise ConfigError(f"{path}: not valid JSON (cut short?); remove {out_dir} and build the corpus again") from None
    if not isinstance(data, dict) or data.get("schema_version") != SCHEMA_VERSION:
        raise ConfigError(f"{path}: another schema than {SCHEMA_VERSION}; remove {out_dir} and build the corpus again")
    info = dataclasses.replace(from_dict(CorpusInfo, data, f"{path}: "), path=str(out_dir.absolute()))
    for split in SPLITS:
        for f in info.files[split]:
            file = out_dir / split / f["name"]
            size = file.stat().st_size if file.exists() else None
            if size != f["size"]:
                state = "is missing" if size is None else f"has {size} bytes, {CORPUS_FILE} says {f['size']}"
                raise ConfigError(f"{file} {state}; remove {out_dir} and build the corpus again")
    return info


def _check_unchanged(reader: _Reader, out_dir: Path, fingerprint: str) -> CorpusInfo:
    """The source looks touched: it is read again, and the corpus stays if the documents are the same."""
    old = open_corpus(out_dir)
    for _ in reader.documents():
        pass
    if reader.hash != old.hash:
        raise ConfigError(
            f"{out_dir} already holds corpus {old.hash} (source {old.source!r}, val_fraction {old.val_fraction}), not the one "
            f"asked for (source {reader.source!r}, val_fraction {reader.val_fraction}); choose another folder or remove this one"
        )
    info = dataclasses.replace(old, fingerprint=fingerprint)
    _save(info, out_dir)
    return info


def _build(reader: _Reader, work: Path, fingerprint: str) -> None:
    writers = {split: _SplitWriter(work / split) for split in SPLITS}
    for data, split in reader.documents():
        writers[split].add(data)
    for writer in writers.values():
        writer.close()
    train, val = writers["train"], writers["val"]
    total = train.num_docs + val.num_docs
    if total < 2:
        raise ConfigError(
            f"corpus {reader.source!r} holds {total} documents after dropping {reader.dropped}; at least 2 are needed"
        )
    if not train.num_docs:
        raise ConfigError(
            f"corpus {reader.source!r}: all {total} documents fall to validation; lower val_fraction {reader.val_fraction}"
        )
    if not val.num_docs:
        raise ConfigError(
            f"corpus {reader.source!r}: none of its {total} documents falls to validation at val_fraction {reader.val_fraction}; "
            f"give more documents or a val_fraction of at least {math.ceil(reader.smallest * 1000 + 1) / 1000}"
        )
    info = CorpusInfo(
        source=reader.source, fingerprint=fingerprint, hash=reader.hash, val_fraction=reader.val_fraction,
        num_docs=total, num_bytes=train.num_bytes + val.num_bytes, train_docs=train.num_docs, train_bytes=train.num_bytes,
        val_docs=val.num_docs, val_bytes=val.num_bytes, dropped=reader.dropped, left_out=tuple(reader.left_out[:MAX_NAMES]),
        files={split: writers[split].files for split in SPLITS},
    )  # fmt: skip
    _save(info, work)


def _save(info: CorpusInfo, folder: Path) -> None:
    data = dataclasses.asdict(info)
    del data["path"]
    write_atomic(folder / CORPUS_FILE, json.dumps(data, indent=1))


class _Reader:
    """Reads a source once: its kept documents with their split, and what was left out."""

    def __init__(self, source: str, files: list[SourceFile], val_fraction: float, progress: Progress | None) -> None:
        self.source, self.val_fraction = source, val_fraction
        self.dropped = {"duplicate": 0, "empty": 0, "not_utf8": 0}
        self.left_out: list[str] = []
        self.smallest = 1.0  # hash of a kept document, in 0..1
        self._files, self._progress, self._digest = files, progress, hashlib.sha256()

    @property
    def hash(self) -> str:
        """Of the documents read so far, in order, and their split."""
        return self._digest.hexdigest()[:HASH_LEN]

    def documents(self) -> Iterator[tuple[bytes, str]]:
        """Every kept document as UTF-8, and its split."""
        seen = _SeenHashes()
        for file, text in self._texts():
            if text is None:
                self.dropped["not_utf8"] += 1
                self.left_out.append(file.name)
                continue
            data = text.encode()
            key = hashlib.sha256(data).digest()
            if not text.strip():
                self.dropped["empty"] += 1
            elif not seen.add(int.from_bytes(key[:8], "big")):
                self.dropped["duplicate"] += 1
            else:
                self.smallest = min(self.smallest, _unit(key))
                split = "val" if _unit(key) < self.val_fraction else "train"
                self._digest.update(split.encode() + key)
                yield data, split

    def _texts(self) -> Iterator[tuple[SourceFile, str | None]]:
        """Every document with its file; reports progress in bytes of the files (of text, where that is less)."""
        total, done = sum(f.size for f in self._files), 0
        for file in self._files:
            read = 0
            for number, text in enumerate(read_texts(self.source, file), 1):
                yield file, text
                read += len(text or "")
                if self._progress is not None and number % PROGRESS_DOCS == 0:
                    self._progress(done + min(read, file.size), total)
            done += file.size
            if self._progress is not None:
                self._progress(done, total)


def _unit(digest: bytes) -> float:
    """A digest as a number in 0..1."""
    return int.from_bytes(digest[:8], "big") / 2**64


class _SeenHashes:
    """A set of 64-bit hashes at 8 bytes each (a Python set takes ten times that): recent ones in a set, older ones in sorted
    arrays of doubling length."""

    def __init__(self, recent: int = 1 << 20) -> None:
        self._limit = recent
        self._recent: set[int] = set()
        self._runs: list[np.ndarray] = []

    def add(self, key: int) -> bool:
        """Whether `key` is new; remembers it."""
        if key in self._recent:
            return False
        for run in self._runs:
            at = int(np.searchsorted(run, np.uint64(key)))
            if at < len(run) and int(run[at]) == key:
                return False
        self._recent.add(key)
        if len(self._recent) >= self._limit:
            self._runs.append(np.sort(np.fromiter(self._recent, np.uint64, len(self._recent))))
            self._recent = set()
            while len(self._runs) > 1 and len(self._runs[-2]) <= len(self._runs[-1]):
                last = self._runs.pop()
                self._runs[-1] = np.sort(np.concatenate([self._runs[-1], last]), kind="stable")
        return True


class _SplitWriter:
    """Parquet files of one split, of bounded size, written as the documents come."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._folder.mkdir()
        self._writer: pq.ParquetWriter | None = None
        self._buffer: list[bytes] = []
        self._buffered = 0
        self.files: list[dict] = []
        self.num_docs = 0
        self.num_bytes = 0

    def add(self, data: bytes) -> None:
        self._buffer.append(data)
        self._buffered += len(data)
        if self._buffered >= ROW_GROUP_BYTES:
            self._flush()

    def _flush(self) -> None:
        if not self._buffer:
            return
        table = pa.table({"text": pa.array(self._buffer, pa.large_binary()).cast(pa.large_string())})
        if self._writer is None:
            name = f"{len(self.files):05d}.parquet"
            self._writer = pq.ParquetWriter(self._folder / name, table.schema, compression="zstd", compression_level=3)
            self.files.append({"name": name, "size": 0, "num_docs": 0, "num_bytes": 0})
        self._writer.write_table(table, row_group_size=len(self._buffer))
        entry = self.files[-1]
        entry["num_docs"] += len(self._buffer)
        entry["num_bytes"] += self._buffered
        self.num_docs += len(self._buffer)
        self.num_bytes += self._buffered
        self._buffer, self._buffered = [], 0
        if entry["num_bytes"] >= FILE_BYTES:
            self._close_file()

    def _close_file(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self.files[-1]["size"] = (self._folder / self.files[-1]["name"]).stat().st_size
            self._writer = None

    def close(self) -> None:
        self._flush()
        self._close_file()
