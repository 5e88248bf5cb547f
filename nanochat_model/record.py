"""The record of one finished run: the truth that laws are fitted to. Plain JSON, versioned, written atomically."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from nanochat_model.config import TrainConfig
from nanochat_model.errors import ConfigError
from nanochat_model.identity import content_hash, from_dict, write_atomic

SCHEMA_VERSION = 1
RECORD_FILE = "record.json"
Status = Literal["complete", "failed", "stopped"]


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """One evaluation: where it was taken on the three axes, and what was seen."""

    step: int
    num_tokens: int
    train_flops: float
    seconds: float  # of training so far, evaluation and saving left out
    val_bpb: float
    train_loss: float | None = None  # nats a token, smoothed


# Measurements as equally long lists: "step" (steps done), and one list a metric, None where it was not finite or not measured.
Columns = dict[str, list[Any]]
MOST_MEASUREMENTS = 64  # beyond, every second is dropped: a plot needs no more, and records stay small


def add_measurement(columns: Columns, step: int, metrics: Mapping[str, float]) -> None:
    """Append a row to `columns`, to 4 digits."""
    steps = columns.setdefault("step", [])
    for name in dict.fromkeys((*columns, *metrics)):
        if name != "step":
            value = metrics.get(name, math.nan)
            column = columns.setdefault(name, [None] * len(steps))
            column.append(float(f"{value:.4g}") if math.isfinite(value) else None)
    steps.append(step)
    if len(steps) > MOST_MEASUREMENTS:
        for column in columns.values():
            del column[-2::-2]  # the newest stays


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """Everything about one run that a law, a comparison or a bill needs."""

    schema_version: int = SCHEMA_VERSION
    run_id: str
    kind: Literal["base", "sft"] = "base"  # a fine-tuning is no point of a scaling law
    status: Status
    name: str = ""
    sweep: str = ""
    stage: str = ""
    tags: dict[str, str] = field(default_factory=dict)
    config: TrainConfig
    seed: int
    params: dict[str, int]  # ParamCounts.as_dict()
    num_tokens: int
    flops_per_token: int
    train_flops: float
    curve: tuple[CurvePoint, ...] = ()
    val_bpb: float | None = None
    core: float | None = None
    error: str | None = None
    attempts: int = 1
    backend: str = "process"  # process, actor, train
    device: str = ""
    num_devices: int = 1
    peak_flops_per_device: float | None = None  # the denominator of mfu; null: unknown
    mfu: float | None = None
    tokens_per_second: float | None = None
    train_seconds: float = 0.0
    total_seconds: float = 0.0
    micro_batch_rows: int = 0  # rows of one forward pass on one device; 0: not known
    peak_memory_bytes: float | None = None  # of one accelerator, as torch's allocator counts it
    # Of the process that ended the run, mean seconds of a step by part (data, compute, wait for slower ranks, communication,
    # optimizer) over the steps that were timed, and each rank's part of it that is compute; {} and () where none was.
    step_seconds: dict[str, float] = field(default_factory=dict)
    rank_compute_seconds: tuple[float, ...] = ()
    # Of that process, seconds until its first step was done: process (CPU seconds before the run, where it is the process's
    # first: interpreter, imports), build (model, optimizer, data), first_step (compilation).
    startup_seconds: dict[str, float] = field(default_factory=dict)
    diagnostics: Columns = field(default_factory=dict)  # of runtime.diagnostics_every_steps: see nanochat_model.diagnostics
    out_of_memory: tuple[str, ...] = ()  # one line for each time that memory ran out and the micro-batch was halved
    git_commit: str = ""
    parents: dict[str, str] = field(default_factory=dict)  # name of the artifact -> content hash
    started_at: str = ""  # ISO 8601, UTC
    finished_at: str = ""

    @property
    def comparable_hash(self) -> str:
        """Runs whose validation set, packing or sequence length differ are not comparable."""
        c = self.config
        return content_hash([c.data.manifest_hash, c.data.packing, c.model.sequence_len, c.eval.num_tokens])

    def to_json(self) -> str:
        return json.dumps({**dataclasses.asdict(self), "comparable_hash": self.comparable_hash}, indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str, where: str = "record") -> RunRecord:
        """Parse a record; ConfigError names `where`, the rule broken and the remedy."""
        try:
            data = json.loads(text)
        except json.JSONDecodeError as e:
            raise ConfigError(
                f"{where}: not valid JSON at character {e.pos} of {len(text)} (cut short?); delete it to run that trial again"
            ) from None
        if not isinstance(data, dict) or data.get("schema_version") != SCHEMA_VERSION:
            found = data.get("schema_version") if isinstance(data, dict) else type(data).__name__
            raise ConfigError(
                f"{where}: record schema {found!r}, this version reads {SCHEMA_VERSION}; use the release that wrote it"
            )
        data.pop("comparable_hash", None)
        return from_dict(cls, data, f"{where}: ")

    def save(self, folder: str | Path) -> Path:
        path = Path(folder) / RECORD_FILE
        write_atomic(path, self.to_json())
        return path

    @classmethod
    def load(cls, folder: str | Path) -> RunRecord:
        """The record of a run's folder (or a record's file). Raises ConfigError when it is missing or broken."""
        path = Path(folder)
        path = path / RECORD_FILE if path.is_dir() else path
        try:
            text = path.read_text(encoding="utf8")
        except FileNotFoundError:
            raise ConfigError(f"no run record at {path}; give a run's folder or its {RECORD_FILE}") from None
        except UnicodeDecodeError:
            raise ConfigError(f"{path}: not UTF-8 text; delete it to run that trial again") from None
        return cls.from_json(text, str(path))
