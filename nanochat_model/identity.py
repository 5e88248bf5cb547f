"""Content hashes and JSON for frozen dataclasses: one way to turn a config into text and back."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import tempfile
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from nanochat_model.config import TrainConfig
from nanochat_model.errors import ConfigError

T = TypeVar("T")
HASH_LEN = 16  # hex digits: 64 bits, collisions below 1e-9 up to 100,000 runs
NOT_IDENTITY = ("data.path", "eval.every_steps")  # of a config: they determine no result, and may differ when a run is run again


def canonical_json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def content_hash(value: Any) -> str:
    """First 16 hex digits of the SHA-256 of the canonical JSON of `value`."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:HASH_LEN]


def run_id(config: TrainConfig) -> str:
    """Hash of what determines the result; not of where the data lies, the devices or the micro-batch."""
    fields = dataclasses.asdict(config)
    for key in NOT_IDENTITY:
        section, name = key.split(".")
        del fields[section][name]
    return content_hash(fields)


def from_dict(cls: type[T], data: Mapping[str, Any], where: str = "") -> T:
    """Build dataclass `cls` from plain data; an unknown or missing key is a ConfigError that names it."""
    hints = typing.get_type_hints(cls)
    names = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(set(data) - names)
    if unknown:
        raise ConfigError(f"unknown field {where + unknown[0]!r}; known: {', '.join(sorted(names))}")
    values = {k: _convert(hints[k], v, f"{where}{k}.") for k, v in data.items()}
    try:
        return cls(**values)
    except TypeError as e:
        raise ConfigError(f"{where or cls.__name__}: {e}") from None


def _convert(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        return from_dict(typing.cast(type, hint), value, where)
    if typing.get_origin(hint) is tuple and isinstance(value, list):
        item = typing.get_args(hint)[0]
        return tuple(_convert(item, v, where) for v in value)
    if typing.get_origin(hint) in (typing.Union, types.UnionType) and value is not None:
        inner = [a for a in typing.get_args(hint) if a is not type(None)]
        return _convert(inner[0], value, where) if len(inner) == 1 else value
    return value


def write_atomic(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file so that a reader, or a crash, sees the old content or the new, never a part."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    fd, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(fd, "w", encoding="utf8") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
