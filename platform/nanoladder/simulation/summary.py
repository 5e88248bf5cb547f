"""A simulation for people and for machines: every number with its interval, every assumption beside it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from nanoladder.ladder import Ladder
from nanoladder.pool import MAX_ATTEMPTS
from nanoladder.simulation.runs import HOUR, LEVEL, MAX_COMMANDS, Setting, Simulated, intervals
from nanoladder.sweep import ADAPTIVE, Sweep
from nanoladder.terminal import format_seconds

KIND_LABELS = {
    "useful": "training that counts",
    "slow": "lost to slow devices",
    "start": "start-up and driver",
    "save": "saving checkpoints",
    "lost": "work undone by failures",
    "down": "nodes down",
    "idle": "idle",
}

TIMES = (("wall-clock", "wall_hours"), ("  the longest run", "longest_run_hours"))


def summarise(target: Sweep | Ladder, setting: Setting, simulated: Sequence[Simulated], spread_source: str) -> dict[str, Any]:
    """Everything `nanoladder simulate --json` prints. Intervals: median and central 90% over seeds."""
    fleet, workers = setting.fleet, setting.workers
    return {
        "sweep": target.name,
        "question": target.question,
        "device": fleet.device,
        "nodes": fleet.num_nodes,
        "devices_per_node": fleet.devices_per_node,
        "mtbf_hours": fleet.mtbf_hours if math.isfinite(fleet.mtbf_hours) else None,
        "price_per_device_hour": fleet.price_per_device_hour,
        "stages": [p.sweep.name for p in setting.phases],
        "runs": simulated[0].runs,
        "trials_at_a_time": workers.slots_per_node * fleet.num_nodes // workers.count,
        "seeds": len(simulated),
        "level": LEVEL,
        "results": intervals(simulated, fleet.price_per_device_hour),
        "assumptions": assumptions(target, setting, spread_source),
    }


def assumptions(target: Sweep | Ladder, setting: Setting, spread_source: str) -> list[str]:
    """What the numbers rest on, one sentence each."""
    fleet, o = setting.fleet, setting.overheads
    lines = [f"speed: {source}" for source in sorted(setting.jobs.sources)]
    lines.append(f"speed of devices: {spread_source}; the slowest of a trial's devices sets its pace")
    if math.isfinite(fleet.mtbf_hours):
        lines.append(
            f"each node fails after {fleet.mtbf_hours:g} h on average (exponential), is noticed after {o.detect:g} s and back "
            f"after {fleet.repair_hours:g} h; head and driver do not fail"
        )
    else:
        lines.append("no node fails; --mtbf-hours says how often one does")
    lines.append(
        f"a run is tried {MAX_ATTEMPTS} times in a command; the command is then given again at once ({o.command:g} s), up to "
        f"{MAX_COMMANDS} times"
    )
    lines.append(
        f"{o.driver:g} s of the driver a trial; {o.process:g} s to start a process, {o.pending} at a time, {o.imports:g} s for its "
        f"imports; {o.train_start:g} s for Ray Train; checkpoints at {o.checkpoint_bytes_per_second / 1e9:g} GB/s"
    )
    lines.append("the fleet is booked from the first start to the last end; memory is not checked (--dry-run does)")
    return lines + _of_target(target, setting)


def _of_target(target: Sweep | Ladder, setting: Setting) -> list[str]:
    lines = []
    if isinstance(target, Ladder):
        lines.append("every candidate of a ladder's stage is adopted, or as many as --winners says: the most it can cost")
    elif target.adaptive is not None:
        lines.append("the cells of later rounds are chosen on a published loss surface (arXiv 2203.15556)")
    elif target.extend_edges:
        inside = setting.phases[0].edges == "inside"
        lines.append(
            "the best values lie inside their ranges (--edges outside: as bad as it gets)" if inside else "all ranges grow twice"
        )
    sweeps = [p.sweep for p in setting.phases]
    if any(s.sampler_of(c) in ADAPTIVE for s in sweeps for c in s.cells):
        lines.append("candidates of a sampler that learns are drawn at random from its space")
    if any(s.pruning != "none" for s in sweeps):
        lines.append("nothing is pruned")
    return lines


def print_summary(facts: Mapping[str, Any]) -> None:
    from nanoladder.cli.common import print_table

    results: Mapping[str, Mapping[str, float]] = facts["results"]
    booked = results["booked_device_hours"]["median"]

    def row(label: str, name: str, show: Any) -> tuple[str, ...]:
        r = results[name]
        return (label, show(r["median"]), f"{show(r['low'])} … {show(r['high'])}", "")

    rows = [row(label, name, lambda h: format_seconds(h * HOUR)) for label, name in TIMES]
    rows.append(row("utilization", "utilization", _percent))
    if "dollars" in results:
        rows.append(row("cost", "dollars", lambda v: f"${v:,.0f}"))
    rows += [row(f"{facts['device']} hours booked", "booked_device_hours", _hours)]
    for kind, label in KIND_LABELS.items():
        label, median, interval, _ = row(f"  {label}", f"{kind}_device_hours", _hours)
        share = results[f"{kind}_device_hours"]["median"] / booked if booked else 0.0
        rows.append((label, median, interval, _percent(share)))
    rows += [row(name.replace("_", " "), name, lambda v: f"{v:.0f}") for name in ("node_failures", "failed_attempts", "commands")]
    if results["unfinished"]["high"] > 0:
        rows.append(row("runs never finished", "unfinished", lambda v: f"{v:.0f}"))
    title = f"{facts['sweep']}: {facts['runs']} runs on {facts['nodes']} × {facts['devices_per_node']} {facts['device']}"
    columns = ("", "median", f"{facts['level']:.0%} of {facts['seeds']} seeds", "share")
    print_table(columns, rows, title=f"{title}, {facts['trials_at_a_time']} at a time", right=columns[1:])
    print("Assumed:\n  " + "\n  ".join(facts["assumptions"]))


def _percent(share: float) -> str:
    return f"{share:.1%}"


def _hours(value: float) -> str:
    return f"{value:,.1f}"
