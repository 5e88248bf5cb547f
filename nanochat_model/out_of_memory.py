"""Out of memory: the micro-batch is halved, never the global batch, so that the result stays what it was up to rounding.

What was learned lies in the run's folder: whoever goes on with the run (the same process, a replaced worker, the command given
again) starts with the halved micro-batch. Each process halves and tries again once.
"""

from __future__ import annotations

import gc
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from nanochat_model.config import RuntimeConfig
from nanochat_model.identity import from_dict, write_atomic

LIMIT_FILE = "micro_batch.json"
# What allocators say where the exception's type does not: torch on a CPU, the C++ library, cuBLAS.
_SIGNS = ("can't allocate memory", "out of memory", "bad_alloc", "ALLOC_FAILED")


@dataclass(frozen=True, kw_only=True)
class MicroBatchLimit:
    """Rows a micro-batch of this run may have at most on one device, and one line for each time that memory ran out."""

    rows: int
    history: tuple[str, ...]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the host could not give the memory that was asked for."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


def read_limit(run_dir: Path) -> MicroBatchLimit | None:
    """What earlier attempts at this run found out; None where memory never ran out."""
    path = run_dir / LIMIT_FILE
    if not path.is_file():
        return None
    return from_dict(MicroBatchLimit, json.loads(path.read_text(encoding="utf8")), f"{path}: ")


def halve(run_dir: Path, rows: int, step: int) -> MicroBatchLimit | None:
    """Note in the run's folder that `rows` are too many; None where there is only one row left.

    A limit that another rank has lowered already is kept.
    """
    if rows <= 1:
        return None
    known = read_limit(run_dir)
    if known is not None and known.rows < rows:
        return known
    line = f"out of memory at step {step} with a micro-batch of {rows} rows: halved to {rows // 2}"
    limit = MicroBatchLimit(rows=rows // 2, history=(*(known.history if known else ()), line))
    write_atomic(run_dir / LIMIT_FILE, json.dumps(asdict(limit), indent=1))
    return limit


def limited(runtime: RuntimeConfig, limit: MicroBatchLimit | None) -> RuntimeConfig:
    """The runtime with its micro-batch held at or under the limit."""
    if limit is None:
        return runtime
    return replace(runtime, micro_batch_rows=min(runtime.micro_batch_rows or limit.rows, limit.rows))


def release_memory() -> None:
    """Give back what a failed attempt held; call it when nothing refers to that attempt any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
