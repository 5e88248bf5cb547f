"""Prepared conversations: a mixture rendered once into a folder that every rank and every run of a sweep maps into memory.

    <root>/<hash>/
        manifest.json                       what it was made from, counts by source
        train/ val/  ids.bin learned.bin lengths.bin       int32, bool, int64
        order.bin                           int64: the rows of one pass over the training part

The hash is that of what determines the content: the files' bytes, the sources' settings, tokenizer, template, fraction held out
and seed. It goes into a run's identity as data.manifest_hash.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from nanochat_model.artifacts import build_folder, sha256_file
from nanochat_model.config import DataConfig
from nanochat_model.conversation_set import ConversationSet
from nanochat_model.conversations import render_conversation
from nanochat_model.errors import ConfigError
from nanochat_model.identity import content_hash, write_atomic
from nanochat_model.mixture import Source, is_held_out, read_source, repeats
from nanochat_model.tasks.catalog import DEFAULT_TEMPLATE, source_files
from nanochat_model.tasks.layouts import Template
from nanochat_model.tokenizer import Tokenizer

MANIFEST = "manifest.json"
SCHEMA_VERSION = 1
_ARRAYS = (("ids", np.int32), ("learned", np.bool_), ("lengths", np.int64))
Report = Callable[[str, int], None]  # (source, rows done)


@dataclass(frozen=True, kw_only=True)
class SourceCounts:
    """What came of one source."""

    data: str
    split: str
    epochs: float
    num_train: int  # different conversations
    num_val: int
    num_seen: int  # in one pass, repeats counted


@dataclass(frozen=True, kw_only=True)
class SFTData:
    """A prepared folder, opened."""

    folder: Path
    hash: str
    tokenizer_hash: str
    train: ConversationSet
    val: ConversationSet
    sources: tuple[SourceCounts, ...]

    @classmethod
    def open(cls, folder: str | Path, tokenizer: Tokenizer) -> SFTData:
        """Raises ConfigError when it is missing, broken, or made with another tokenizer."""
        folder = Path(folder)
        try:
            manifest = json.loads((folder / MANIFEST).read_text(encoding="utf8"))
        except (OSError, ValueError):
            raise ConfigError(f"no prepared conversations at {folder}; prepare them again") from None
        if manifest.get("schema_version") != SCHEMA_VERSION:
            raise ConfigError(f"{folder / MANIFEST}: another schema than {SCHEMA_VERSION}; prepare the conversations again")
        if manifest["tokenizer_hash"] != tokenizer.hash:
            raise ConfigError(
                f"{folder} was rendered by tokenizer {manifest['tokenizer_hash']}, the model has {tokenizer.hash}; prepare it again"
            )
        order = np.fromfile(folder / "order.bin", np.int64)
        parts = {
            part: _open_part(folder / part, tokenizer.bos_id, f"{manifest['hash']}-{part}", order if part == "train" else None)
            for part in ("train", "val")
        }
        counts = tuple(SourceCounts(**s) for s in manifest["sources"])
        return cls(folder=folder, hash=manifest["hash"], tokenizer_hash=tokenizer.hash, sources=counts, **parts)

    @property
    def data_config(self) -> DataConfig:
        return DataConfig(
            path=str(self.folder.absolute()), manifest_hash=self.hash, tokenizer_hash=self.tokenizer_hash, packing="best_fit"
        )


def prepare(
    sources: Sequence[Source],
    tokenizer: Tokenizer,
    root: str | Path,
    *,
    tasks_dir: str | Path = "",
    val_fraction: float = 0.1,
    seed: int = 0,
    template: Template = DEFAULT_TEMPLATE,
    report: Report | None = None,
) -> SFTData:
    """Render `sources` into a folder of `root` named by their hash, or open the one that is there.

    With a held-out source, the others are trained on whole; without, `val_fraction` of every source is held out by content.
    Raises ConfigError on missing files, unfit rows, or when one of the two parts would be empty.
    """
    if not sources:
        raise ConfigError("no conversations given; name a file, a folder or a dataset")
    files = [source_files(s.data, tasks_dir=tasks_dir, split=s.training_split) for s in sources]
    settings = [
        {**asdict(replace(s, data="")), "split": "", "files": [sha256_file(f) for f in fs]}
        for s, fs in zip(sources, files, strict=True)
    ]
    held_out = any(s.held_out for s in sources)
    identity = content_hash([SCHEMA_VERSION, settings, tokenizer.hash, asdict(template), None if held_out else val_fraction, seed])
    folder = Path(root) / identity

    def existing() -> SFTData | None:
        return SFTData.open(folder, tokenizer) if (folder / MANIFEST).is_file() else None

    def build(work: Path) -> None:
        _Writer(work, tokenizer, 0.0 if held_out else val_fraction, report).write(
            sources, tasks_dir, template, seed, {"schema_version": SCHEMA_VERSION, "hash": identity}
        )

    return build_folder(folder, identity, existing=existing, build=build)


class _Writer:
    """Streams rendered conversations into a folder."""

    def __init__(self, work: Path, tokenizer: Tokenizer, val_fraction: float, report: Report | None) -> None:
        self._work, self._tokenizer, self._val_fraction = work, tokenizer, val_fraction
        self._report = report or (lambda source, rows: None)
        self._open: dict[str, dict[str, BinaryIO]] = {}
        self._rows = {"train": 0, "val": 0}

    def write(
        self, sources: Sequence[Source], tasks_dir: str | Path, template: Template, seed: int, manifest: dict[str, Any]
    ) -> None:
        counts: list[SourceCounts] = []
        order: list[np.ndarray] = []
        for part in self._rows:
            (self._work / part).mkdir()
            self._open[part] = {name: (self._work / part / f"{name}.bin").open("wb") for name, _ in _ARRAYS}
        try:
            for number, source in enumerate(sources):
                first = dict(self._rows)
                self._write_source(source, tasks_dir, template)
                new = {part: self._rows[part] - first[part] for part in self._rows}
                seen = repeats(new["train"], source.epochs, seed, number)
                order.append(first["train"] + seen)
                counts.append(
                    SourceCounts(
                        data=source.data,
                        split=source.training_split,
                        epochs=source.epochs,
                        num_train=new["train"],
                        num_val=new["val"],
                        num_seen=len(seen),
                    )
                )
        finally:
            for files in self._open.values():
                for file in files.values():
                    file.close()
        rows = np.concatenate(order)
        if not len(rows) or not self._rows["val"]:
            raise ConfigError(
                f"{', '.join(s.data for s in sources)}: {len(rows)} conversations to train on and {self._rows['val']} held out at "
                f"val_fraction {self._val_fraction}; give more conversations or another fraction"
            )
        rows.tofile(self._work / "order.bin")
        manifest |= {"tokenizer_hash": self._tokenizer.hash, "sources": [asdict(c) for c in counts]}
        write_atomic(self._work / MANIFEST, json.dumps(manifest, indent=1))

    def _write_source(self, source: Source, tasks_dir: str | Path, template: Template) -> None:
        for number, problem in enumerate(read_source(source, tasks_dir=tasks_dir, template=template), 1):
            held_out = source.held_out or is_held_out(problem.messages, self._val_fraction)
            part = "val" if held_out else "train"
            rendered = render_conversation(problem.conversation, self._tokenizer)
            files = self._open[part]
            files["ids"].write(rendered.ids.astype(np.int32).tobytes())
            files["learned"].write(rendered.mask.astype(np.bool_).tobytes())
            files["lengths"].write(np.int64(len(rendered.ids)).tobytes())
            self._rows[part] += 1
            if number % 1000 == 0:
                self._report(source.data, number)


def _open_part(folder: Path, bos_id: int, name: str, order: np.ndarray | None) -> ConversationSet:
    arrays: dict[str, np.ndarray] = {}
    for key, dtype in _ARRAYS:
        path = folder / f"{key}.bin"
        arrays[key] = np.memmap(path, dtype, mode="r") if path.stat().st_size else np.zeros(0, dtype)
    lengths = np.array(arrays["lengths"])
    if int(lengths.sum()) != len(arrays["ids"]) or len(arrays["ids"]) != len(arrays["learned"]):
        raise ConfigError(f"{folder}: its files do not fit each other (cut short?); remove {folder.parent} and prepare it again")
    return ConversationSet(ids=arrays["ids"], mask=arrays["learned"], lengths=lengths, bos_id=bos_id, hash=name, order=order)
