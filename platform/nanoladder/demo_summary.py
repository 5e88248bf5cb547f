"""The demo's last screen: the laws, what came of them in plain words, where the report is, and what to try next."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from nanoladder.law_table import law_rows
from nanoladder.stages import Facts
from nanoladder.workspace import Workspace

UNIT = "bits per byte"


def print_summary(console: Console, workspace: Workspace, facts: Mapping[str, Facts], production: Mapping[str, Any]) -> None:
    """Print all of it. `production` is what `outcomes.read_production` says."""
    laws = Table(title="Laws", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    laws.add_column("law")
    laws.add_column("value", min_width=19)  # a factor such as (D/2.79e+05)^0.148 is not broken
    laws.add_column("90% interval")
    laws.add_column("status", max_width=12 if console.width < 100 else None)
    for row in law_rows(workspace.laws_path):
        laws.add_row(*map(Text, (*row[:3], row[3].replace("_", " "))))
    console.print()
    console.print(laws)
    found = Table.grid(padding=(0, 2, 0, 0))
    found.add_column(no_wrap=True)
    found.add_column()
    for name, text in findings(facts, production):
        found.add_row(name, Text(text))
    console.print("[bold]What came out[/]\n")
    console.print(found)
    console.print(f"\n[bold]Report[/]           open in a browser: {escape(str(workspace.report_path))}", soft_wrap=True)
    console.print("\n[bold]Go on[/]")
    for why, commands in further_commands(workspace, Path(facts["sft"]["folder"])):
        console.print(f"\n  [dim]# {why}[/]")
        for command in commands:
            console.print(f"  {command}", soft_wrap=True, markup=False)
    console.print()


def findings(facts: Mapping[str, Facts], production: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What was found, as (what, sentence)."""
    for i, line in enumerate(promotion_lines(facts["promotion"]["promotions"])):
        yield "" if i else "Promotion", line
    yield "Production loss", production_line(production)
    for i, task in enumerate(facts["chat_eval"]["tasks"]):
        yield "" if i else "Chat evaluation", task_line(task)
    yield "Chat", f"asked: {facts['chat']['prompt']}"
    reply = facts["chat"]["reply"]
    yield "", f"reply: {' '.join(reply.split()) or '(nothing)'}"
    if "«" in reply:
        yield "", "(« » holds what it asked its calculator and what came back; #### marks its final answer)"


def promotion_lines(promotions: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line a verdict, the stages in their order."""
    return [f"{p['stage']}: {p['verdict']} “{p['change']}”, {p['reason'].removeprefix(p['verdict'] + ': ')}" for p in promotions]


def production_line(production: Mapping[str, Any]) -> str:
    """Prediction against result of the production run."""
    predicted, low, high, measured = (production[k] for k in ("predicted", "low", "high", "measured"))
    if predicted is None:
        return f"no prediction, measured {measured:.4f} {UNIT}"
    interval = f" [{low:.4f}, {high:.4f}]" if low is not None else " without an interval"
    off = f"{abs(measured / predicted - 1):.1%} {'lower' if measured < predicted else 'higher'}"
    where = "" if low is None else ", inside the interval" if low <= measured <= high else ", outside the interval"
    return f"predicted {predicted:.4f}{interval} before it ran, measured {measured:.4f} {UNIT}: {off}{where}"


def task_line(task: Mapping[str, Any]) -> str:
    """How many of a task's unseen problems were right, beside guessing where that is worth anything."""
    guessing = f"; guessing gets {task['random_baseline']:.0%}" if task["random_baseline"] else ""
    share = f"{task['num_correct']} of {task['num_problems']} unseen problems right"
    return f"{task['task']}: {share} ({task['accuracy']:.0%}{guessing})"


def further_commands(workspace: Workspace, chat_model: Path) -> list[tuple[str, list[str]]]:
    """Commands to look further by what they are for, with the programs that exist beside this one, ready to paste."""
    root, model = short(workspace.root), short(chat_model)
    nanoladder, mlflow, optuna = (short(Path(sys.executable).parent / name) for name in ("nanoladder", "mlflow", "optuna"))
    plan = ("plan", "--depth", "12", "--device", "h100", "--num-devices", "8", "--price", "2.5")
    groups = (
        ("talk to the model, in the terminal or in a browser",
         [(nanoladder, "chat", "--checkpoint", model), (nanoladder, "serve", model)]),
        ("every run; their curves; the searches",
         [(nanoladder, "runs", "--storage", root), (mlflow, "ui", "--backend-store-uri", workspace.mlflow_uri),
          (optuna, "studies", "--storage", workspace.optuna_uri)]),
        ("what a real one takes", [(nanoladder, *plan)]),
    )  # fmt: skip
    return [(why, [shlex.join(map(str, command)) for command in commands]) for why, commands in groups]


def short(path: Path) -> str:
    """The path from here where it lies below, else in full."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)
