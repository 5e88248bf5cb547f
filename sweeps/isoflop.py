#!/usr/bin/env python3
"""Which depth is best at each compute budget, from 1e18 to 1e20 FLOPs?

nanochat, January 2026: N* = 110.7M at 1e18 and 381.8M at 1e19 (matrices + lm_head), exponent 0.54. The two lowest budgets are
run as a grid; further cells are chosen where they narrow the predicted loss at 1e21 FLOPs most (adaptive=None: the grid alone).
"""

from nanoladder import Adaptive, GPTConfig, Sweep, run_sweep
from nanoladder.cells import isoflop_cells

MODELS = [GPTConfig.from_depth(depth) for depth in range(4, 49, 2)]
SWEEP = Sweep(
    name="isoflop",
    question="Which depth is best at each compute budget?",
    source="isoFLOP profiles, arXiv 2203.15556; N* of nanochat's log, January 2026",
    purpose="allocation",
    cells=isoflop_cells([1e18, 3.2e18], MODELS, centre=lambda c: 110.7e6 * (c / 1e18) ** 0.54, sizes=7),
    adaptive=Adaptive(models=MODELS, target_flops=1e21, total_flops=4e20),
    device="h100",
)

if __name__ == "__main__":
    run_sweep(SWEEP)
