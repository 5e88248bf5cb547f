#!/usr/bin/env python3
"""Which changes of the recipe win at d12, still win at d20, and are fit for d24?

nanochat's log: hyperparameters tuned at d12 can hurt d20, and a gain of 0.002 bpb at d12 had shrunk to 0.0007 at d20.
"""

from nanoladder import Ladder, Stage, run_sweep
from nanoladder.cells import depth_cells

SWEEP = Ladder(
    name="ladder",
    question="Which changes of the recipe win at d12, still win at d20, and are fit for d24?",
    source="nanochat log, January to March 2026",
    variants={
        "half the batch": {"batch_multiplier": 0.5},
        "x0 beta1 0.92": {"optimizer.x0_betas": (0.92, 0.95)},
        "decay to zero": {"schedule.final_lr_fraction": 0.0},
        "twice the weight decay": {"weight_decay_multiplier": 2.0},
    },
    stages=tuple(Stage(name=f"d{depth}", cells=depth_cells([depth])) for depth in (12, 20, 24)),
    seeds=(0, 1, 2),
    device="h100",
)

if __name__ == "__main__":
    run_sweep(SWEEP)
