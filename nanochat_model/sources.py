"""Where documents come from: the Python sources of this machine, or a user's parquet and jsonl files."""

from __future__ import annotations

import json
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat_model.errors import ConfigError
from nanochat_model.tasks.files import open_parquet, read_batches

TEXT_COLUMN = "text"
BUILTIN_SOURCES = ("stdlib", "site-packages")
SUFFIXES = (".parquet", ".jsonl")
_SITE_FOLDERS = {"site-packages", "dist-packages"}
_BATCH_DOCS = 256


@dataclass(frozen=True, kw_only=True)
class SourceFile:
    """One file of a source. `name` is its path below the source's root, with forward slashes."""

    path: Path
    name: str
    size: int
    mtime_ns: int


def list_source(source: str) -> list[SourceFile]:
    """Files of a source, sorted by name. Raises ConfigError when it is missing, holds no documents, or lacks the text column."""
    if source in BUILTIN_SOURCES:
        files = _python_files(source)
        if not files:
            raise ConfigError(
                f"source {source!r}: this interpreter has no .py files on disk; give a folder of parquet or jsonl instead"
            )
        return files
    root = Path(source)
    if not root.exists():
        raise ConfigError(
            f"corpus {source!r} does not exist; give {' or '.join(map(repr, BUILTIN_SOURCES))}, or a file or folder of parquet or "
            f"jsonl with a column {TEXT_COLUMN!r}"
        )
    if root.is_file():
        paths = [root] if root.suffix in SUFFIXES else []
    else:
        paths = [p for p in _walk(root, SUFFIXES) if not any(part.startswith(".") for part in p.relative_to(root).parts)]
    if not paths:
        raise ConfigError(f"corpus {source!r} holds no .parquet or .jsonl file; give a file or folder that does")
    base = root.parent if root.is_file() else root
    files = sorted((_source_file(p, base) for p in paths), key=lambda f: f.name)
    for f in files:
        if f.path.suffix == ".parquet":
            _open_parquet(f.path)
    return files


def read_texts(source: str, file: SourceFile) -> Iterator[str | None]:
    """Documents of one file in order; None for one that is not UTF-8 in a built-in source.

    Raises ConfigError naming file and row where a user's document is not UTF-8 or has no text.
    """
    if source in BUILTIN_SOURCES:
        try:
            yield file.path.read_bytes().decode("utf8")
        except UnicodeDecodeError:
            yield None
    elif file.path.suffix == ".parquet":
        yield from _parquet_texts(file.path)
    else:
        yield from _jsonl_texts(file.path)


def _python_files(source: str) -> list[SourceFile]:
    paths = sysconfig.get_paths()
    roots = [(Path(paths["stdlib"]), "stdlib")]
    if source == "site-packages":
        roots += [(Path(p), "site-packages") for p in sorted({paths["purelib"], paths["platlib"]})]
    files = []
    for root, label in roots:
        skip = _SITE_FOLDERS if label == "stdlib" else set()
        files += [_source_file(p, root, f"{label}/") for p in _walk(root, (".py",), skip)]
    return sorted(files, key=lambda f: f.name)


def _walk(root: Path, suffixes: tuple[str, ...], skip: set[str] | frozenset[str] = frozenset()) -> Iterator[Path]:
    for folder, folders, names in os.walk(root):
        folders[:] = [d for d in folders if d not in skip and d != "__pycache__"]
        yield from (Path(folder) / n for n in names if n.endswith(suffixes) and (Path(folder) / n).is_file())


def _source_file(path: Path, root: Path, prefix: str = "") -> SourceFile:
    stat = path.stat()
    return SourceFile(path=path, name=prefix + path.relative_to(root).as_posix(), size=stat.st_size, mtime_ns=stat.st_mtime_ns)


def _open_parquet(path: Path) -> pq.ParquetFile:
    file = open_parquet(path)
    names = file.schema_arrow.names
    if TEXT_COLUMN not in names:
        raise ConfigError(
            f"{path}: no column {TEXT_COLUMN!r}, only {', '.join(map(repr, names))}; rename the column that holds the documents"
        )
    kind = file.schema_arrow.field(TEXT_COLUMN).type
    if not (
        pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
    ):
        raise ConfigError(f"{path}: column {TEXT_COLUMN!r} is of type {kind}, not text; convert it to strings")
    return file


def _parquet_texts(path: Path) -> Iterator[str]:
    row = 0
    with _open_parquet(path) as file:
        for batch in read_batches(path, file, batch_size=_BATCH_DOCS, columns=[TEXT_COLUMN]):
            column = batch.column(0)
            kind = (
                pa.large_binary() if pa.types.is_large_string(column.type) or pa.types.is_large_binary(column.type) else pa.binary()
            )
            for value in column.cast(kind).to_pylist():
                yield _decode(value, f"{path}: row {row}")
                row += 1


def _jsonl_texts(path: Path) -> Iterator[str]:
    with path.open("rb") as f:
        for number, line in enumerate(f, 1):
            if not line.strip():
                continue
            where = f"{path}: line {number}"
            text = _decode(line, where)
            try:
                value = json.loads(text)
            except json.JSONDecodeError as e:
                raise ConfigError(f"{where}: not valid JSON at character {e.pos} (cut short?); mend or remove the line") from None
            if not isinstance(value, dict) or not isinstance(value.get(TEXT_COLUMN), str):
                raise ConfigError(f'{where}: no string field {TEXT_COLUMN!r}; each line must be like {{"text": "..."}}')
            document = value[TEXT_COLUMN]
            try:
                document.encode("utf8")
            except UnicodeEncodeError as e:
                raise ConfigError(
                    f"{where}: document is not UTF-8 (lone surrogate at character {e.start}); mend or remove the line"
                ) from None
            yield document


def _decode(value: bytes | None, where: str) -> str:
    if value is None:
        raise ConfigError(f"{where}: {TEXT_COLUMN!r} is null, a document must be text; fill or remove the row")
    try:
        return value.decode("utf8")
    except UnicodeDecodeError as e:
        raise ConfigError(f"{where}: document is not UTF-8 (byte {e.start}); convert or remove it") from None
