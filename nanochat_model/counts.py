"""Parameters and FLOPs by arithmetic, without building a model (and without torch).

Agrees with the built model to the unit (tests/nanochat_model/test_counts.py). Sources: nanochat gpt.py
(num_scaling_params, estimate_flops); attention term of PaLM, arXiv 2204.02311 appendix B.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from nanochat_model.config import SMEAR_CHANNELS, VE_GATE_CHANNELS, GPTConfig

Convention = Literal["matrices_lm_head", "all", "matrices"]
CONVENTIONS: tuple[Convention, ...] = ("matrices_lm_head", "all", "matrices")


@dataclass(frozen=True, kw_only=True)
class ParamCounts:
    """Parameters by group (units: scalars)."""

    wte: int
    value_embeds: int
    lm_head: int
    transformer_matrices: int
    scalars: int

    @property
    def total(self) -> int:
        return self.wte + self.value_embeds + self.lm_head + self.transformer_matrices + self.scalars

    @property
    def scaling(self) -> int:
        """N as nanochat's laws count it: transformer matrices + lm_head (Kaplan-style)."""
        return self.transformer_matrices + self.lm_head

    @property
    def embedding_share(self) -> float:
        """Share of all parameters that are look-up tables; near 1 the loss says little about larger models."""
        return (self.wte + self.value_embeds) / self.total

    def by_convention(self, convention: Convention) -> int:
        return {"matrices_lm_head": self.scaling, "all": self.total, "matrices": self.transformer_matrices}[convention]

    def as_dict(self) -> dict[str, int]:
        return {**asdict(self), "total": self.total, "scaling": self.scaling}


def count_params(model: GPTConfig) -> ParamCounts:
    """Counts of the whole architecture: nothing tied, no biases, no norm gains."""
    c, v, kv = model.model_dim, model.padded_vocab_size, model.kv_dim
    attention = c * c + 2 * c * kv + c * c  # c_q, c_k and c_v, c_proj
    gates = VE_GATE_CHANNELS * model.num_kv_heads * len(model.value_embed_layers)
    return ParamCounts(
        wte=v * c,
        value_embeds=v * kv * len(model.value_embed_layers),
        lm_head=v * c,
        transformer_matrices=model.depth * (attention + 8 * c * c) + gates,
        scalars=2 * model.depth + SMEAR_CHANNELS + 2,
    )


def count_params_2025(depth: int, *, vocab_size: int = 65536) -> int:
    """The older public counting, 12·C²·L + 2·V·C: no value embeddings, gates or scalars (d12 186M, d20 561M)."""
    c = 64 * depth
    return 12 * c * c * depth + 2 * vocab_size * c


def flops_per_token(model: GPTConfig, windows: Sequence[int] | None = None) -> int:
    """Training FLOPs a token, forward and backward: 6 per matmul parameter (smear gate included) and
    12·H·D·min(window, T) a layer for attention. Look-ups and norms count nothing. `windows` (one a layer, in tokens)
    replaces the model's own, to count runs of other window rules."""
    counts = count_params(model)
    matmul = counts.transformer_matrices + counts.lm_head + SMEAR_CHANNELS
    attention = sum(12 * model.num_heads * model.head_dim * min(w, model.sequence_len) for w in windows or model.windows)
    return 6 * matmul + attention
