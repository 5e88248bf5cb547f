"""What a simulation assumes of the machines and of everything that is not training. All of it is shown beside the result."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from nanochat_model.errors import ConfigError
from nanoladder.handout import MAX_PENDING
from nanoladder.trial_needs import total_need


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """Nodes that are booked from the start of a sweep to its end. The head, where the driver runs, is not one of them and
    does not fail."""

    device: str
    num_nodes: int
    devices_per_node: int
    mtbf_hours: float = math.inf  # of one node: exponential, so a node never ages
    repair_hours: float = 0.5  # until a node that failed, or its replacement, is back
    price_per_device_hour: float | None = None  # dollars

    def __post_init__(self) -> None:
        for name in ("num_nodes", "devices_per_node"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name.replace('num_', '')} {getattr(self, name)} must be at least 1")
        if not self.mtbf_hours > 0:
            raise ConfigError(f"mtbf_hours {self.mtbf_hours} must be positive: hours from one failure of a node to its next")
        if not 0 <= self.repair_hours < math.inf:
            raise ConfigError(f"repair_hours {self.repair_hours} must be 0 or more hours")
        if self.price_per_device_hour is not None and not 0 <= self.price_per_device_hour < math.inf:
            raise ConfigError(f"price {self.price_per_device_hour} must be 0 or more dollars a device and hour")

    @property
    def num_devices(self) -> int:
        return self.num_nodes * self.devices_per_node


@dataclass(frozen=True, kw_only=True)
class Overheads:
    """Seconds that are not training."""

    driver: float = 0.2  # of the driver a trial, one after another: 0.19 measured over 2,000 trials (bench/sweep_overhead.py)
    process: float = 4.0  # to start a trial's process: measured on two busy CPU cores (bench/simulate_check.py); idle ones are
    # used again
    pending: int = MAX_PENDING  # trials that wait for a place or a process at a time
    imports: float = 4.0  # of torch and the rest in a new process, beside others: measured there
    train_start: float = 15.0  # of Ray Train's workers: measured on two CPU cores
    detect: float = 30.0  # until Ray gives up a node that no longer answers: assumed
    command: float = 20.0  # to start a command: imports, Ray, studies: assumed
    stage: float = 2.0  # to start Tune anew for the next stage of a command: assumed
    checkpoint_bytes_per_second: float = 1e9  # assumed
    start: float | None = None  # until a trial's first step; None: from recorded runs on the device, else assumed

    def __post_init__(self) -> None:
        for name in ("driver", "process", "imports", "train_start", "detect", "command", "stage", "start"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ConfigError(f"overhead {name} {value} must be 0 or more seconds")
        if self.pending < 1:
            raise ConfigError(f"overhead pending {self.pending} must be at least 1 trial")
        if not self.checkpoint_bytes_per_second > 0:
            raise ConfigError(f"checkpoint_bytes_per_second {self.checkpoint_bytes_per_second} must be positive")


@dataclass(frozen=True, kw_only=True)
class Workers:
    """How the workers of a sweep's trials lie on the nodes; all of its trials are alike in this."""

    per_worker: Mapping[str, float]  # of Ray's resources
    count: int  # of one trial
    node: Mapping[str, float]  # what one node has of these resources
    device: str  # which of them is a device

    @property
    def need(self) -> dict[str, float]:
        return total_need(self.per_worker, self.count)

    @property
    def slots_per_node(self) -> int:
        """Workers that fit a node."""
        return min(int(self.node[k] / v + 1e-6) for k, v in self.per_worker.items() if v > 0 and math.isfinite(self.node[k]))

    @property
    def devices_per_slot(self) -> float:
        return self.per_worker[self.device]

    def capacity_of(self, num_nodes: int) -> dict[str, float]:
        return {k: v * num_nodes for k, v in self.node.items()}


@dataclass(frozen=True, kw_only=True)
class Job:
    """What one run takes, in seconds on devices of median speed."""

    seconds: float  # of training and evaluation
    start: float = 0.0  # from its process to its first step
    own_process: bool = True  # trained in the process that Tune starts; False: in workers of Ray Train
    save_every: float = math.inf  # seconds of training between checkpoints; inf: none is written
    save_seconds: float = 0.0

    def saves_in(self, wall: float) -> int:
        """Checkpoints within `wall` seconds of training, the last one at its end."""
        return 0 if math.isinf(self.save_every) else max(1, math.ceil(wall / self.save_every - 1e-9))

    def seconds_from(self, done: float, slowdown: float) -> float:
        """From the first step to the end, where `done` seconds are saved and devices are slower by `slowdown`."""
        wall = (self.seconds - done) * slowdown
        return wall + self.saves_in(wall) * self.save_seconds

    def saved_at(self, elapsed: float) -> int:
        """Checkpoints that are whole so many seconds after the first step."""
        return 0 if math.isinf(self.save_every) else int(elapsed / (self.save_every + self.save_seconds) + 1e-9)
