"""RunTable: one row a run, the standard columns, and every row that was left out with its reason."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.budgets import assign_budgets
from analysis.clean import LeftOut, clean
from analysis.columns import CONVENTIONS, choose_columns, standard_frame
from analysis.errors import DataError
from analysis.read_table import read_table
from analysis.records import read_records
from analysis.words import BITS_PER_BYTE, plural

NO_CONVENTION = "as given"
USUAL_FLOPS_FACTOR = 10.0  # C/(N·D) lies within this of 6, whatever N counts
NANOCHAT_COLUMNS = (
    "flops_budget", "depth", "model_dim", "params_wte", "params_value_embeds", "params_lm_head", "params_transformer",
    "params_total", "tokens_trained", "val_bpb",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class RunTable:
    """Usable runs and the rest.

    `frame` has the columns of analysis.clean (numbers as float, NaN where unknown): N scaling parameters in `convention`,
    D training tokens, C training FLOPs, L validation loss or bpb, budget (FLOPs, NaN where a run belongs to none), B batch in
    tokens, lr, weight_decay, width, depth, seed … `curves[run_id]` is an array (points, 5): step, tokens, FLOPs, seconds,
    bpb. `inside[run_id]` is what analysis.records.inside_of gives. `hash` changes when any number that a law could read changes.
    """

    frame: pd.DataFrame
    left_out: tuple[LeftOut, ...] = ()
    source: str = ""
    convention: str = NO_CONVENTION
    loss_name: str = "loss"  # what people call L
    notes: tuple[str, ...] = ()
    curves: Mapping[str, np.ndarray] = field(default_factory=dict)
    inside: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.frame)

    @property
    def hash(self) -> str:
        numbers = self.frame.drop(columns=["row", "name", "device", "seconds"], errors="ignore")
        rows = np.sort(pd.util.hash_pandas_object(numbers, index=False).to_numpy())
        return hashlib.sha256(rows.tobytes() + self.convention.encode()).hexdigest()[:16]

    @property
    def conventions(self) -> tuple[str, ...]:
        """Ways of counting N that every row knows; empty for a table that gives one N."""
        return tuple(c for c in CONVENTIONS if len(self.frame) and self.frame[f"N_{c}"].notna().all())

    def with_convention(self, convention: str) -> RunTable:
        """The same runs with N counted in another way. DataError when the table does not have that count."""
        if convention == self.convention:
            return self
        if convention not in self.conventions:
            have = ", ".join(self.conventions) or "none (the table gives one N)"
            raise DataError(f"no count of parameters named {convention!r} in this table; it has {have}")
        return replace(self, frame=self.frame.assign(N=self.frame[f"N_{convention}"]), convention=convention)

    def keep(self, rows: pd.Series | np.ndarray, reason: str) -> RunTable:
        """Only the rows where `rows` (n,) holds; the others are listed with `reason`."""
        rows = np.asarray(rows, dtype=bool)
        gone = tuple(LeftOut(row=r, reason=reason) for r in self.frame["row"][~rows])
        return replace(self, frame=self.frame[rows].reset_index(drop=True), left_out=self.left_out + gone)

    def only_comparable(self, force: Sequence[str] = ()) -> RunTable:
        """Refuse to mix runs whose validation set, packing or sequence length differ.

        With one comparable_hash in the table nothing happens. With several, DataError names them, unless `force` names
        which to use: one keeps those runs only, several mix them all the same.
        """
        counts = self.frame["comparable_hash"].value_counts()
        unknown = [h for h in force if h not in counts.index]
        if unknown:
            raise DataError(f"no runs with comparable_hash {unknown[0]!r}; the table has {', '.join(map(repr, counts.index))}")
        if force:
            return self.keep(self.frame["comparable_hash"].isin(list(force)), "another validation set, packing or sequence length")
        if len(counts) > 1:
            kinds = ", ".join(f"{h or 'unknown'!r} ({plural(n, 'run')})" for h, n in counts.items())
            raise DataError(
                f"runs of {len(counts)} kinds that are not comparable (validation set, packing or sequence length differ): "
                f"{kinds}; name the one to use, or name several to mix them in spite of it"
            )
        return self

    def left_out_frame(self) -> pd.DataFrame:
        return pd.DataFrame([x.as_dict() for x in self.left_out], columns=["row", "reason"])


def table_from_frame(
    raw: pd.DataFrame,
    *,
    source: str,
    convention: str | None = None,
    loss_name: str | None = None,
    left_out: Iterable[LeftOut] = (),
    notes: Iterable[str] = (),
    curves: Mapping[str, np.ndarray] | None = None,
) -> RunTable:
    """Clean raw rows that already have the standard column names; find budgets and FLOPs that the table does not give.

    C is the FLOPs column where there is one, else the budget, else 6·N·D. `convention` picks N among the N_* columns; with one, L
    is called bits per byte, as in records, unless `loss_name` says otherwise. Raises DataError when no row is usable, with the
    first reasons.
    """
    raw = raw.reset_index(drop=True)
    notes = list(notes)
    if "row" not in raw:
        raw = raw.assign(row=[f"row {i + 1}" for i in range(len(raw))])
    if convention is not None:
        raw = raw.assign(N=raw[f"N_{convention}"])
    frame, gone = clean(raw)
    gone = [*left_out, *gone]
    if frame.empty:
        reasons = "; ".join(f"{x.row}: {x.reason}" for x in gone[:3]) or "the table is empty"
        raise DataError(f"{source}: no usable run among {len(gone)} ({reasons})")
    given = frame["budget"].to_numpy() if frame["budget"].notna().any() else None
    nominal = 6.0 * frame["N"] * frame["D"]
    if frame["C"].isna().any():
        where = "the budget column where it has one, else 6·N·D" if given is not None else "6·N·D"
        notes.append(f"{plural(int(frame['C'].isna().sum()), 'run')} without a FLOPs column: C is {where}")
    compute = frame["C"].fillna(frame["budget"]).fillna(nominal)
    notes += _unit_note(compute / (frame["N"] * frame["D"]))
    budget, how = assign_budgets(compute.to_numpy(), given)
    notes.append(f"budgets: {how}")
    frame = frame.assign(C=compute, budget=budget, group=frame["group"].where(frame["group"] != "", frame["run_id"]))
    return RunTable(
        frame=frame,
        left_out=tuple(gone),
        source=source,
        convention=convention or NO_CONVENTION,
        loss_name=loss_name or ("loss" if convention is None else BITS_PER_BYTE),
        notes=tuple(notes),
        curves=dict(curves or {}),
    )


def _unit_note(per_token: pd.Series) -> list[str]:
    """C/(N·D) is 6 give or take attention and what N counts; far from it a column has another unit, which D/N then shows too."""
    middle = float(per_token.median())
    if not np.isfinite(middle) or 6 / USUAL_FLOPS_FACTOR <= middle <= 6 * USUAL_FLOPS_FACTOR:
        return []
    return [f"C/(N·D) is {middle:.3g}, where 6 is usual: N, D or C have another unit, and so have N*, D* and D/N"]


def load_records(paths: str | Path | Sequence[str | Path], *, convention: str = "matrices_lm_head") -> RunTable:
    """Our own run records: folders searched for record.json, or the files themselves. Torn files and other schemas are listed
    as left out. DataError when nothing is usable."""
    if convention not in CONVENTIONS:
        raise DataError(f"convention {convention!r} is unknown; known: {', '.join(CONVENTIONS)}")
    rows, curves, left_out = read_records(paths)
    name = _name_of([Path(p) for p in ([paths] if isinstance(paths, (str, Path)) else paths)])
    if not rows:
        raise DataError(f"{name}: no readable run record ({left_out[0].row}: {left_out[0].reason})")
    inside = {row["run_id"]: row.pop("inside") for row in rows}
    table = table_from_frame(pd.DataFrame(rows), source=name, convention=convention, left_out=left_out, curves=curves)
    return replace(table, inside=inside)


def _name_of(paths: Sequence[Path]) -> str:
    """What a table of these paths is called in a message: the path itself, or the folder that holds them all."""
    if len(paths) == 1:
        return str(paths[0])
    return f"{len(paths)} records under {os.path.commonpath([p.absolute() for p in paths])}"


def load_csv(
    path: str | Path,
    mapping: Mapping[str, str] | None = None,
    *,
    drop_outliers: str | None = None,
    sequence_len: int | None = None,
) -> RunTable:
    """Anybody's table of runs: CSV (or .tsv, .parquet).

    `mapping`: what (params, tokens, loss, budget, flops, batch, lr, weight_decay, width, seed, group …: KEYS) -> column name.
    What it does not name is looked for under usual names (ALIASES). N, D and B are counts (parameters, tokens, tokens);
    `sequence_len` multiplies a batch that is given in sequences. `drop_outliers` names a column: rows where it is true are
    listed and left out. Raises DataError on a missing file or column.
    """
    raw = read_table(Path(path))
    if mapping is None and set(NANOCHAT_COLUMNS) <= set(raw.columns):
        return _nanochat_table(raw, str(path))
    chosen, notes = choose_columns(raw, dict(mapping or {}), str(path))
    frame = standard_frame(raw, chosen, notes)
    convention = None if "params" in chosen else next(c for c in CONVENTIONS if f"params_{c}" in chosen)
    if sequence_len is not None and "B" in frame:
        frame["B"] = pd.to_numeric(frame["B"], errors="coerce") * sequence_len
    if "outlier" not in frame:
        flags = [c for c in raw.columns if c.lower() in ("outlier", "is_outlier", "epoch_outlier")]
        if flags:
            frame["outlier"] = _as_bool(raw[flags[0]])
            notes.append(f"column {flags[0]!r} flags {int(frame['outlier'].sum())} outliers; they are kept unless dropped by name")
    else:
        frame["outlier"] = _as_bool(frame["outlier"])
    if drop_outliers is not None:
        if drop_outliers not in raw.columns:
            raise DataError(f"{path}: no column {drop_outliers!r} to drop outliers by; columns: {', '.join(map(str, raw.columns))}")
        frame["drop"] = np.where(_as_bool(raw[drop_outliers]), f"flagged in column {drop_outliers}", "")
    frame["row"] = [f"row {line}" for line in raw.index]  # line of the file
    return table_from_frame(frame, source=str(path), convention=convention, loss_name=loss_name_of(chosen["loss"]), notes=notes)


def load_nanochat_results(path: str | Path, *, convention: str = "matrices_lm_head") -> RunTable:
    """results.csv of nanochat's scaling-law script. A core_score of exactly 0 means that it was not measured there."""
    raw = read_table(Path(path))
    missing = [c for c in NANOCHAT_COLUMNS if c not in raw.columns]
    if missing:
        raise DataError(f"{path}: not nanochat's results.csv, column {missing[0]!r} is missing; use load_csv with a mapping")
    return _nanochat_table(raw, str(path)).with_convention(convention)


