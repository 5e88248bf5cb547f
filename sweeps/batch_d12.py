#!/usr/bin/env python3
"""Which batch size and learning rate are best at d12, at several horizons?

B* ~ D^0.383 in arXiv 2505.13738 and D^0.571 in arXiv 2503.04715; the cells vary D at a fixed N.
"""

from nanoladder import Cell, GPTConfig, Grid, Horizon, Sweep, run_sweep

SWEEP = Sweep(
    name="batch_d12",
    question="Which batch size and learning rate are best at d12, at several horizons?",
    source="arXiv 2505.13738 (D^0.383), arXiv 2503.04715 (D^0.571)",
    purpose="batch_size",
    stage="d12",
    cells=tuple(Cell(model=GPTConfig.from_depth(12), horizon=Horizon(tokens_per_param=r)) for r in (3, 6, 12, 24)),
    space={"batch_multiplier": Grid([0.25, 0.5, 1, 2, 4]), "lr_multiplier": Grid([0.5, 1, 2])},
    device="h100",
)

if __name__ == "__main__":
    run_sweep(SWEEP)
