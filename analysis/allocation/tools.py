"""Small helpers of the allocation laws: checking columns, JSON-ready values, robust groups of budgets."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from analysis.errors import DataError


def as_columns(**columns: Any) -> list[np.ndarray]:
    """Each column as a 1-D float array, all of one length, positive and finite; DataError names the first bad row otherwise."""
    out, length = [], None
    for name, values in columns.items():
        array = np.asarray(values, dtype=float)
        if array.ndim != 1:
            raise DataError(f"{name} has {array.ndim} dimensions: give one number for each run")
        if length is not None and array.size != length:
            raise DataError(f"{name} has {array.size} values where the other columns have {length}: give one for each run")
        length = array.size
        bad = ~(np.isfinite(array) & (array > 0))
        if bad.any():
            row = int(np.argmax(bad))
            raise DataError(f"{name} is {array[row]:g} in row {row}: it must be positive and finite; leave the row out")
        out.append(array)
    return out


def jsonable(value: Any) -> Any:
    """Plain data for JSON: arrays to lists, numpy numbers to Python's, NaN and infinities to null."""
    if isinstance(value, dict):
        return {str(k): jsonable(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [jsonable(v) for v in value]
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    if isinstance(value, (int, np.integer)):
        return int(value)
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else None
    if hasattr(value, "as_dict"):
        return value.as_dict()
    return value
