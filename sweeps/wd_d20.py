#!/usr/bin/env python3
"""Which weight decay is best at d20, and does it follow width or horizon?

nanochat reports 0.08 at its fixed ratio, where width and horizon cannot be told apart; the second cell varies the ratio alone.
"""

from nanoladder import Cell, GPTConfig, Grid, Horizon, Sweep, run_sweep

D20 = GPTConfig.from_depth(20)
SWEEP = Sweep(
    name="wd_d20",
    question="Which weight decay is best at d20, and does it follow width or horizon?",
    source="nanochat log, January 2026: 0.08",
    purpose="weight_decay",
    stage="d20",
    cells=(Cell(model=D20), Cell(model=D20, horizon=Horizon(tokens_per_param=4))),
    space={"weight_decay_multiplier": Grid([0.25, 0.5, 1, 2, 4])},
    extend_edges=True,
    device="h100",
)

if __name__ == "__main__":
    run_sweep(SWEEP)
