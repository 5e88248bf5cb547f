"""Which column of somebody's table is which quantity."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
import pandas as pd

from analysis.clean import NUMBER_COLUMNS
from analysis.errors import DataError
from analysis.numbers import COUNTS, to_numbers
from analysis.read_table import header_unit
from analysis.words import plural

CONVENTIONS = ("matrices_lm_head", "all", "matrices")
# What a mapping may name -> the standard column. Keys are what people call them on a command line.
KEYS = {
    "params": "N", "tokens": "D", "loss": "L", "budget": "budget", "flops": "C", "batch": "B", "lr": "lr",
    "weight_decay": "weight_decay", "width": "width", "depth": "depth", "seed": "seed", "group": "group", "outlier": "outlier",
    "sweep": "sweep", "stage": "stage", "purpose": "purpose", "run_id": "run_id", "status": "status", "name": "name",
    "comparable": "comparable_hash", "sequence_len": "sequence_len", "seconds": "seconds", "device": "device",
    "params_all": "N_all", "params_matrices": "N_matrices", "params_matrices_lm_head": "N_matrices_lm_head",
}  # fmt: skip
# Column names recognised without a mapping, in order of preference; case, spaces and punctuation do not matter.
ALIASES = {
    "params": (
        "N", "params", "num_params", "n_params", "parameters", "Model Size", "num_parameters", "n_parameters", "model_params",
        "param_count", "parameter_count", "non_embedding_params", "params_no_embed", "num_scaling_params",
    ),
    "tokens": (
        "D", "tokens", "num_tokens", "n_tokens", "Training Tokens", "train_tokens", "tokens_trained", "tokens_seen",
        "n_train_tokens", "num_train_tokens", "dataset_size", "data_size", "token_count",
    ),
    "loss": (
        "L", "loss", "val_loss", "val_bpb", "bpb", "final_loss", "eval_loss", "validation_loss", "final_val_loss", "test_loss",
        "valid_loss", "cross_entropy", "nll",
    ),
    "budget": ("budget", "flops_budget", "compute_budget", "isoflop_budget"),
    "flops": ("C", "flops", "train_flops", "Training FLOP", "compute", "total_flops", "training_flops"),
    "batch": ("B", "batch", "batch_tokens", "batch_size_tokens", "total_batch_size"),
    "lr": ("lr", "learning_rate", "matrix_lr", "eta"),
    "weight_decay": ("weight_decay", "wd", "lambda"),
    "width": ("width", "model_dim", "d_model", "n_embd", "hidden_size", "h"),
    "depth": ("depth", "num_layers", "n_layer"),
    "seed": ("seed",),
    "group": ("group", "trunk"),
    "sweep": ("sweep",),
    "purpose": ("purpose",),
    "status": ("status",),
    "run_id": ("run_id",),
    "sequence_len": ("sequence_len",),
}  # fmt: skip
STEPLAW_COLUMNS = ("lr", "bs", "loss", "sl", "ti")
QUANTITIES = MappingProxyType({"params": "the parameters N", "tokens": "the training tokens D", "loss": "the loss L"})


def _plain(column: str) -> str:
    """Val Loss, val-loss and val_loss are one name; single letters are not guessed at, units (M), (B) are no part of it."""
    short = re.sub(r"[^a-z0-9]", "", header_unit(column)[0].lower())
    return short if len(short) > 2 else column


def choose_columns(raw: pd.DataFrame, mapping: Mapping[str, str], where: str) -> tuple[dict[str, str], list[str]]:
    """{key of KEYS: column of `raw`} and notes on what was guessed. DataError on unknown keys and missing columns."""
    notes: list[str] = []
    chosen: dict[str, str] = {}
    for key, column in mapping.items():
        if key not in KEYS:
            raise DataError(f"mapping names {key!r}, which is unknown; known: {', '.join(KEYS)}")
        chosen[key] = _named(raw, key, column, where, notes)
    for a, b in (("params", "tokens"), ("params", "loss"), ("tokens", "loss")):
        if a in chosen and chosen[a] == chosen.get(b):
            raise DataError(f"{where}: {a} and {b} both name column {chosen[a]!r}; they are different quantities")
    if "loss" not in chosen and set(STEPLAW_COLUMNS) <= set(raw.columns):
        chosen["loss"] = "sl"
        notes.append("loss: the smoothed column 'sl' (the raw last-step loss has 1.4% noise); map loss to choose another")
    for key, names in ALIASES.items():
        if key not in chosen:
            free = [c for c in raw.columns if c not in chosen.values()]
            plain = {_plain(c): c for c in reversed(free)}
            found = [n for n in names if n in free] or [plain[_plain(n)] for n in names if _plain(n) in plain]
            if found:
                chosen[key] = found[0]
    counted = any(f"params_{c}" in chosen for c in CONVENTIONS)
    for key, what in QUANTITIES.items():
        if key not in chosen and not (key == "params" and counted):
            raise DataError(f"{where}: no column for {what}; name it (--{key} COLUMN); columns: {_listed(raw)}")
    for column in sorted(set(raw.attrs.get("repeated", ())) & set(chosen.values())):
        notes.append(f"column {column!r} stands more than once in the header: the first is used")
    return chosen, notes


def _named(raw: pd.DataFrame, key: str, column: str, where: str, notes: list[str]) -> str:
    """The column that a mapping names; another spelling (case, spaces, punctuation) is taken where only one fits."""
    if column in raw.columns:
        return column
    bare = re.sub(r"[^a-z0-9]", "", column.lower())
    alike = [c for c in raw.columns if bare and re.sub(r"[^a-z0-9]", "", str(c).lower()) == bare]
    if len(alike) == 1:
        notes.append(f"{key}: column {alike[0]!r} for {column!r}")
        return str(alike[0])
    near = difflib.get_close_matches(column, [str(c) for c in raw.columns], 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise DataError(f"{where}: no column {column!r} (for {key}){hint}; columns: {_listed(raw)}")


def _listed(raw: pd.DataFrame) -> str:
    return ", ".join(map(str, raw.columns[:40])) + (f" and {len(raw.columns) - 40} more" if len(raw.columns) > 40 else "")


def standard_frame(raw: pd.DataFrame, chosen: Mapping[str, str], notes: list[str]) -> pd.DataFrame:
    """The chosen columns under their standard names, numbers read as people write them, counts in the unit their header names.
    What is no number keeps its text, for the reason why its row is left out. Appends to `notes`."""
    frame = pd.DataFrame({KEYS[key]: raw[column] for key, column in chosen.items()}, index=raw.index)
    units = {KEYS[key]: header_unit(str(column)) for key, column in chosen.items()}
    for column in [c for c in frame.columns if c in NUMBER_COLUMNS]:
        count = column in COUNTS
        numbers, read = to_numbers(frame[column], counts=count, decimal_comma=raw.attrs.get("sep") == ";")
        if read:
            frame[column] = frame[column].where(numbers.isna(), numbers)
            how = "separated thousands, a decimal comma, a suffix (26.9M) or a power of ten"
            notes.append(f"{column}: {plural(read, 'value')} written with {how}")
        factor = units[column][1]
        if count and factor != 1.0:
            frame[column] = frame[column].where(numbers.isna(), numbers * factor)
            notes.append(f"{column}: multiplied by {factor:g}, as its column's name says")
    if "budget" in frame:
        frame["budget"] = _label_budgets(frame, notes)
    return frame


def _label_budgets(frame: pd.DataFrame, notes: list[str]) -> pd.Series:
    """Budgets given as names (small, medium …): the geometric mean of their runs' compute. Numbers stay as they are."""
    given = frame["budget"]
    labels = given.dropna().astype(str)
    numbers = pd.to_numeric(given, errors="coerce")
    if numbers.notna().any() or labels.nunique() > max(1, len(labels) // 2):
        return given
    values = {c: pd.to_numeric(frame[c], errors="coerce") for c in ("N", "D", "C") if c in frame}
    if not ("C" in values or {"N", "D"} <= set(values)):
        return given
    compute = values["C"] if "C" in values else 6.0 * values["N"] * values["D"]
    logs = np.log(compute.where((compute > 0) & np.isfinite(compute)))
    notes.append(f"budgets are names ({', '.join(labels.unique()[:5])}): each is the geometric mean of its runs' FLOPs")
    return np.exp(logs.groupby(given).transform("mean"))
