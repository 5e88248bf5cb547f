#!/usr/bin/env python3
"""Which batch size and learning rate are best at each horizon?

The question of batch_d12.py at a size that two CPU cores answer in minutes; its numbers are in nanoladder.demo_size.
"""

from nanoladder import run_sweep
from nanoladder.demo_sweeps import batch

SWEEP = batch()

if __name__ == "__main__":
    run_sweep(SWEEP)
