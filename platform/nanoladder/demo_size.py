"""Every size of the demo in one place. Tests shrink the fields; nothing else of the demo knows a number.

Sizes are for two CPU cores and ten minutes. Small models on this corpus want batches of 1–2 thousand tokens, and a best N
near 85 thousand at 1e12 FLOPs; depth × 64 is too coarse there, so models are (depth, width) pairs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from nanochat_model.config import ComputeDtype, EvalConfig, GPTConfig, OptimizerConfig, ScheduleConfig
from nanochat_model.recipe import PowerRule, Recipe

Shape = tuple[int, int]  # depth, width
D_REF = 1e6  # tokens at which the demo's references hold
B_REF = 1024.0  # tokens


@dataclass(frozen=True, kw_only=True)
class DemoSize:
    """Data, ladder, production run and chat of the demo."""

    source: str = "stdlib"
    vocab_size: int = 1024
    sequence_len: int = 256
    val_fraction: float = 0.05
    eval_tokens: int = 65_536
    curve_points: int = 8  # evaluations of a production run
    # isoFLOP: a budget and its models, whose N spans the optimum; one family (depth 1), so that size is all that differs
    isoflop: tuple[tuple[float, tuple[Shape, ...]], ...] = (
        (2.2e11, ((1, 24), (1, 32), (1, 40), (1, 48), (1, 64))),
        (4.8e11, ((1, 24), (1, 32), (1, 48), (1, 64), (1, 80))),
        (1.02e12, ((1, 32), (1, 48), (1, 64), (1, 80), (1, 96))),
        (2.2e12, ((1, 40), (1, 48), (1, 64), (1, 80), (1, 112))),
    )
    noise_seeds: tuple[int, ...] = (1, 2)  # further seeds of one middle cell
    noise_cell: tuple[float, Shape] = (4.8e11, (1, 48))
    # shape, tokens. Three horizons of one width and two further widths: a batch law needs three optima, one of rates in N and D
    # needs five. Batches are spread over a factor of 22: each valley is shallow, and its large end costs little.
    batch_cells: tuple[tuple[Shape, float], ...] = (
        ((1, 32), 0.15e6), ((1, 32), 0.3e6), ((1, 32), 0.6e6), ((1, 48), 0.25e6), ((1, 64), 0.25e6),
    )  # fmt: skip
    batch_multipliers: tuple[float, ...] = (0.5, 1.4, 4.0, 11.0)
    lr_multipliers: tuple[float, ...] = (0.5, 1.0, 2.0)
    # one cell, to show the question: decay moves these losses less than a law could rest on
    weight_decay_cells: tuple[tuple[Shape, float], ...] = (((1, 32), 0.25e6),)
    weight_decay_multipliers: tuple[float, ...] = (0.4, 1.6, 6.4, 25.6)
    promotion_cells: tuple[tuple[Shape, float], ...] = (((1, 32), 0.2e6), ((2, 48), 0.3e6))  # small, large
    # The ladder starts from large batches, as a device would like them: fewer and faster steps for the same tokens.
    promotion_baseline: Mapping[str, float] = field(default_factory=lambda: {"batch_multiplier": 4.0})
    promotion_variants: Mapping[str, Mapping[str, float]] = field(
        default_factory=lambda: {
            "a quarter of the batch": {"batch_multiplier": 1.0},
            "twice the learning rates": {"lr_multiplier": 2.0},
            "no weight decay": {"weight_decay_multiplier": 0.0},
        }
    )
    promotion_seeds: tuple[int, ...] = (0, 1, 2)
    promotion_eval_steps: int = 70  # two points in the later half of the shortest runs: gains along FLOPs and seconds need a slope
    production_factor: float = 4.0  # of the largest budget
    production_shapes: tuple[Shape, ...] = ((1, 64), (1, 80), (1, 96), (1, 112), (1, 128), (1, 144))
    production_checkpoints: int = 4
    sft_conversations: int = 1000
    sft_task_rows: int = 600  # of each of the project's tasks
    sft_epochs: float = 6.0
    chat_eval_problems: int = 200  # of each task
    chat_eval_max_tokens: int = 40
    chat_prompt: str = "What is 31 + 24?"
    chat_max_tokens: int = 60
    num_workers: int = 2  # of the production run: processes that share its batch
    threads_per_worker: int = 1
    concurrent_trials: int = 2
    n_boot: int = 4000

    @property
    def largest_budget(self) -> float:
        return max(budget for budget, _ in self.isoflop)

    def model(self, shape: Shape) -> GPTConfig:
        """Heads as near to 16 channels as divides the width: a jump of head size moves the loss as much as a size step."""
        depth, width = shape
        head_dims = [d for d in range(2, width + 1, 2) if width % d == 0]
        heads = width // min(head_dims, key=lambda d: abs(math.log(d / 16)))
        return GPTConfig(
            depth=depth,
            model_dim=width,
            num_heads=heads,
            num_kv_heads=heads,
            sequence_len=self.sequence_len,
            vocab_size=self.vocab_size,
            window_pattern="L",
        )


@dataclass(frozen=True, kw_only=True)
class DemoRecipe:
    """nanochat's rules from a reference of the demo's own scale."""

    weight_decay: float = 0.2
    # Rates at B_REF. Scalars and smear far below nanochat's 0.5 and 0.2 (at B = 2^19): at 0.035 single runs still spiked by 3%.
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(
            matrix_lr=0.014, embedding_lr=0.12, unembedding_lr=0.006, scalar_lr=0.012, smear_lr=0.012
        )
    )

    def recipe(self, size: DemoSize, compute_dtype: ComputeDtype) -> Recipe:
        return Recipe(
            name="demo",
            batch_size=PowerRule(
                coefficient=B_REF,
                exponents={"D": 0.383},
                references={"D": D_REF},
                source="reference tried on this corpus; exponent of arXiv 2505.13738",
            ),
            lr_multiplier=PowerRule(
                coefficient=1.0, exponents={"B": 0.5}, references={"B": B_REF}, source="square root of the batch, AdamW's rule"
            ),
            weight_decay=PowerRule(
                coefficient=self.weight_decay,
                exponents={"B": 0.5, "D": -1.0},
                references={"B": B_REF, "D": D_REF},
                source="constant AdamW timescale, arXiv 2405.13698",
            ),
            batch_rounding="row",
            min_batch_tokens=2 * size.sequence_len,
            optimizer=self.optimizer,
            schedule=ScheduleConfig(warmup_steps=20, momentum_warmup_steps=100),
            eval=EvalConfig(num_tokens=size.eval_tokens, every_steps=0),
            compute_dtype=compute_dtype,
        )


DEMO_RECIPE = DemoRecipe()
