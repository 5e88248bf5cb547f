"""Status files as tables, and the request that ends a sweep."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from nanochat_model.errors import ConfigError
from nanoladder.cli.common import WIDEST
from nanoladder.live_status import ALIVE, STATUS_FILE, read_status
from nanoladder.space import format_values
from nanoladder.stopping import request_stop
from nanoladder.terminal import format_seconds
from nanoladder.workspace import Workspace

REFRESH_SECONDS = 2.0
SHOWN_FAILURES = 5
TEXT_COLUMNS, SHORT_COLUMNS = ("sweep", "stage", "state", "best"), ("running", "done", "failed")
WORDS = {
    "lost": "driver died; its command goes on",
    "stopped": "stopped on request",
}

Statuses = list[dict[str, Any]]


def read_statuses(workspace: Workspace, name: str = "", *, price: float | None = None) -> Statuses:
    """Status of the sweep `name`, of the stages of the ladder `name`, or of all sweeps under the root, in the order of their start.

    Adds `alive`, `device_hours` (recorded, running and failed attempts) and `cost_dollars` (of `price` dollars a device-hour).
    Raises ConfigError where there is none of that name.
    """
    if workspace.remote:
        from nanoladder.remote_steering import fetch_statuses

        fetch_statuses(workspace)
    root = workspace.root / "sweeps"
    found = [s for p in sorted(root.rglob(STATUS_FILE)) if (s := read_status(p.parent)) is not None]
    mine = [s for s in found if not name or s["sweep"] == name or s["sweep"].startswith(f"{name}/")]
    if name and not mine:
        known = ", ".join(s["sweep"] for s in found) or "none"
        raise ConfigError(f"no sweep {name!r} has run under {workspace.root} (there are: {known}); give one of these, or --storage")
    now = time.time()
    for status in mine:
        held = sum(now - row["started_at"] for row in status["running"]) if status["state"] in ALIVE else 0.0
        seconds = status["device_seconds"] + status["lost_device_seconds"] + held * status["devices_per_trial"]
        status["alive"] = status["state"] in ALIVE
        status["device_hours"] = seconds / 3600
        status["cost_dollars"] = None if price is None else seconds / 3600 * price
    return sorted(mine, key=lambda s: s["started_at"])


def show(statuses: Statuses, *, detail: bool) -> None:
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDEST)
    console.print(render(statuses, detail=detail, width=console.width))


def watch(read: Callable[[], Statuses], *, detail: bool) -> None:
    """Show what `read` returns until nothing is alive. Ctrl-C leaves; the sweeps go on."""
    console = Console()
    with Live(console=console, auto_refresh=False) as live:
        while True:
            statuses = read()
            live.update(render(statuses, detail=detail, width=console.width), refresh=True)
            if not any(s["alive"] for s in statuses):
                return
            time.sleep(REFRESH_SECONDS)


def render(statuses: Statuses, *, detail: bool, width: int = WIDEST) -> RenderableType:
    """The table of sweeps; with `detail`, or where something runs, also running trials and why others failed. Where `width`
    characters are too few for all columns, the best of each sweep stands below the table, and if need be stages are left out."""
    if not statuses:
        return Text("no sweep has run under this storage root")
    wide = Console(width=WIDEST)
    tables = [_sweeps(statuses, without) for without in ((), ("best",), ("best", "stage"))]
    fitting = [t for t in tables if Measurement.get(wide, wide.options, t).maximum <= width]
    parts: list[RenderableType] = [(fitting or tables[-1:])[0]]
    parts += [Text(f"best of {s['sweep']}: {_best(s)}") for s in statuses if s["best"] and tables[0] not in parts]
    parts += [Text("lost: the driver died; its command goes on")] if any(s["state"] == "lost" for s in statuses) else []
    parts += [_running(s) for s in statuses if s["running"] and s["alive"]]
    for status in statuses:
        if status["failures"] and (detail or status["alive"]):
            parts += [_failure(f) for f in status["failures"][-SHOWN_FAILURES:]]
    return Group(*parts)


def _sweeps(statuses: Statuses, without: Sequence[str]) -> Table:
    """A row a sweep, `without` these columns."""
    rows = [{k: v for k, v in _row(s).items() if k not in without} for s in statuses]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for name in rows[0]:
        table.add_column(name, justify="left" if name in TEXT_COLUMNS else "right", overflow="fold", no_wrap=name in SHORT_COLUMNS)
    for row in rows:
        table.add_row(*map(escape, row.values()))
    return table


def _row(s: dict[str, Any]) -> dict[str, str]:
    return {
        "sweep": s["sweep"],
        "stage": s["stage"] or "–",
        "state": s["state"],
        "running": str(len(s["running"]) if s["alive"] else 0),
        "done": f"{s['done']}/{s['total']}",
        "failed": str(s["failed"]),
        "best": _best(s),
        "left": format_seconds(s["eta_seconds"]) if s["alive"] and s["eta_seconds"] is not None else "–",
        "device\nhours": f"{s['device_hours']:.3g}",
        **({"cost": f"${s['cost_dollars']:,.2f}"} if s["cost_dollars"] is not None else {}),
    }


def _best(status: dict[str, Any]) -> str:
    best = status["best"]
    if best is None:
        return "–"
    what = f"{best['cell']} {format_values(best['values'])}".strip()
    return f"{best['value']:.4f} {what}"


def _running(status: dict[str, Any]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("running")
    for column in ("step", "bpb", "tokens/s", "MFU", "since"):
        table.add_column(column, justify="right")
    for r in status["running"]:
        again = f" (attempt {r['attempt']})" if r["attempt"] > 1 else ""
        bpb = "–" if r["val_bpb"] is None else f"{r['val_bpb']:.4f}"
        speed = "–" if r["tokens_per_second"] is None else f"{r['tokens_per_second']:,.0f}"
        mfu = "–" if r["mfu"] is None else f"{r['mfu']:.0%}"
        since = format_seconds(time.time() - r["started_at"])
        table.add_row(escape(r["name"] + again), f"{r['step']}/{r['num_steps']}", bpb, speed, mfu, since)
    return table


def _failure(failure: dict[str, Any]) -> Text:
    more = "; tried once more" if failure["retried"] else ""
    return Text.assemble(("failed ", "red"), f"{failure['name']}: {failure['error']}{more}")


def stop_sweep(workspace: Workspace, name: str, *, now: bool, wait_seconds: float) -> dict[str, Any]:
    """Ask every live driver of `name` (a sweep, or a ladder's stages) to end, and wait. Raises ConfigError where none runs."""
    alive = [s["sweep"] for s in read_statuses(workspace, name) if s["alive"]]
    if not alive:
        states = ", ".join(f"{s['sweep']} ({WORDS.get(s['state'], s['state'])})" for s in read_statuses(workspace, name))
        raise ConfigError(f"nothing of {name} is running: {states}; there is nothing to stop")
    for sweep in alive:
        request_stop(workspace.sweep_dir(sweep), now=now)
        if workspace.remote:
            from nanoladder.remote_steering import send_request

            send_request(workspace, sweep)
    deadline = time.monotonic() + wait_seconds
    while True:
        statuses = [s for s in read_statuses(workspace, name) if s["sweep"] in alive]
        ended = not any(s["alive"] for s in statuses)
        if ended or time.monotonic() >= deadline:
            return {"ended": ended, "sweeps": _brief(statuses)}
        time.sleep(REFRESH_SECONDS if workspace.remote else 0.5)


def _brief(statuses: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: s[k] for k in ("sweep", "state", "done", "total", "failed")} for s in statuses]
