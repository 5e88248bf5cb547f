"""Arguments and output that several commands share."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, is_dataclass
from typing import TYPE_CHECKING, Annotated, Any

import tyro

if TYPE_CHECKING:
    from rich.table import Table

WIDEST = 240  # of a table in a pipe
Positional = tyro.conf.Positional
Json = Annotated[bool, tyro.conf.arg(help="Print JSON for a machine instead of a table.")]
Storage = Annotated[str, tyro.conf.arg(help="Root folder of data, runs and laws.", metavar="DIR")]
Overrides = Annotated[
    tuple[str, ...],
    tyro.conf.arg(
        name="set", metavar="KEY=VALUE ...", help="Strict overrides by dotted key, for example optimizer.matrix_lr=0.03."
    ),
]

# Options of several values, all commands' together.
OF_SEVERAL = (
    "--set", "--tasks", "--conversations", "--held-out", "--accept-law", "--without-law", "--comparable", "--allowed-host",
)  # fmt: skip


def together(args: Sequence[str]) -> list[str]:
    """`--set a=1 --yes --set b=2` as `--set a=1 b=2 --yes`: given twice, an option of several values would keep the last alone."""
    out: list[str] = []
    values: dict[str, list[str]] = {}  # by option, in their order
    current = out
    for arg in args:
        if arg.startswith("-"):
            name, sign, value = arg.partition("=")
            if name in OF_SEVERAL:
                if name not in values:
                    out.append(name)
                current = values.setdefault(name, [])
                current += [value] if sign else []
                continue
            current = out
        current.append(arg)
    return [part for arg in out for part in (arg, *values.get(arg, ()))]


def to_plain(value: Any) -> Any:
    """Dataclasses, tuples and non-finite numbers as what JSON can hold."""
    if is_dataclass(value) and not isinstance(value, type):
        return to_plain(asdict(value))
    if isinstance(value, dict):
        return {str(k): to_plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def print_json(value: Any) -> None:
    print(json.dumps(to_plain(value), indent=2))


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, title: str = "", right: Sequence[str] = ()) -> None:
    """A plain table on stdout; `right` names the columns to align right. Where a terminal is too narrow, cells are wrapped between
    words; where that is not enough, and in a pipe, which has no width, every row is one line of its own length."""
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.measure import Measurement
    from rich.table import Table

    table = Table(title=escape(title) or None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", no_wrap=True)
    for row in rows:
        table.add_row(*map(escape, row))
    console, wide = Console(), Console(width=WIDEST)
    if console.is_terminal and Measurement.get(wide, wide.options, table).maximum > console.width:
        _wrap(table, True)
        fits = Measurement.get(wide, wide.options, table).minimum <= console.width
        _wrap(table, fits)
        console = console if fits else wide
    (console if console.is_terminal else wide).print(table)


def _wrap(table: Table, allowed: bool) -> None:
    for column in table.columns:
        column.no_wrap = not allowed


def human(value: float | None, digits: int = 3) -> str:
    """12,345,678 as "12.3M"; small numbers in scientific notation."""
    if value is None:
        return "–"
    if value == 0 or not math.isfinite(value):
        return str(value)
    for limit, letter in ((1e15, "e"), (1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value:.{digits}g}" if letter == "e" else f"{value / limit:.{digits}g}{letter}"
    return f"{value:.{digits}g}"


def duration(seconds: float) -> str:
    """Seconds as "45 s", "12 min" or "35.8 h"."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
