"""Validation loss in bits per byte, the same whatever the number of ranks or the micro-batch of training.

B rows, T positions, V vocabulary.
"""

from __future__ import annotations

import logging
import math
from typing import Any

import numpy as np
import torch

from nanochat_model.distributed import all_sum, current_ranks
from nanochat_model.errors import ConfigError
from nanochat_model.out_of_memory import is_out_of_memory, release_memory

_log = logging.getLogger(__name__)
CHUNK_TOKENS = {"cpu": 4096, "cuda": 32768}  # tokens a forward pass; fixed by device, so that no other setting moves the result


def chunk_rows_for(device_type: str, sequence_len: int) -> int:
    """Rows of one forward pass of an evaluation."""
    return max(1, CHUNK_TOKENS.get(device_type, CHUNK_TOKENS["cpu"]) // sequence_len)


def evaluate_bpb(
    model: Any,
    rows: tuple[np.ndarray | torch.Tensor, np.ndarray | torch.Tensor],
    token_bytes: np.ndarray | torch.Tensor,
    micro_batch_rows: int = 0,
) -> float:
    """Σ nats over targets of non-zero byte length / (ln 2 · Σ bytes of those targets) (nanochat's definition).

    `rows`: inputs and targets, int64 (B, T), the same on every rank; targets of -1 are ignored. `token_bytes` (V,): UTF-8 bytes
    of each id, 0 for special tokens, which do not count. Every rank evaluates its share of fixed chunks of rows; chunk sums are
    float64 and added in one order, so the result does not depend on the ranks. `micro_batch_rows` > 0 overrides the chunk.
    Raises ConfigError when no target has bytes.
    """
    nats, num_bytes, _ = sum_losses(model, rows, token_bytes, micro_batch_rows)
    if num_bytes == 0:
        raise ConfigError("the validation rows hold no target with bytes; raise eval.num_tokens or give more validation text")
    return nats / (math.log(2) * num_bytes)


def evaluate_loss(model: Any, rows: tuple[Any, Any], micro_batch_rows: int = 0) -> float:
    """Mean nats over targets other than -1; as `evaluate_bpb` otherwise. Raises ConfigError when there is no such target."""
    nats, _, num_targets = sum_losses(model, rows, None, micro_batch_rows)
    if num_targets == 0:
        raise ConfigError("the validation rows hold no target; give more validation data")
    return nats / num_targets


@torch.no_grad()
def sum_losses(
    model: Any, rows: tuple[Any, Any], token_bytes: np.ndarray | torch.Tensor | None, micro_batch_rows: int = 0
) -> tuple[float, int, int]:
    """Σ nats, Σ bytes and number of the targets that count: those other than -1 and, with `token_bytes`, of non-zero length."""
    inputs, targets = (torch.as_tensor(r) for r in rows)
    device = next(model.parameters()).device
    num_rows, sequence_len = inputs.shape
    chunk = micro_batch_rows or chunk_rows_for(device.type, sequence_len)
    starts = range(0, num_rows, chunk)
    ranks = current_ranks()
    lengths = None if token_bytes is None else torch.as_tensor(token_bytes).to(device)
    nats = torch.zeros(len(starts), dtype=torch.float64, device=device)
    counts = torch.zeros(len(starts), 2, dtype=torch.float64, device=device)
    was_training, fitting = model.training, chunk
    model.eval()
    # On a CPU an evaluation is over before a compiler would be, and it should not depend on whether training is compiled.
    compiled = model.__dict__.pop("features", None) if device.type == "cpu" else None
    try:
        for i in range(ranks.rank, len(starts), ranks.world_size):
            x, y = (_rows(r, starts[i], chunk, fill).to(device) for r, fill in ((inputs, 0), (targets, -1)))
            size = (y >= 0).long() if lengths is None else torch.where(y >= 0, lengths[y.clamp(min=0)], 0)
            nats[i], fitting = _sum_nats(model, x, y, size > 0, fitting)
            counts[i, 0], counts[i, 1] = size.sum(), (size > 0).sum()
    finally:
        if compiled is not None:
            model.features = compiled
        model.train(was_training)
    total_bytes, total_targets = all_sum(counts).sum(0).tolist()
    return math.fsum(all_sum(nats).tolist()), int(total_bytes), int(total_targets)


def _sum_nats(model: Any, x: torch.Tensor, y: torch.Tensor, counted: torch.Tensor, rows: int) -> tuple[torch.Tensor, int]:
    """Σ nats (float64, a scalar) where `counted` (B, T), so many `rows` at a time, and for how many memory sufficed: where it
    runs out they are halved, down to one."""
    while True:
        try:
            parts = [slice(start, start + rows) for start in range(0, len(x), rows)]
            losses = [torch.where(counted[s], model.loss(x[s], y[s], reduction="none").reshape(y[s].shape), 0.0) for s in parts]
            return torch.stack([loss.sum(dtype=torch.float64) for loss in losses]).sum(), rows
        except Exception as e:
            if rows == 1 or not is_out_of_memory(e):
                raise
        release_memory()  # here: the exception held on to what was computed
        rows = min(rows, len(x)) // 2 or 1
        _log.warning("out of memory in an evaluation: goes on with %d rows at a time", rows)


def _rows(rows: torch.Tensor, start: int, count: int, fill: int) -> torch.Tensor:
    """Rows start..start+count. The last chunk of several is filled up, so that a compiled model sees one shape."""
    part = rows[start : start + count]
    if start == 0 or len(part) == count:
        return part
    return torch.cat([part, torch.full((count - len(part), rows.shape[1]), fill, dtype=rows.dtype)])
