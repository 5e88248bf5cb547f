"""nanoladder train, sweep and runs: make records, and look at them."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import tyro

from nanochat_model import train_cli
from nanochat_model.errors import ConfigError
from nanochat_model.record import RunRecord
from nanochat_model.step_shares import PARTS
from nanoladder.cli.common import Json, Storage, duration, human, print_json, print_table
from nanoladder.workspace import Workspace


@dataclass(frozen=True, kw_only=True)
class Train(train_cli.Arguments):
    """One pretraining run in this process (or one rank of torchrun), without Ray.

    Example: nanoladder train --storage runs --depth 2 --head-dim 32 --sequence-len 256 --window-pattern L --packing keep_remainder
    """

    shards: tyro.conf.Positional[str] = ""
    """Folder of token shards; default: those of the storage root."""
    storage: Storage = "runs"

    def run(self) -> int:
        from nanochat_model.identity import run_id

        root = Workspace(self.storage)
        args = replace(self, shards=self.shards or str(root.shards_dir))
        config, _ = train_cli.resolve_run(args)
        args = replace(args, run_dir=args.run_dir or str(root.run_dir(run_id(config))))
        record = train_cli.run(args)
        return 1 if record is not None and record.status == "failed" else 0


class SweepCommand:
    """usage: nanoladder sweep FILE [OPTIONS]

    Run a sweep file (one that defines SWEEP, a Sweep or a Ladder) on Ray; the same as `python FILE`. What is recorded is skipped.

    Example: nanoladder sweep sweeps/wd_d12.py --dry-run

    nanoladder sweep FILE --help lists the options.
    """

    @classmethod
    def run_file(cls, argv: Sequence[str]) -> int:
        """Run the sweep of the file `argv[0]` with the other arguments."""
        if not argv or argv[0] in ("-h", "--help"):
            print(inspect.cleandoc(cls.__doc__ or ""))
            return 0 if argv else 2
        from nanoladder.sweep_command import load_sweep, run_sweep

        return int(run_sweep(load_sweep(argv[0]), list(argv[1:])) or 0)


@dataclass(frozen=True, kw_only=True)
class Runs:
    """Table of the run records under a storage root, best first. Exit status 1 when a record cannot be read.

    Example: nanoladder runs --storage demo --sweep demo_isoflop --limit 10
    """

    storage: Storage = "runs"
    sweep: str = ""
    """Only this sweep's."""
    limit: int = 0
    """Only the first so many; 0: all."""
    times: bool = False
    """Where the time went: parts of a step, the slowest rank, the first step."""
    sort: str = "val_bpb"
    """A column to sort by."""
    json: Json = False

    def run(self) -> int:
        import sys

        if self.limit < 0:
            raise ConfigError(f"limit {self.limit} must be 0 (all) or more")
        root = Workspace(self.storage)
        records, broken = root.read_records(sweep=self.sweep)
        rows = sorted((run_facts(r) for r in records), key=lambda row: _sort_key(row, self.sort))
        rows = rows[: self.limit] if self.limit else rows
        if self.json:
            print_json({"runs": rows, "broken": broken})
        elif rows:
            columns, written = (TIME_COLUMNS, format_times) if self.times else (COLUMNS, format_row)
            print_table(columns, [written(row) for row in rows], right=columns[3:])
        else:
            print(f"no run records under {root.remote or root.root}")
        for line in broken:
            print(f"nanoladder: {line}", file=sys.stderr)
        return 1 if broken else 0


COLUMNS = (
    "run",
    "sweep",
    "status",
    "d",
    "width",
    "N",
    "D",
    "batch",
    "matrix lr",
    "decay",
    "seed",
    "FLOPs",
    "bpb",
    "time",
    "tokens/s",
)

TIME_COLUMNS = ("run", "sweep", "status", "ranks", "N", "time", "tokens/s", "MFU", "first step", *PARTS, "slowest rank")


def run_facts(record: RunRecord) -> dict[str, Any]:
    """The columns of one run, and what a machine may want besides."""
    config = record.config
    return {
        "run_id": record.run_id,
        "kind": record.kind,
        "name": record.name,
        "sweep": record.tags.get("sweeps", record.sweep),
        "stage": record.stage,
        "status": record.status,
        "error": record.error,
        "depth": config.model.depth,
        "model_dim": config.model.model_dim,
        "N": record.params["scaling"],
        "D": record.num_tokens,
        "batch_tokens": config.batch_tokens,
        "matrix_lr": config.optimizer.matrix_lr,
        "weight_decay": config.optimizer.weight_decay,
        "seed": record.seed,
        "train_flops": record.train_flops,
        "val_bpb": record.val_bpb,
        "core": record.core,
        "train_seconds": record.train_seconds,
        "tokens_per_second": record.tokens_per_second,
        "mfu": record.mfu,
        "peak_flops_per_device": record.peak_flops_per_device,
        "device": record.device,
        "num_devices": record.num_devices,
        "step_seconds": record.step_seconds,
        "rank_compute_seconds": list(record.rank_compute_seconds),
        "startup_seconds": record.startup_seconds,
        "tags": record.tags,
    }


def format_row(row: dict[str, Any]) -> tuple[str, ...]:
    return (
        row["run_id"],
        row["sweep"],
        row["status"],
        str(row["depth"]),
        str(row["model_dim"]),
        human(row["N"]),
        human(row["D"]),
        f"{row['batch_tokens']:,}",
        f"{row['matrix_lr']:.4g}",
        f"{row['weight_decay']:.4g}",
        str(row["seed"]),
        f"{row['train_flops']:.2e}",
        "–" if row["val_bpb"] is None else f"{row['val_bpb']:.4f}",
        duration(row["train_seconds"]),
        human(row["tokens_per_second"]),
    )


def format_times(row: dict[str, Any]) -> tuple[str, ...]:
    """A row of TIME_COLUMNS; "–" where the run was too short to be timed."""
    total, ranks = sum(row["step_seconds"].values()), row["rank_compute_seconds"]
    slow = max(ranks, default=0.0)
    return (
        row["run_id"],
        row["sweep"],
        row["status"],
        str(row["num_devices"]),
        human(row["N"]),
        duration(row["train_seconds"]),
        human(row["tokens_per_second"]),
        "–" if row["mfu"] is None else f"{row['mfu']:.1%}",
        f"{sum(row['startup_seconds'].values()):.1f} s" if row["startup_seconds"] else "–",
        *(f"{row['step_seconds'].get(part, 0.0) / total:.0%}" if total else "–" for part in PARTS),
        f"{ranks.index(slow)} (+{slow / min(ranks) - 1:.0%})" if len(ranks) > 1 else "–",
    )


def _sort_key(row: dict[str, Any], column: str) -> tuple[bool, Any]:
    if column not in row:
        raise ConfigError(f"cannot sort by {column!r}; columns: {', '.join(k for k in row if k != 'tags')}")
    value = row[column]
    if isinstance(value, dict):
        raise ConfigError(f"cannot sort by {column!r}: it holds several values; take another column")
    return (value is None, value if value is not None else 0)
