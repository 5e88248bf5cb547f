"""Progress of a staged job: live bars on a terminal, plain lines in a log."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from nanoladder.stages import Facts, Stage

LOG_EVERY_SECONDS = 15.0


class StageDisplay:
    """Context manager. One line a stage; the running one has a bar, its detail and its clock."""

    def __init__(self, num_stages: int, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False)
        self.num_stages = num_stages
        self.number = 0
        self.live: Progress | None = None

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self.live = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                TextColumn("{task.percentage:>3.0f}%"),
                TimeElapsedColumn(),
                TextColumn("{task.fields[detail]}", style="dim", markup=False),
                console=self.console,
                transient=True,
            )
            self.live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if self.live:
            self.live.stop()

    def start(self, stage: Stage) -> StageProgress:
        self.number += 1
        label = self._label(stage)
        if self.live is None:
            self.console.print(f"{label} ...")
            return StageProgress(self, label, None)
        return StageProgress(self, label, self.live.add_task(label, total=1.0, detail=""))

    def finish(self, stage: Stage, facts: Facts, seconds: float) -> None:
        self._close(f"[green]✓[/] {self._label(stage)}  {_summary(facts)}  [dim]{seconds:.1f} s[/]")

    def skip(self, stage: Stage, facts: Facts) -> None:
        self.number += 1
        self._close(f"[dim]✓ {self._label(stage)}  {_summary(facts)}  (done before)[/]")

    def _close(self, line: str) -> None:
        if self.live:
            for task in self.live.task_ids:
                self.live.remove_task(task)
        self.console.print(line, soft_wrap=True)

    def _label(self, stage: Stage) -> str:
        return f"{self.number:>2}/{self.num_stages} {escape(stage.title)}"


def _summary(facts: Facts) -> str:
    return escape(str(facts.get("summary", "")))  # a reply or a path may hold what reads like markup


class StageProgress:
    """Progress of the running stage."""

    def __init__(self, display: StageDisplay, label: str, task: TaskID | None) -> None:
        self.display = display
        self.label = label
        self.task = task
        self.logged_at = time.monotonic()

    def update(self, done: float, total: float, text: str = "") -> None:
        live = self.display.live
        share = min(1.0, done / total) if total > 0 else 0.0
        if live is not None and self.task is not None:
            live.update(self.task, completed=share, detail=text)
        elif time.monotonic() - self.logged_at > LOG_EVERY_SECONDS:
            self.logged_at = time.monotonic()
            self.display.console.print(f"{self.label}  {share:4.0%}  {escape(text)}", soft_wrap=True)
