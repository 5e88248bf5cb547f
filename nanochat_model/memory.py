"""What one device must hold while it trains, by component, from arithmetic.

Estimates, checked against one public figure: nanochat's d24 at device batch 32, T = 2048 took 105 GB on an MI300X, with
embeddings in bf16 and whole logits (tests/nanoladder/test_plan.py). A probe step on the device has the last word.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

from nanochat_model.config import ComputeDtype, GPTConfig
from nanochat_model.counts import count_params
from nanochat_model.errors import ConfigError

FP32 = 4
DTYPE_BYTES: dict[ComputeDtype, int] = {"bfloat16": 2, "float16": 2, "float32": 4}
# C-wide tensors that a layer keeps for its backward pass, per token: residual, two norms' outputs, q k v, rotated and
# normalised q and k, attention's output (9 C) and the 4C hidden layer before and after relu² counted at 3 C each, because
# compilation recomputes part of it. 15 in all reproduces the 105 GB above within 5%.
ACTIVATION_TENSORS_PER_LAYER = 15
LOGIT_CHUNK_TOKENS = 8192  # tokens of logits alive at once in the chunked cross-entropy on a GPU (GPU_CHUNK_TOKENS of loss.py)
FIXED_BYTES = 1.5e9  # context, allocator slack and communication buffers of a GPU process: an assumption
USABLE_SHARE = 0.92  # of the card's memory: fragmentation takes the rest; an assumption


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes on one device."""

    parameters: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    fixed: float

    @property
    def total(self) -> float:
        return sum(asdict(self).values())

    def as_dict(self) -> dict[str, float]:
        return {**asdict(self), "total": self.total}


def estimate_memory(
    model: GPTConfig,
    *,
    micro_batch_rows: int,
    compute_dtype: ComputeDtype = "bfloat16",
    num_devices: int = 1,
    table_bytes: int = FP32,
    logits: Literal["chunked", "whole"] = "chunked",
    fixed_bytes: float = FIXED_BYTES,
) -> MemoryEstimate:
    """Memory of one device that trains `micro_batch_rows` rows of T tokens at a time.

    Master weights, gradients and optimizer states are fp32; optimizer states are sharded over `num_devices`. `table_bytes`
    is the width of the look-up tables (2 in nanochat). AdamW keeps two values a parameter, Muon one momentum (its
    second moment is a row vector: left out).
    """
    counts = count_params(model)
    tables = counts.wte + counts.value_embeds
    rest = counts.lm_head + counts.transformer_matrices + counts.scalars
    width = DTYPE_BYTES[compute_dtype]
    tokens = micro_batch_rows * model.sequence_len
    logit_tokens = min(tokens, LOGIT_CHUNK_TOKENS) if logits == "chunked" else tokens
    parameters = table_bytes * tables + FP32 * rest
    adam = 2 * (table_bytes * tables + FP32 * (counts.lm_head + counts.scalars))
    muon = FP32 * counts.transformer_matrices
    return MemoryEstimate(
        parameters=parameters,
        gradients=parameters,
        optimizer=(adam + muon) / num_devices,
        activations=tokens * model.depth * model.model_dim * ACTIVATION_TENSORS_PER_LAYER * width,
        logits=logit_tokens * model.padded_vocab_size * (FP32 + 2 * width),
        fixed=fixed_bytes,
    )


def rows_that_fit(
    model: GPTConfig, *, memory_bytes: float, at_most: int, compute_dtype: ComputeDtype = "bfloat16", num_devices: int = 1
) -> int:
    """The most rows up to `at_most` whose estimate fits the usable share of `memory_bytes`; 0 where not even one does."""
    usable = memory_bytes * USABLE_SHARE
    for rows in range(at_most, 0, -1):
        if estimate_memory(model, micro_batch_rows=rows, compute_dtype=compute_dtype, num_devices=num_devices).total <= usable:
            return rows
    return 0


def choose_micro_batch_rows(
    model: GPTConfig,
    *,
    rows_per_device: int,
    memory_bytes: float,
    compute_dtype: ComputeDtype = "bfloat16",
    num_devices: int = 1,
    max_tokens: int = 65536,
) -> int:
    """The largest divisor of `rows_per_device` that fits the card and holds at most `max_tokens` tokens.

    Larger micro-batches do not make a GPU faster past some 65k tokens. Raises ConfigError when not even one row fits.
    """
    usable = memory_bytes * USABLE_SHARE
    fits = [
        rows
        for rows in range(1, rows_per_device + 1)
        if rows_per_device % rows == 0
        and estimate_memory(model, micro_batch_rows=rows, compute_dtype=compute_dtype, num_devices=num_devices).total <= usable
    ]
    if not fits:
        need = estimate_memory(model, micro_batch_rows=1, compute_dtype=compute_dtype, num_devices=num_devices).total
        raise ConfigError(
            f"one row of {model.sequence_len} tokens of this {count_params(model).total / 1e9:.2f}B-parameter model needs "
            f"{need / 1e9:.0f} GB, the card offers {usable / 1e9:.0f} GB of its {memory_bytes / 1e9:.0f} GB; take a smaller "
            "depth, a larger card or more devices"
        )
    small = [rows for rows in fits if rows * model.sequence_len <= max_tokens]
    return max(small or fits[:1])
