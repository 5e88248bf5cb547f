"""How many files of a data set a run needs: tokens × bytes a token, over what packing keeps and validation leaves."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nanochat_model.config import GPTConfig
from nanochat_model.errors import ConfigError
from nanoladder.download import Downloaded, Source, State, download, text_bytes
from nanoladder.plan import BYTES_PER_TOKEN, make_plan

VAL_FRACTION = 0.05  # of the documents, which `nanoladder data` keeps for validation


def bytes_for_plan(path: Path) -> float:
    """Bytes of training text that a plan (output of `nanoladder plan --json`) reads once. Raises ConfigError."""
    try:
        plan = json.loads(path.read_text(encoding="utf8"))
        return float(plan["data_bytes"])
    except FileNotFoundError:
        raise ConfigError(f"no plan at {path}; write one with: nanoladder plan --depth 24 --json > {path}") from None
    except (json.JSONDecodeError, KeyError, TypeError, ValueError):
        raise ConfigError(f"{path} is no plan (data_bytes is missing); write one with: nanoladder plan --json > {path}") from None


def bytes_for_depth(depth: int) -> float:
    """As `bytes_for_plan`, of nanochat's recipe at a depth."""
    return make_plan(GPTConfig.from_depth(depth)).data_bytes


def bytes_for_tokens(num_tokens: float) -> float:
    if not 0 < num_tokens < math.inf:
        raise ConfigError(f"tokens {num_tokens} must be positive and finite")
    return num_tokens * BYTES_PER_TOKEN


def files_needed(wanted_bytes: float, text_bytes_per_file: float, *, val_fraction: float = VAL_FRACTION) -> int:
    """Files whose training part holds `wanted_bytes` of text."""
    return max(1, math.ceil(wanted_bytes / (1 - val_fraction) / text_bytes_per_file))


def fetch_needed(
    source: Source,
    folder: Path,
    wanted_bytes: float,
    *,
    workers: int = 8,
    check: bool = False,
    progress: Callable[[State], None] | None = None,
    val_fraction: float = VAL_FRACTION,
    **options: Any,
) -> tuple[Downloaded, str]:
    """Enough files for `wanted_bytes` of training text, and a line that says how that was computed.

    The first file is fetched and its text measured, since a file's size says little about the text in it.
    """
    first = download(source, folder, num_files=1, workers=1, check=check, **options)
    per_file = text_bytes(folder / first.files[0]["name"])
    if not per_file:
        raise ConfigError(f"{first.files[0]['name']} holds no text; choose another data set")
    number = files_needed(wanted_bytes, per_file, val_fraction=val_fraction)
    note = (
        f"{wanted_bytes / 1e9:.3g} GB of training text: {number} files of {per_file / 1e6:,.1f} MB of text (the first one "
        f"measured), {val_fraction:.0%} of it kept for validation"
    )
    if number > len(source.files):
        passes = number / len(source.files)
        note += f"; the data set has only {len(source.files)}, so the run will read it {passes:.1f} times"
    return download(source, folder, num_files=number, workers=workers, progress=progress, **options), note