def loss_name_of(column: str) -> str:
    """What the loss in somebody's column is called: bits per byte where its name says so."""
    return BITS_PER_BYTE if "bpb" in column.lower() else "loss"


def _as_bool(values: pd.Series) -> pd.Series:
    return values.map(lambda v: str(v).strip().lower() in ("true", "1", "1.0", "yes")).astype(bool)


def _nanochat_table(raw: pd.DataFrame, source: str) -> RunTable:
    matrices, head = (pd.to_numeric(raw[c], errors="coerce") for c in ("params_transformer", "params_lm_head"))
    tables = sum(pd.to_numeric(raw[c], errors="coerce") for c in ("params_wte", "params_value_embeds"))
    core = pd.to_numeric(raw["core_score"], errors="coerce") if "core_score" in raw else pd.Series(np.nan, index=raw.index)
    frame = pd.DataFrame(
        {
            "row": [f"row {line}" for line in raw.index],
            "N_matrices_lm_head": matrices + head, "N_all": raw["params_total"], "N_matrices": matrices,
            "D": raw["tokens_trained"], "L": raw["val_bpb"], "budget": raw["flops_budget"], "C": raw["flops_budget"],
            "width": raw["model_dim"], "depth": raw["depth"], "core": core.where(core != 0),
            "seconds": raw.get("train_time_sec", pd.Series(np.nan, index=raw.index)),
            "embedding_share": tables / pd.to_numeric(raw["params_total"], errors="coerce"),
        }
    )  # fmt: skip
    return table_from_frame(frame, source=source, convention="matrices_lm_head", notes=["nanochat's results.csv"])
