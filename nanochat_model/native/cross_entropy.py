"""Cross-entropy of soft-capped logits in one run of kernels, for CPUs that multiply bfloat16 pairs.

N tokens, C model_dim, V vocabulary. Features are bfloat16, the table float32.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from nanochat_model.native import ops
from nanochat_model.native.ops import cross_entropy_rows, together
from nanochat_model.native.products import MULTIPLE, accumulate_gradient, in_c, packed_inputs, packed_outputs, product


def whole_in_c(x: Tensor, rows: Tensor) -> bool:
    """Whether `chunked_losses` takes features x (N, C) and the table rows (V, C)."""
    return ops.usable(x) and in_c(x, (rows,))


def chunked_losses(
    x: Tensor, rows: Tensor, targets: Tensor, *, cap: float, most: int, grad_table: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Losses (N,) of targets (N,), -1 ignored, from features x (N, C), and the gradient (N, C) of their sum, whose gradient of the
    table is added to grad_table (V, C). Without grad_table, losses alone. At most `most` tokens' logits exist at a time."""
    N, V = len(x), len(rows)
    count = -(-N // max(most, 2 * MULTIPLE))
    ends = [N * i // count for i in range(count + 1)]  # as even as can be: none is too short for the products
    raw = x.new_empty((-(-N // count), V))  # the same for all chunks: it stays in the caches
    losses = torch.empty(N, dtype=torch.float32)
    grad_x = None if grad_table is None else torch.empty_like(x)
    targets = targets.contiguous()
    with together():
        outputs, _ = packed_outputs((rows,))
        for at in (slice(a, b) for a, b in itertools.pairwise(ends)):
            xc = x[at]
            logits = product(xc, outputs, V, out=raw[: len(xc)])
            cross_entropy_rows(logits, targets[at], cap, losses[at], want_grad=grad_table is not None)
            if grad_x is not None and grad_table is not None:
                product(logits, packed_inputs((rows,)), x.shape[1], out=grad_x[at])
                accumulate_gradient(grad_table, logits, xc)
    return losses, grad_x
