#!/usr/bin/env python3
"""Which learning rates are best for fine-tuning, as a fraction of those the base was trained with?

nanochat uses 0.8 of them, without a sweep on record. For any base and any conversations:

    python sweeps/sft_lr.py --storage demo --base-checkpoint demo/runs/0123456789abcdef \\
        --conversations demo/conversations/train.jsonl
"""

from nanoladder import Grid, SFTSweep, run_sweep

SWEEP = SFTSweep(
    name="sft_lr",
    question="Which fraction of the base's learning rates is best for fine-tuning?",
    source="0.8 in nanochat's chat_sft, not swept there",
    space={"lr_multiplier": Grid([0.125, 0.25, 0.5, 1.0, 2.0])},  # of 0.8
)

if __name__ == "__main__":
    run_sweep(SWEEP)
