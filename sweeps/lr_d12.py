#!/usr/bin/env python3
"""Which learning rates are best at d12, the matrices' and all others', each against the other?

The rule scales all rates by the square root of the batch: AdamW's rule, assumed for Muon (nanochat base_train).
"""

from nanoladder import LogUniform, Sweep, run_sweep
from nanoladder.cells import depth_cells

SWEEP = Sweep(
    name="lr_d12",
    question="Which learning rates are best at d12?",
    source="matrix_lr 0.02 and embedding_lr 0.3 in nanochat, measured at d12 by hand",
    purpose="learning_rate",
    stage="d12",
    cells=depth_cells([12]),
    space={"lr_multiplier": LogUniform(0.25, 4.0)},
    num_trials=16,
    device="h100",
)

if __name__ == "__main__":
    run_sweep(SWEEP)
