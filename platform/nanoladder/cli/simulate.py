"""nanoladder simulate: a sweep on a fleet before the fleet is booked."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro

from nanochat_model.errors import ConfigError
from nanochat_model.hardware import require_device
from nanochat_model.overrides import parse_overrides
from nanoladder.cli.common import Json, Overrides, Storage, print_json
from nanoladder.job_context import default_storage
from nanoladder.ladder import Ladder
from nanoladder.simulation.fleet import Fleet, Overheads
from nanoladder.simulation.jobs import JobMaker, speed_spread, workers_of
from nanoladder.simulation.phases import Assumed, phases
from nanoladder.simulation.runs import Setting, simulate, simulate_once, typical
from nanoladder.sweep import Sweep
from nanoladder.workspace import Workspace


@dataclass(frozen=True, kw_only=True)
class FleetOptions:
    nodes: int = 1
    device: str = ""
    """mi300x, h100 …, or cpu; left out: the sweep's."""
    devices_per_node: int = 8
    mtbf_hours: float = math.inf
    """Mean hours between two failures of one node."""
    repair_hours: float = 0.5
    """Until a node that failed is back or replaced."""
    price: float | None = None
    """Dollars a device and hour."""
    cpus_per_node: int = 0
    """0: never the bottleneck of a node with accelerators."""


@dataclass(frozen=True, kw_only=True)
class SpeedOptions:
    mfu: float | None = None
    """Share of the peak to assume, 0 to 1; left out: recorded runs on the device, else the planner's assumption."""
    speed_spread: float | None = None
    """Standard deviation of the logarithm of a device's speed; left out: from recorded runs, else 0.04."""
    start_seconds: float | None = None
    """From a trial's process to its first step; left out: from recorded runs, else 30 s (accelerators) or 0.5 s."""
    driver_seconds: float = Overheads.driver
    """Of the driver a trial, one after another."""
    process_seconds: float = Overheads.process
    """To start a trial's process."""
    detect_seconds: float = Overheads.detect
    """Until a lost node is noticed."""
    checkpoint_gbytes_per_second: float = Overheads.checkpoint_bytes_per_second / 1e9


