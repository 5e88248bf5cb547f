"""A sweep in the terminal: one line a finished trial, a progress bar with the time left, a traceback once."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn

from analysis.words import plural, was_were
from nanochat_model.record import RunRecord
from nanoladder.cells import Trial
from nanoladder.listen import Listener, SweepProgress
from nanoladder.space import format_values


class TerminalLines(Listener):
    """Prints what is worth a line."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._seen: set[str] = set()
        self._skipped = 0
        self.failed: set[str] = set()  # runs that ended so
        self._known: set[str] = set()  # runs that were counted: a later round, or another sweep, meets them again

    def on_failure(self, trial: Trial, error: str, traceback: str, retry: bool) -> None:
        self._console.print(
            f"[red]failed[/]  {escape(trial.name)}: {escape(error)}{'; one more try' if retry else ''}", soft_wrap=True
        )
        kind = traceback.strip().splitlines()[-1] if traceback.strip() else ""
        if kind and kind not in self._seen:
            self._seen.add(kind)
            self._console.print(f"[dim]{escape(traceback.rstrip())}[/]", soft_wrap=True)

    def on_record(self, trial: Trial, record: RunRecord, new: bool) -> None:
        met = trial.run_id in self._known
        self._known.add(trial.run_id)
        if not new:
            self._skipped += not met
            return
        if record.status == "failed":
            self.failed.add(trial.run_id)
            return
        loss = "–" if record.val_bpb is None else f"{record.val_bpb:.4f}"
        values = format_values(trial.values)
        line = f"{trial.sweep} [bold]{escape(trial.cell)}[/] {escape(values)}".rstrip()
        seed = f" seed {trial.seed}" if trial.seed else ""
        status = "" if record.status == "complete" else f" {record.status}"
        self._console.print(
            f"bpb [bold]{loss}[/]  {line}{seed}  [dim]{format_seconds(record.train_seconds)}[/]{status}", soft_wrap=True
        )

    def on_end(self) -> None:
        if self._skipped:
            self._console.print(f"[dim]{plural(self._skipped, 'run')} {was_were(self._skipped)} recorded already[/]")
        self._skipped = 0


@contextlib.contextmanager
def progress_bar(console: Console, what: str) -> Iterator[tuple[Console, _Bar]]:
    """A bar at the bottom of a terminal; nowhere else. Yields the console to print lines with, and the bar to call."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[text]}"))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=1.0, text="")
        yield progress.console, _Bar(progress, task)


class _Bar:
    def __init__(self, progress: Progress, task: object) -> None:
        self._progress, self._task = progress, task

    def __call__(self, state: SweepProgress) -> None:
        share = state.flops_done / state.flops_total if state.flops_total else 1.0
        self._progress.update(self._task, completed=share, text=format_progress(state))  # type: ignore[arg-type]


def format_progress(state: SweepProgress) -> str:
    parts = [f"{state.done}/{state.total}"]
    if state.running:
        parts.append(f"{state.running} running")
    if state.failed:
        parts.append(f"{state.failed} failed")
    if state.best is not None and state.best.val_bpb is not None:
        parts.append(f"best {state.best.val_bpb:.4f}")
    if state.eta_seconds is not None and state.done < state.total:
        parts.append(f"{format_seconds(state.eta_seconds)} left")
    return ", ".join(parts)


def format_seconds(seconds: float) -> str:
    """`8.2 s`, `3 min 05 s`, `2 h 10 min`, `3.1 days`."""
    if not math.isfinite(seconds):
        return "?"
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{int(seconds // 60)} min {int(seconds % 60):02d} s"
    if seconds < 48 * 3600:
        return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60):02d} min"
    return f"{seconds / 86400:.1f} days"
