"""nanoladder doctor: is this machine, or every node of a cluster, fit to train?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nanoladder.cli.common import Json, print_json

if TYPE_CHECKING:
    from nanoladder.doctor import Examination


@dataclass(frozen=True, kw_only=True)
class Doctor:
    """Check this machine, or every node of a cluster: devices, driver, torch's build, attention kernels, bf16 and fp8, bandwidth
    between ranks, disk, shared memory, open ports, token, clock. Each finding comes with what helps.

    Exit status 0: fit, perhaps with warnings. 1: an error, or with --strict a warning.

    Example: nanoladder doctor --address http://127.0.0.1:8265 --storage /shared/runs
    """

    address: str = ""
    """A cluster: its dashboard's URL, or auto on a node of it; left out: this machine."""
    storage: str = ""
    """Root folder whose disk is checked."""
    quick: bool = False
    """Leave out what is timed: matrix products and collectives."""
    strict: bool = False
    """Warnings count as errors for the exit status."""
    json: Json = False

    def run(self) -> int:
        from nanoladder.doctor import examine, worst

        if self.address:
            from nanoladder.doctor_cluster import examine_cluster

            examinations = examine_cluster(self.address, self.storage, measure=not self.quick)
        else:
            examinations = [examine(self.storage, measure=not self.quick)]
        severity = worst(examinations)
        if self.json:
            print_json({"worst": severity, "examinations": [e.as_dict() for e in examinations]})
        else:
            show(examinations)
        return int(severity == "error" or (self.strict and severity == "warning"))


COLOURS = {"ok": "green", "warning": "yellow", "error": "red"}


def show(examinations: Sequence[Examination]) -> None:
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    for examination in examinations:
        table = Table(title=escape(examination.node), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("check", no_wrap=True)
        table.add_column("", no_wrap=True)
        table.add_column("found, and what helps")
        for f in examination.findings:
            colour = COLOURS[f.severity]
            text = escape(f.text) + (f"\n[bold]→[/] {escape(f.remedy)}" if f.remedy else "")
            table.add_row(f.check, f"[{colour}]{f.severity}[/]", text)
        console.print(table)
