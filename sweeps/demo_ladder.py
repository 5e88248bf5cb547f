#!/usr/bin/env python3
"""Which changes of the recipe win at a small size, and still win at a larger one?

The question of ladder.py at a size that two CPU cores answer in minutes; its numbers are in nanoladder.demo_size.
"""

from nanoladder import run_sweep
from nanoladder.demo_sweeps import promotion

SWEEP = promotion()

if __name__ == "__main__":
    run_sweep(SWEEP)