@dataclass(frozen=True, kw_only=True)
class Simulate:
    """How long a sweep or ladder takes on a fleet, how full the fleet is, what failures and slow devices take, what it costs.

    A discrete-event simulation by the rules of the real scheduler; intervals over random seeds. Nothing runs. What is recorded
    under the storage root is skipped, and recorded runs on the device tell its speed.

    Example: nanoladder simulate sweeps/ladder.py --nodes 32 --device mi300x --devices-per-node 8 --mtbf-hours 200 --price 2
    """

    sweep: tyro.conf.Positional[str]
    """A file that defines SWEEP, a Sweep or a Ladder."""
    fleet: FleetOptions = field(default_factory=FleetOptions)
    speed: SpeedOptions = field(default_factory=SpeedOptions)
    max_concurrent: int | None = None
    """Trials at a time, as with the sweep itself; left out: as many as fit."""
    seeds: int = 20
    """Simulated sweeps, each with its own failures and slow devices."""
    edges: Literal["inside", "outside"] = "inside"
    """Where best values turn out to lie: inside their ranges, or outside, so that ranges grow as often as they may."""
    winners: int = -1
    """Candidates that each stage of a ladder adopts; -1: all."""
    html: str = ""
    """Write a timeline of nodes, runs and failures (of the seed with the median time) to this file."""
    storage: Storage = field(default_factory=default_storage)
    set: Overrides = ()
    json: Json = False

    def run(self) -> int:
        from nanoladder.simulation.summary import print_summary, summarise

        target = self.target()
        setting, spread_source = self.setting(target)
        simulated = simulate(setting, self.seeds, progress=_progress)
        facts = summarise(target, setting, simulated, spread_source)
        if self.html:
            self.draw(setting, typical(simulated), facts)
        if self.json:
            print_json(facts)
        else:
            print_summary(facts)
            if self.html:
                print(f"timeline: {self.html}")
        return 0

    def target(self) -> Sweep | Ladder:
        from nanoladder.settings import apply_settings
        from nanoladder.sweep_command import load_sweep

        target = load_sweep(self.sweep)
        if not isinstance(target, Sweep | Ladder):
            raise ConfigError(f"{self.sweep} is a fine-tuning; simulate takes a Sweep or a Ladder of pretraining runs")
        return apply_settings(target, parse_overrides(self.set))

    def setting(self, target: Sweep | Ladder) -> tuple[Setting, str]:
        """What all seeds share, and where the spread of speeds comes from. Raises ConfigError on whatever cannot be."""
        from nanoladder.cells import check_sweep
        from nanoladder.execute import recent_records, shards_of

        workspace, fleet, overheads = Workspace(self.storage), self._fleet(target), self._overheads()
        known = [target] if isinstance(target, Sweep) else [target.stage_sweep(s, target.variants) for s in target.stages]
        sizes = {c.model.vocab_size for s in known for c in s.cells}
        built = (workspace.shards_dir / "manifest.json").is_file() and sizes == {workspace.vocab_size}  # else of other sweeps
        data = {s.name: shards_of(s, workspace) if built else None for s in known}
        for sweep in known:
            check_sweep(sweep, data[sweep.name])
        recent = recent_records(workspace)
        spread, source = self._spread(fleet, recent)
        setting = Setting(
            phases=phases(target, Assumed(edges=self.edges, winners=self.winners), data),
            fleet=fleet,
            workers=workers_of(known[0], fleet, cpus_per_node=self.fleet.cpus_per_node),
            overheads=overheads,
            jobs=JobMaker(fleet=fleet, overheads=overheads, records=recent, mfu=self.speed.mfu),
            spread=spread,
            recorded={r.run_id: r for r in workspace.records()} if built else {},
            max_concurrent=self.max_concurrent,
        )
        return setting, source

    def draw(self, setting: Setting, seed: int, facts: dict[str, object]) -> None:
        from nanoladder.simulation.figure import write_figure

        title = f"{facts['sweep']} on {facts['nodes']} × {facts['devices_per_node']} {facts['device']}, seed {seed}"
        shown = simulate_once(setting, seed, keep_bars=True)
        write_figure(shown, setting.fleet, setting.workers, title, Path(self.html))

    def _fleet(self, target: Sweep | Ladder) -> Fleet:
        if not (self.fleet.device or target.device):
            raise ConfigError(f"{target.name} names no device; give --device, for example --device mi300x")
        if self.fleet.device not in ("", "cpu"):
            require_device(self.fleet.device)
        if self.max_concurrent is not None and self.max_concurrent < 1:
            raise ConfigError(f"max_concurrent {self.max_concurrent} must be at least 1 trial at a time")
        return Fleet(
            device=self.fleet.device or target.device,
            num_nodes=self.fleet.nodes,
            devices_per_node=self.fleet.devices_per_node,
            mtbf_hours=self.fleet.mtbf_hours,
            repair_hours=self.fleet.repair_hours,
            price_per_device_hour=self.fleet.price,
        )

    def _overheads(self) -> Overheads:
        return Overheads(
            driver=self.speed.driver_seconds,
            process=self.speed.process_seconds,
            detect=self.speed.detect_seconds,
            start=self.speed.start_seconds,
            checkpoint_bytes_per_second=self.speed.checkpoint_gbytes_per_second * 1e9,
        )

    def _spread(self, fleet: Fleet, records: Sequence) -> tuple[float, str]:
        given = self.speed.speed_spread
        if given is None:
            return speed_spread(fleet.device, records)
        if not 0 <= given < 1:
            raise ConfigError(f"speed_spread {given} must lie in 0..1: 0.04 is 4% between devices")
        return given, f"given: {given:.0%} between devices"


def _progress(seeds: Sequence[int]) -> Iterable[int]:
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    return track(seeds, description="simulating", console=console, transient=True, disable=not console.is_terminal)
