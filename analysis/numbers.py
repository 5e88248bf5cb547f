"""Numbers as people write them in tables: 1,234,567, 1 234, 26.9M, 1.4 billion, 2.15x10^18, 10^19 FLOPs."""

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
FACTORS = {
    "K": 1e3, "M": 1e6, "B": 1e9, "G": 1e9, "T": 1e12, "THOUSAND": 1e3, "MILLION": 1e6, "BILLION": 1e9, "TRILLION": 1e12,
    "MN": 1e6, "MIO": 1e6, "BN": 1e9, "TN": 1e12,
}  # fmt: skip
GROUPED = re.compile(r"[+-]?\d{1,3}(?:[,_ \u00a0\u2009\u202f']\d{3})+(?:\.\d+)?(?:[eE][+-]?\d+)?")
SEPARATORS = re.compile(r"[,_ \u00a0\u2009\u202f']")
DECIMAL_COMMA = re.compile(r"[+-]?\d+,\d+(?:[eE][+-]?\d+)?")
SUFFIXED = re.compile(
    rf"(?P<number>[^A-Za-z]*\d\.?)\s*(?P<suffix>{'|'.join(sorted(FACTORS, key=len, reverse=True))})", re.IGNORECASE
)
POWER = re.compile(
    r"(?:(?P<number>\d+(?:\.\d+)?)\s*[x*×·]\s*)?10\s*(?:\^|\*\*)\s*\{?(?P<power>[+-]?\d+(?:\.\d+)?)\}?", re.IGNORECASE
)
LABEL = re.compile(r"^[A-Za-z]{1,6}\s*[=:]\s*|\s*(?:flops?|params?|parameters|tokens?)$", re.IGNORECASE)  # C=1e18, 1e18 FLOPs


def to_numbers(values: pd.Series, *, counts: bool = False, decimal_comma: bool = False) -> tuple[pd.Series, int]:
    """Floats, NaN where a value is none, and how many had to be read as text: with separated thousands, or, with `counts`, the
    suffix K, M, B (or G) or T or its word, a power of ten, or what is counted (1e18 FLOPs). `decimal_comma`: 3,14 is a number too
    (files separated by semicolons)."""
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
    if counts:
        text = LABEL.sub("", text)
        if found := SUFFIXED.fullmatch(text):
            text, factor = found["number"].strip(), FACTORS[found["suffix"].upper()]
        if found := POWER.fullmatch(text):
            text, power = found["number"] or "1", float(found["power"])
            if abs(power) > 300:  # no float holds it
                return float(np.nan)
            factor *= 10.0**power
    comma = decimal_comma and DECIMAL_COMMA.fullmatch(text) is not None
    if comma and not (counts and GROUPED.fullmatch(text)):  # 3,142 is a loss, 26,860 are parameters
        text = text.replace(",", ".")
    elif GROUPED.fullmatch(text):
        text = SEPARATORS.sub("", text)
    try:
        return float(text) * factor
    except ValueError:
        return float(np.nan)
