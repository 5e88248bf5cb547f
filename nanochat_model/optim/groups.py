"""Which parameter is updated how: nanochat's groups (gpt.py, setup_optimizer) as plain data.

AdamW learning rates of the three tables are scaled by 1/√(model_dim/768); Muon's by √max(1, rows/columns).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from nanochat_model.config import OptimizerConfig

REFERENCE_DIM = 768  # nanochat tuned the tables' learning rates at this width


@dataclass(frozen=True, kw_only=True)
class Group:
    """Parameters that share one update rule and its constants."""

    name: str
    kind: Literal["adamw", "muon"]
    names: tuple[str, ...]
    params: tuple[nn.Parameter, ...]
    lr: float
    weight_decay: float
    betas: tuple[float, float] = (0.0, 0.0)  # AdamW's; Muon's momentum is scheduled
    eps: float = 0.0
    beta2: float = 0.0  # NorMuon's
    polar_steps: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.params[0].shape)


def parameter_groups(named: Iterable[tuple[str, Tensor]], model_dim: int, config: OptimizerConfig) -> list[Group]:
    """Groups that cover every parameter once, AdamW first, Muon by shape. Raises AssertionError for an unknown name."""
    params = {name: p for name, p in named if isinstance(p, nn.Parameter)}
    matrices = [n for n in params if n.startswith("transformer.h.")]
    groups = [_adamw(name, [n for n in params if match(n)], params, model_dim, config) for name, match in _ADAMW.items()]
    for shape in sorted({tuple(params[n].shape) for n in matrices}):
        names = tuple(n for n in matrices if tuple(params[n].shape) == shape)
        groups.append(
            Group(
                name=f"muon_{shape[0]}x{shape[1]}",
                kind="muon",
                names=names,
                params=tuple(params[n] for n in names),
                lr=config.matrix_lr * math.sqrt(max(1.0, shape[0] / shape[1])),
                weight_decay=config.weight_decay,
                beta2=config.muon_beta2,
                polar_steps=config.polar_steps,
            )
        )
    covered = sorted(n for g in groups for n in g.names)
    assert covered == sorted(params), f"parameters without a group: {set(params) - set(covered)}"
    return [g for g in groups if g.names]


_ADAMW = {
    "lm_head": lambda n: n == "lm_head.weight",
    "wte": lambda n: n == "transformer.wte.weight",
    "value_embeds": lambda n: n.startswith("value_embeds."),
    "resid": lambda n: n == "resid_lambdas",
    "x0": lambda n: n == "x0_lambdas",
    "smear": lambda n: n in ("smear_gate.weight", "smear_lambda", "backout_lambda"),
}


def _adamw(name: str, names: list[str], params: dict[str, nn.Parameter], model_dim: int, c: OptimizerConfig) -> Group:
    table_scale = (model_dim / REFERENCE_DIM) ** -0.5
    lr, betas, decay = {
        "lm_head": (c.unembedding_lr * table_scale, c.unembedding_betas, c.unembedding_weight_decay),
        "wte": (c.embedding_lr * table_scale, c.embedding_betas, c.embedding_weight_decay),
        "value_embeds": (
            c.embedding_lr * table_scale * c.value_embedding_lr_ratio,
            c.embedding_betas,
            c.value_embedding_weight_decay,
        ),
        "resid": (c.scalar_lr * c.resid_lr_ratio, c.resid_betas, c.resid_weight_decay),
        "x0": (c.scalar_lr, c.x0_betas, 0.0),
        "smear": (c.smear_lr, c.smear_betas, 0.0),
    }[name]
    return Group(
        name=name,
        kind="adamw",
        names=tuple(names),
        params=tuple(params[n] for n in names),
        lr=lr,
        weight_decay=decay,
        betas=betas,
        eps=c.adam_eps,
    )
