"""Indices of many ranges at once."""

from __future__ import annotations

import numpy as np


def spans_index(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Positions start, start+1, … start+length-1 of every span, one span after another: int64 (sum of lengths,)."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total) + np.repeat(starts - (ends - lengths), lengths)
