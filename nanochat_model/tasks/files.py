"""Rows of a dataset's files: parquet and jsonl, by themselves or in a folder of the hub's layout."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from nanochat_model.errors import ConfigError

SUFFIXES = (".parquet", ".jsonl")
_CHUNK_ROWS = 256


def dataset_folders(root: Path, repository: str) -> list[Path]:
    """Where a dataset of the hub may lie under `root`: org/name, org--name, name, or a hub cache's newest snapshot."""
    org, _, name = repository.partition("/")
    plain = [root / org / name, root / f"{org}--{name}", root / name]
    snapshots = [p for p in (root / f"datasets--{org}--{name}" / "snapshots").glob("*") if p.is_dir()]
    return [p for p in (*plain, *sorted(snapshots, key=lambda p: p.stat().st_mtime, reverse=True)) if p.is_dir()]


def split_files(folder: Path, subset: str, split: str) -> list[Path]:
    """Files of one split in a dataset's folder: <subset>/<split>-00000-of-00001.parquet, <subset>/<split>/0000.parquet,
    data/<split>-….parquet, <subset>/<split>.jsonl, and the same without <subset>. Sorted; empty where there are none."""
    bases = [folder / subset, folder / "data" / subset, folder / "data", folder] if subset else [folder / "data", folder]
    for base in bases:
        if not base.is_dir():
            continue
        within = [p for p in (base / split).iterdir() if p.suffix in SUFFIXES] if (base / split).is_dir() else []
        named = re.compile(rf"{re.escape(split)}([-._].*)?")
        beside = [p for p in base.iterdir() if p.is_file() and p.suffix in SUFFIXES and named.fullmatch(p.stem)]
        if within or beside:
            return sorted(within or beside)
    return []


def files_of(path: Path) -> list[Path]:
    """`path` itself, or the data files in a folder. ConfigError when there is none."""
    if not path.exists():
        raise ConfigError(f"{str(path)!r} does not exist; give a {' or '.join(SUFFIXES)} file, or a folder of them")
    files = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file()) if path.is_dir() else [path]
    if not files or files[0].suffix not in SUFFIXES:
        raise ConfigError(f"{str(path)!r} holds no {' or '.join(SUFFIXES)} file; give one, or a folder of them")
    return files


def read_rows(files: Sequence[Path]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, row) of every row of `files`, streamed. ConfigError names file, line or row, the rule and the remedy."""
    for file in files:
        yield from _parquet(file) if file.suffix == ".parquet" else _json_lines(file)


def count_rows(files: Sequence[Path]) -> int:
    """Rows of `files`, from the footers where they are parquet."""
    total = 0
    for file in files:
        if file.suffix == ".parquet":
            with open_parquet(file) as opened:
                total += opened.metadata.num_rows
        else:
            total += sum(1 for _ in _json_lines(file))
    return total


def _json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open("rb") as f:
        for number, line in enumerate(f, 1):
            if not line.strip():
                continue
            where = f"{path}: line {number}"
            try:
                value = json.loads(line.decode("utf8"))
            except UnicodeDecodeError as e:
                raise ConfigError(f"{where}: not UTF-8 (byte {e.start}); convert or remove the line") from None
            except json.JSONDecodeError as e:
                raise ConfigError(f"{where}: not valid JSON at character {e.pos} (cut short?); mend or remove the line") from None
            value = {"messages": value} if isinstance(value, list) else value
            if not isinstance(value, dict):
                raise ConfigError(f"{where}: not a JSON object; mend or remove the line")
            yield where, value


def open_parquet(path: Path) -> Any:
    """The ParquetFile at `path`. Raises ConfigError."""
    import pyarrow as pa  # only parquet needs it
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as e:
        raise _unreadable(path, e) from None


def read_batches(path: Path, file: Any, **options: Any) -> Iterator[Any]:
    """Record batches of an opened ParquetFile. Raises ConfigError where a page of it is damaged."""
    import pyarrow as pa

    try:
        yield from file.iter_batches(**options)
    except (pa.ArrowException, OSError) as e:
        raise _unreadable(path, e) from None


def _unreadable(path: Path, error: Exception) -> ConfigError:
    return ConfigError(f"{path}: not a readable parquet file ({str(error).splitlines()[0]}); replace or remove it")


def _parquet(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    row = 0
    with open_parquet(path) as file:
        for batch in read_batches(path, file, batch_size=_CHUNK_ROWS):
            for value in batch.to_pylist():
                if set(value) == {"train"} and isinstance(value["train"], dict):  # MMLU's auxiliary_train, nested by its authors
                    value = value["train"]
                yield f"{path}: row {row}", value
                row += 1
