"""Token shards: flat files of token ids with document offsets beside them, and a manifest that names and vouches for them.

Every document is stored as BOS followed by its ids, in corpus order. Layout of a folder: manifest.json, the tokenizer's JSON,
token_bytes.npy, and per split files {split}_{number}.bin (uint16, or uint32 over 65536 ids; little-endian) each with a
{split}_{number}.offsets.npy (int64 (docs + 1,): where each document begins, and the end).
"""

from __future__ import annotations

import json
import mmap
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nanochat_model.artifacts import sha256_file
from nanochat_model.config import DataConfig, Packing
from nanochat_model.errors import ConfigError
from nanochat_model.identity import content_hash

if TYPE_CHECKING:
    from nanochat_model.tokenizer import Tokenizer

SCHEMA_VERSION = 1
MANIFEST_FILE = "manifest.json"
TOKEN_BYTES_FILE = "token_bytes.npy"


@dataclass(frozen=True, kw_only=True)
class ShardFile:
    """One file of tokens."""

    tokens_path: Path
    offsets_path: Path
    num_docs: int
    num_tokens: int  # BOS included
    num_bytes: int  # of text


class ShardSet:
    """An opened folder of shards. Opening checks names and sizes; `verify` reads everything and checks the hashes."""

    def __init__(self, path: Path, manifest: dict) -> None:
        self.path = path
        self.manifest = manifest
        self.manifest_hash: str = manifest["hash"]
        self.corpus_hash: str = manifest["corpus_hash"]
        self.tokenizer_hash: str = manifest["tokenizer_hash"]
        self.vocab_size: int = manifest["vocab_size"]
        self.bos_id: int = manifest["bos_id"]
        self.window_tokens: int = manifest["window_tokens"]
        self.dtype = np.dtype(manifest["dtype"])
        self._maps: dict[tuple[str, int], np.ndarray] = {}
        self._files = {
            split: [
                ShardFile(
                    tokens_path=path / f["tokens"]["name"], offsets_path=path / f["offsets"]["name"], num_docs=f["num_docs"],
                    num_tokens=f["num_tokens"], num_bytes=f["num_bytes"],
                ) for f in entry["files"]
            ] for split, entry in manifest["splits"].items()
        }  # fmt: skip

    @classmethod
    def open(cls, path: str | Path) -> ShardSet:
        """Raises ConfigError that names a missing, torn or foreign file."""
        path = Path(path)
        manifest = read_manifest(path)
        if manifest is None:
            raise ConfigError(f"no token shards at {path} ({MANIFEST_FILE} is missing); build them with `nanoladder data`")
        for entry in _named_files(manifest):
            file = path / entry["name"]
            size = file.stat().st_size if file.exists() else None
            if size != entry["size"]:
                state = "is missing" if size is None else f"has {size} bytes, the manifest says {entry['size']} (cut short?)"
                raise ConfigError(f"{file} {state}; remove {path} and build the shards again")
        return cls(path, manifest)

    def verify(self) -> None:
        """Read every file and compare its SHA-256 with the manifest's. Raises ConfigError naming the first that differs."""
        for entry in _named_files(self.manifest):
            if sha256_file(self.path / entry["name"]) != entry["sha256"]:
                raise ConfigError(
                    f"{self.path / entry['name']}: content is not what the manifest vouches for; remove {self.path} and build again"
                )

    def files(self, split: str) -> list[ShardFile]:
        return self._files[split]

    def num_tokens(self, split: str = "train") -> int:
        """Tokens of a split, one BOS a document included."""
        return self.manifest["splits"][split]["num_tokens"]

    def num_docs(self, split: str = "train") -> int:
        return self.manifest["splits"][split]["num_docs"]

    def num_bytes(self, split: str = "train") -> int:
        """UTF-8 bytes of a split's text."""
        return self.manifest["splits"][split]["num_bytes"]

    @property
    def bytes_per_token(self) -> float:
        """Bytes of training text a token, BOS not counted."""
        return self.num_bytes("train") / (self.num_tokens("train") - self.num_docs("train"))

    @cached_property
    def token_bytes(self) -> np.ndarray:
        """Bytes of text of each id, int32 (V,); 0 for special tokens."""
        return np.load(self.path / TOKEN_BYTES_FILE, allow_pickle=False)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        from nanochat_model.tokenizer import Tokenizer  # a trial that only reads tokens need not load it

        return Tokenizer.load(self.path)

    def tokens(self, split: str, file: int) -> np.ndarray:
        """Tokens of one file, memory-mapped, (num_tokens,) of `dtype`."""
        key = (split, file)
        if key not in self._maps:
            path = self._files[split][file].tokens_path
            with path.open("rb") as f:
                mapped = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
            if hasattr(mmap, "MADV_WILLNEED"):  # rows are read in random order: have the whole file read ahead instead
                mapped.madvise(mmap.MADV_WILLNEED)
            self._maps[key] = np.frombuffer(mapped, self.dtype)  # a plain array: slicing np.memmap costs several times as much
        return self._maps[key]

    def offsets(self, split: str, file: int) -> np.ndarray:
        """Where each document of a file begins, and the end: int64 (num_docs + 1,)."""
        return np.load(self._files[split][file].offsets_path, allow_pickle=False)

    def data_config(self, packing: Packing) -> DataConfig:
        return DataConfig(
            path=str(self.path.absolute()), manifest_hash=self.manifest_hash, tokenizer_hash=self.tokenizer_hash, packing=packing
        )

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_maps": {}}  # maps are made anew in the process that unpickles


def manifest_hash(manifest: dict) -> str:
    return content_hash({k: v for k, v in manifest.items() if k != "hash"})


def read_manifest(path: Path) -> dict | None:
    """The checked manifest of a folder, or None when the folder has none. Raises ConfigError on a broken or changed one."""
    file = path / MANIFEST_FILE
    try:
        manifest = json.loads(file.read_text(encoding="utf8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise ConfigError(f"{file}: not valid JSON (cut short?); remove {path} and build the shards again") from None
    found = manifest.get("schema_version") if isinstance(manifest, dict) else type(manifest).__name__
    if found != SCHEMA_VERSION:
        raise ConfigError(f"{file}: manifest schema {found!r}, this version reads {SCHEMA_VERSION}; build the shards again")
    if manifest.get("hash") != manifest_hash(manifest):
        raise ConfigError(f"{file}: was changed after it was written (its hash differs); remove {path} and build the shards again")
    return manifest


def _named_files(manifest: dict) -> list[dict]:
    files = [f[kind] for split in manifest["splits"].values() for f in split["files"] for kind in ("tokens", "offsets")]
    return [*files, manifest["token_bytes"]]


def file_entry(path: Path) -> dict:
    """Name, size and SHA-256 of a finished file, which is first forced to disk."""
    with path.open("rb") as f:
        os.fsync(f.fileno())
    return {"name": path.name, "size": path.stat().st_size, "sha256": sha256_file(path)}
