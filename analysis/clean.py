"""Rows that cannot be used are listed with a reason, never dropped in silence."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
import pandas as pd

TEXT_COLUMNS = ("run_id", "name", "sweep", "stage", "purpose", "group", "comparable_hash", "variant", "cell", "status", "device")
NUMBER_COLUMNS = (
    "N", "N_matrices_lm_head", "N_all", "N_matrices", "D", "C", "L", "budget", "B", "lr", "weight_decay", "width", "depth",
    "seed", "sequence_len", "seconds", "num_devices", "core", "embedding_share",
)  # fmt: skip
COMPLETE = ("", "complete", "completed", "finished", "done", "ok", "success", "succeeded", "true")  # any capitals
POSITIVE = ("N", "N_matrices_lm_head", "N_all", "N_matrices", "D", "C", "L", "budget", "B", "lr", "width", "depth")
GIVEN_MUST_BE_FINITE = ("D", "L", "C", "budget", "B", "lr", "weight_decay", "width")
ABSURD_LOSS_FACTOR = 10.0  # a loss this far from the table's median has another unit or is a diverged run
ABSURD_SIZE_FACTOR = 1e5  # the same for N and D: no published ladder spans more than four decades either side of its middle
ABSURD_FLOPS_FACTOR = 30.0  # C / (N·D) varies 3-fold between conventions and with attention, not 30-fold


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """One row or file that enters no fit, and why."""

    row: str
    reason: str

    def as_dict(self) -> dict[str, str]:
        return asdict(self)


def clean(raw: pd.DataFrame) -> tuple[pd.DataFrame, list[LeftOut]]:
    """Split raw rows (any of the standard columns plus `row`, a label for people) into usable rows and `LeftOut`s.

    Every threshold is relative to the table itself, so that the units of N, D and L do not matter. Order of the checks:
    status, not a number, not positive, absurd against the table's medians, flagged by the caller (`drop`), duplicate.
    """
    given = {c for c in NUMBER_COLUMNS if c in raw.columns}
    reason = pd.Series("", index=raw.index, dtype=object)
    frame = pd.DataFrame(index=raw.index)
    frame["row"] = raw["row"].astype(str)
    for column in TEXT_COLUMNS:
        frame[column] = raw[column].fillna("").astype(str) if column in raw else ""
    _mark(reason, ~frame["status"].str.lower().isin(COMPLETE), "status ", frame["status"] + _error_text(raw))
    for column in NUMBER_COLUMNS:
        frame[column] = pd.to_numeric(raw[column], errors="coerce").astype(float) if column in given else np.nan
        if column in given:
            _mark(reason, raw[column].notna() & frame[column].isna(), f"{column} is not a number: ", raw[column])
    frame["outlier"] = raw["outlier"].fillna(False).astype(bool) if "outlier" in raw else False
    for column in ("N", *[c for c in GIVEN_MUST_BE_FINITE if c in given]):
        _mark(reason, frame[column].isna() & ~_optional(raw, column), f"{column} is missing")
        _mark(reason, np.isinf(frame[column]), f"{column} is not finite")
    for column in POSITIVE:
        _mark(reason, frame[column] <= 0, f"{column} is not positive: ", frame[column])
    _mark(reason, frame["weight_decay"] < 0, "weight_decay is negative: ", frame["weight_decay"])
    _mark_absurd(reason, frame)
    if "drop" in raw:
        flags = raw["drop"].fillna("").astype(str)
        _mark(reason, flags != "", "", flags)
    _mark_duplicates(reason, frame)
    out = [LeftOut(row=r, reason=why) for r, why in zip(frame["row"], reason, strict=True) if why]
    return frame[reason == ""].reset_index(drop=True), out


def _error_text(raw: pd.DataFrame) -> pd.Series:
    if "error" not in raw:
        return pd.Series("", index=raw.index)
    text = raw["error"].fillna("").astype(str).str.split("\n").str[0].str.slice(0, 120)
    return text.where(text == "", ": " + text)


def _optional(raw: pd.DataFrame, column: str) -> pd.Series:
    """A budget, a weight decay or a batch may be absent in rows of a table that has the column; N, D and L may not."""
    if column in ("N", "D", "L"):
        return pd.Series(False, index=raw.index)
    return raw[column].isna()


def _mark(reason: pd.Series, rows: pd.Series | np.ndarray, why: str, values: pd.Series | None = None) -> None:
    """Write `why` (and the offending value) where `rows` holds and no reason stands yet: the first rule broken is reported."""
    rows = np.asarray(rows, dtype=bool) & (reason == "").to_numpy()
    if not rows.any():
        return
    reason[rows] = why if values is None else [why + _short(v) for v in values[rows]]


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)[:160]


def _mark_absurd(reason: pd.Series, frame: pd.DataFrame) -> None:
    ok = reason == ""
    if ok.sum() < 3:
        return
    checks = (
        ("L", frame["L"], ABSURD_LOSS_FACTOR),
        ("N", frame["N"], ABSURD_SIZE_FACTOR),
        ("D", frame["D"], ABSURD_SIZE_FACTOR),
        ("C/(N·D)", frame["C"] / (frame["N"] * frame["D"]), ABSURD_FLOPS_FACTOR),
    )
    for name, values, factor in checks:
        middle = values[ok].median()
        if np.isfinite(middle):
            far = (values > middle * factor) | (values < middle / factor)
            _mark(reason, far, f"{name} is absurd, over {factor:g}x from the table's median {middle:.4g}: ", values)


def _mark_duplicates(reason: pd.Series, frame: pd.DataFrame) -> None:
    ok = frame[reason == ""]
    named = ok[ok["run_id"] != ""]
    again = named.duplicated("run_id")
    if again.any():
        first = named.drop_duplicates("run_id").set_index("run_id")
        for index in named.index[again]:
            twin = first.loc[named.loc[index, "run_id"]]
            kind = "duplicate of" if twin["L"] == named.loc[index, "L"] else "same run_id with another loss as"
            reason[index] = f"{kind} {twin['row']}"
        ok = frame[reason == ""]
    key = pd.util.hash_pandas_object(ok[ok["run_id"] == ""].drop(columns=["row", "run_id", "name"]), index=False)
    again = key.duplicated()
    if again.any():
        first_row = ok["row"].reindex(key.index).groupby(key).transform("first")
        reason[key.index[again]] = [f"duplicate of {row}" for row in first_row[again]]
