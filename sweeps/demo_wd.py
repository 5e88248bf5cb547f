#!/usr/bin/env python3
"""Which weight decay is best, and does it follow width?

The question of wd_d12.py and wd_d20.py at a size that two CPU cores answer in minutes; its numbers are in nanoladder.demo_size.
"""

from nanoladder import run_sweep
from nanoladder.demo_sweeps import weight_decay

SWEEP = weight_decay()

if __name__ == "__main__":
    run_sweep(SWEEP)
