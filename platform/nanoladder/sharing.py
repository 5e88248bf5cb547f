"""Several small trials on one accelerator: whether they fit, by arithmetic and by one probe step, before any of them starts.

Ray's fractional GPUs schedule and isolate nothing. So each trial's process is held to its share by torch's own allocator
(runtime.memory_share), and a trial that needs more halves its own micro-batch instead of breaking its neighbours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from nanochat_model.config import RuntimeConfig, TrainConfig
from nanochat_model.errors import ConfigError
from nanochat_model.hardware import find_device
from nanochat_model.memory import USABLE_SHARE, estimate_memory
from nanoladder.cells import planned_trials
from nanoladder.own_devices import see_own_devices
from nanoladder.sweep import Sweep
from nanoladder.watchdog import not_placed

if TYPE_CHECKING:
    from nanochat_model.probe import Probe  # brings torch, which the driver does not need


def check_estimate(sweep: Sweep, cell: str, config: TrainConfig, memory_bytes: float) -> None:
    """ConfigError where even one row of `config` would, by arithmetic, not fit a trial's share of a card of `memory_bytes`."""
    need = _one_row(config)
    room = memory_bytes * USABLE_SHARE / sweep.trials_per_device
    if need > room:
        raise ConfigError(
            f"sweep {sweep.name}, cell {cell}: a trial needs {_gb(need)} by estimate and 1/{sweep.trials_per_device} of "
            f"{sweep.device or 'the device'} offers {_gb(room)}; {_remedy(int(memory_bytes * USABLE_SHARE / need))}"
        )


def check_probe(sweep: Sweep, cell: str, probe: Probe, memory_bytes: float) -> None:
    """ConfigError where the probe step took more than a trial's share of a card of `memory_bytes`."""
    room = memory_bytes / sweep.trials_per_device
    if probe.micro_batch_rows == 0 or probe.peak_bytes > room:
        took = (
            "does not fit with a single row"
            if probe.micro_batch_rows == 0
            else f"took {_gb(probe.peak_bytes)} with {probe.micro_batch_rows} rows"
        )
        fitting = int(memory_bytes / probe.peak_bytes) if probe.micro_batch_rows else 0
        raise ConfigError(
            f"sweep {sweep.name}, cell {cell}: a probe step on {probe.device} {took}; 1/{sweep.trials_per_device} of it offers "
            f"{_gb(room)}; {_remedy(fitting)}"
        )


def fit_share(
    sweep: Sweep, runtime: RuntimeConfig, resources: Mapping[str, float], labels: Mapping[str, str], wait_seconds: float
) -> int:
    """Make sure that the sweep's largest trial fits its share, with one probe step on the cluster; the rows that fitted.

    Raises ConfigError where it does not, or where the probe was not placed within `wait_seconds`.
    """
    largest = max(planned_trials(replace(sweep, seeds=sweep.seeds[:1])), key=lambda trial: _one_row(trial.config))
    label, config = largest.cell, largest.config
    card = find_device(sweep.device) if sweep.device else None
    if card is not None:
        check_estimate(sweep, label, config, card.memory_bytes)
    probe = _probe_on_ray(sweep, config, runtime, resources, labels, wait_seconds)
    memory = probe.device_bytes or (card.memory_bytes if card is not None else None)
    if memory is not None:
        check_estimate(sweep, label, config, memory)
        check_probe(sweep, label, probe, memory)
    return probe.micro_batch_rows


def share_runtime(sweep: Sweep, runtime: RuntimeConfig) -> RuntimeConfig:
    return replace(runtime, memory_share=1.0 / sweep.trials_per_device)


class _Prober:
    """A process of its own on the cluster: its first answer says that it was placed, the second what a step took."""

    def placed(self) -> bool:
        see_own_devices()
        return True

    def step(self, config: TrainConfig, runtime: RuntimeConfig) -> Probe:
        from nanochat_model.probe import probe_step

        return probe_step(config, runtime)


def _probe_on_ray(
    sweep: Sweep,
    config: TrainConfig,
    runtime: RuntimeConfig,
    resources: Mapping[str, float],
    labels: Mapping[str, str],
    wait_seconds: float,
) -> Probe:
    import ray
    from ray.exceptions import GetTimeoutError, RayError, RayTaskError

    options: dict[str, Any] = {"num_cpus": resources.get("CPU", 0), "num_gpus": resources.get("GPU", 0), "max_restarts": 0}
    if labels:
        options["label_selector"] = dict(labels)
    prober: Any = ray.remote(**options)(_Prober).remote()
    try:
        ray.get(prober.placed.remote(), timeout=wait_seconds)
        return ray.get(prober.step.remote(config, runtime))
    except GetTimeoutError:
        waited = f"the probe step of sweep {sweep.name} waited {wait_seconds:.0f} s"
        have, free = ray.cluster_resources(), ray.available_resources()
        raise ConfigError(not_placed(waited, resources, labels, have, free)) from None
    except RayError as e:
        cause = e.cause if isinstance(e, RayTaskError) else None
        raise RuntimeError(f"the probe step of sweep {sweep.name} failed: {cause or e}") from None
    finally:
        ray.kill(prober)


def _one_row(config: TrainConfig) -> float:
    return estimate_memory(config.model, micro_batch_rows=1, compute_dtype=config.compute_dtype).total


def _remedy(fitting: int) -> str:
    return f"set trials_per_device to {fitting}" if fitting > 1 else "leave trials_per_device at 1, or take a larger card"


def _gb(value: float) -> str:
    return f"{value / 1e9:.2f} GB"
