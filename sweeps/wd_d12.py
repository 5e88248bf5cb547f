#!/usr/bin/env python3
"""Which weight decay is best at d12?

nanochat reports 0.22 there (its log, January 2026: d8 0.40, d12 0.22, d16 0.10, d20 0.08).
"""

from nanoladder import Grid, Sweep, run_sweep
from nanoladder.cells import depth_cells

SWEEP = Sweep(
    name="wd_d12",
    question="Which weight decay is best at d12?",
    source="nanochat log, January 2026: 0.22",
    purpose="weight_decay",
    stage="d12",
    cells=depth_cells([12]),
    space={"weight_decay_multiplier": Grid([0.25, 0.5, 1, 2, 4])},
    extend_edges=True,
    device="h100",
)

if __name__ == "__main__":
    run_sweep(SWEEP)
