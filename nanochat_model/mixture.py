"""Mixtures of conversations for fine-tuning: which sources, how often each, and which of them are held out.

A source is a known dataset (tasks/catalog.py) or a path of conversations or questions; every row of it becomes a conversation.
A row is held out by the hash of its content, before rows are repeated, so no conversation is on both sides. Order and number of
what is trained on depend on contents, epochs and seed alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nanochat_model.errors import ConfigError
from nanochat_model.identity import content_hash
from nanochat_model.packing import permutation
from nanochat_model.tasks.catalog import DATASETS, DEFAULT_TEMPLATE, read_problems, source_files
from nanochat_model.tasks.layouts import Template
from nanochat_model.tasks.problem import Problem

NANOCHAT = "nanochat"  # names its mixture among sources


@dataclass(frozen=True, kw_only=True)
class Source:
    """One part of a mixture. `data` names a known dataset or a path."""

    data: str
    split: str = ""  # of a known dataset; "": its training split
    epochs: float = 1.0  # passes over it in one pass over the mixture
    max_rows: int = 0  # the first so many; 0: all
    held_out: bool = False  # all of it is for validation

    def __post_init__(self) -> None:
        if not 0 < self.epochs < math.inf:
            raise ConfigError(f"source {self.data}: epochs {self.epochs} must be positive and finite")

    @classmethod
    def parse(cls, text: str, *, held_out: bool = False) -> Source:
        """ "NAME" or "NAME=EPOCHS", NAME being a dataset (NAME:SPLIT for a split of it) or a path."""
        data, sign, number = text.rpartition("=")
        if not sign:
            data, number = text, "1"
        try:
            epochs = float(number)
        except ValueError:
            data, epochs = text, 1.0  # an equals sign in a path
        name, colon, split = data.partition(":")
        if colon and name.lower() in DATASETS:
            return cls(data=name, split=split, epochs=epochs, held_out=held_out)
        return cls(data=data, epochs=epochs, held_out=held_out)

    @property
    def training_split(self) -> str:
        """The split to read: as given, else the dataset's own for training, or for evaluation where it is held out ("" for files).
        Raises ConfigError for a dataset that has none to train on."""
        dataset = DATASETS.get(self.data.lower())
        default = "" if dataset is None else dataset.eval_split if self.held_out else dataset.train_split
        split = self.split or default
        if dataset is not None and not split:
            raise ConfigError(f"{dataset.name} has no split to train on; name one as {dataset.name}:{dataset.eval_split}")
        return split


def parse_sources(given: Sequence[str | Source]) -> tuple[Source, ...]:
    """Sources of what a user gives: each a Source, a text for Source.parse, or "nanochat" for that mixture."""
    sources: list[Source] = []
    for item in given:
        if isinstance(item, Source):
            sources.append(item)
        elif item == NANOCHAT:
            sources += nanochat_mixture()
        else:
            sources.append(Source.parse(item))
    return tuple(sources)


def nanochat_mixture(*identity: str) -> tuple[Source, ...]:
    """SmolTalk, MMLU's auxiliary questions three times, GSM8K four times (nanochat chat_sft), and files of `identity`
    conversations twice; held out: SmolTalk's and part of MMLU's and GSM8K's test splits, as there."""
    return (
        Source(data="SmolTalk"),
        Source(data="MMLU", epochs=3),
        Source(data="GSM8K", epochs=4),
        *(Source(data=path, epochs=2) for path in identity),
        Source(data="SmolTalk", split="test", held_out=True),
        Source(data="MMLU", split="test", max_rows=5200, held_out=True),
        Source(data="GSM8K", split="test", max_rows=420, held_out=True),
    )


def weighted(sources: Sequence[tuple[Source, float]], rows: Sequence[int]) -> tuple[Source, ...]:
    """Epochs such that rows are seen in proportion to the weights and the scarcest source, relative to its weight, once.

    `rows`: rows of each source. Raises ConfigError for a weight that is not positive.
    """
    if any(not 0 < w < math.inf for _, w in sources):
        raise ConfigError("weights of a mixture must be positive and finite")
    total = min(n / w for (_, w), n in zip(sources, rows, strict=True))
    return tuple(
        Source(data=s.data, split=s.split, max_rows=s.max_rows, held_out=s.held_out, epochs=total * w / n)
        for (s, w), n in zip(sources, rows, strict=True)
    )


def read_source(source: Source, *, tasks_dir: str | Path = "", template: Template = DEFAULT_TEMPLATE) -> Iterator[Problem]:
    """Rows of one source, streamed."""
    files = source_files(source.data, tasks_dir=tasks_dir, split=source.training_split)
    for number, problem in enumerate(read_problems(files, template)):
        if source.max_rows and number >= source.max_rows:
            return
        yield problem


def is_held_out(messages: Sequence[object], val_fraction: float) -> bool:
    """Whether a conversation belongs to the validation part, by the hash of its content."""
    return int(content_hash(["split", list(messages)]), 16) / 16**16 < val_fraction


def repeats(num_rows: int, epochs: float, *key: object) -> np.ndarray:
    """Row numbers (int64) of `epochs` passes over `num_rows` rows: whole passes, and of the last, partial one a subset that
    depends on `key` alone."""
    whole = math.floor(epochs)
    part = round((epochs - whole) * num_rows)
    rest = np.sort(permutation(num_rows, "part of an epoch", *key)[:part])
    return np.concatenate([np.tile(np.arange(num_rows, dtype=np.int64), whole), rest]).astype(np.int64)
