#!/usr/bin/env python3
"""Which model size is best at each compute budget?

The question of isoflop.py at a size that two CPU cores answer in minutes; its numbers are in nanoladder.demo_size.
"""

from nanoladder import run_sweep
from nanoladder.demo_sweeps import isoflop

SWEEP = isoflop()

if __name__ == "__main__":
    run_sweep(SWEEP)
