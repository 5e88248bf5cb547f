"""Numbers as people write them in tables: 1,234,567, 1 234, 26.9M, 1.4B."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd

COUNTS = (
    "N",
    "N_matrices_lm_head",
    "N_all",
    "N_matrices",
    "D",
    "C",
    "budget",
    "B",
)  # columns whose values may carry a K, M, B or T
FACTORS = {"K": 1e3, "M": 1e6, "B": 1e9, "G": 1e9, "T": 1e12}
GROUPED = re.compile(r"[+-]?\d{1,3}(?:[,_ \u00a0\u2009\u202f']\d{3})+(?:\.\d+)?(?:[eE][+-]?\d+)?")
SEPARATORS = re.compile(r"[,_ \u00a0\u2009\u202f']")
DECIMAL_COMMA = re.compile(r"[+-]?\d+,\d+(?:[eE][+-]?\d+)?")
SUFFIXED = re.compile(r"(?P<number>[^A-Za-z]*\d\.?)\s*(?P<suffix>[KMBGT])", re.IGNORECASE)


def to_numbers(values: pd.Series, *, counts: bool = False, decimal_comma: bool = False) -> tuple[pd.Series, int]:
    """Floats, NaN where a value is none, and how many had to be read as text: with separated thousands, or, with `counts`, the
    suffix K, M, B (or G) or T. `decimal_comma`: 3,14 is a number too (files separated by semicolons)."""
    plain = pd.to_numeric(values, errors="coerce").astype(float)
    odd = plain.isna() & values.notna()
    if not odd.any():
        return plain, 0
    read = values[odd].map(lambda v: _number(str(v).strip(), counts, decimal_comma))
    plain = plain.copy()
    plain[odd] = read.astype(float)
    return plain, int(read.notna().sum())


def _number(text: str, counts: bool, decimal_comma: bool) -> float:
    factor = 1.0
    if counts and (found := SUFFIXED.fullmatch(text)):
        text, factor = found["number"].strip(), FACTORS[found["suffix"].upper()]
    comma = decimal_comma and DECIMAL_COMMA.fullmatch(text) is not None
    if comma and not (counts and GROUPED.fullmatch(text)):  # 3,142 is a loss, 26,860 are parameters
        text = text.replace(",", ".")
    elif GROUPED.fullmatch(text):
        text = SEPARATORS.sub("", text)
    try:
        return float(text) * factor
    except ValueError:
        return float(np.nan)
