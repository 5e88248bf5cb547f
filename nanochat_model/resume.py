"""Where a run starts: at zero, at its own newest checkpoint, or at a trunk's; and whether that is still the same run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nanochat_model.checkpoint import CHECKPOINTS_DIR, CheckpointError, CheckpointState, checkpoint_hash, find_latest, read_state
from nanochat_model.config import TrainConfig
from nanochat_model.errors import ConfigError
from nanochat_model.identity import NOT_IDENTITY
from nanochat_model.loop import Multipliers
from nanochat_model.overrides import dotted_keys
from nanochat_model.schedule import lr_multiplier, muon_momentum, weight_decay_multiplier

# How to treat the schedule when the horizon of a run in progress has changed:
#   refuse      an error (the default)
#   exact       go on if the new schedule agrees with the old one at every step already done; an error otherwise
#   follow_new  go on along the new schedule, although the steps already done followed the old one (tagged in the record)
HorizonChange = Literal["refuse", "exact", "follow_new"]
RESOLVED_KEYS = (
    "batch_tokens",
    "optimizer.weight_decay",
    *(f"optimizer.{g}_lr" for g in ("matrix", "embedding", "unembedding", "scalar")),
)
HORIZON_KEYS = ("num_steps", "schedule.warmdown_fraction", "schedule.final_lr_fraction")


@dataclass(frozen=True, kw_only=True)
class Start:
    """A checkpoint to go on from."""

    path: Path
    state: CheckpointState
    is_trunk: bool = False
    horizon_changes: tuple[str, ...] = ()  # inexact ones so far, oldest first


def multipliers_at(config: TrainConfig, step: int) -> Multipliers:
    """The schedules for the update that follows `step` finished ones."""
    return Multipliers(
        lr=lr_multiplier(step, config.num_steps, config.schedule),
        momentum=muon_momentum(step, config.num_steps, config.schedule),
        weight_decay=weight_decay_multiplier(step, config.num_steps, config.schedule),
    )


def differences(old: TrainConfig, new: TrainConfig) -> dict[str, str]:
    """Dotted keys that differ and determine the result, each with "old -> new"."""
    changed: dict[str, str] = {}
    for key in dotted_keys(old):
        a, b = _get(old, key), _get(new, key)
        if a != b and key not in NOT_IDENTITY:
            changed[key] = f"{a!r} -> {b!r}"
    return changed


def _get(config: TrainConfig, key: str) -> object:
    value: object = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def schedules_agree(old: TrainConfig, new: TrainConfig, num_steps: int) -> bool:
    """Whether both schedules give the same multipliers for the first `num_steps` updates."""
    return all(multipliers_at(old, k) == multipliers_at(new, k) for k in range(num_steps))


def check_same_run(old: TrainConfig, new: TrainConfig, step: int, horizon_change: HorizonChange, where: str) -> bool:
    """Whether the horizon changed, and `horizon_change` allows it. Raises ConfigError where `new` is another run than `old`, of
    which `step` steps are done; `where` names what was found of it."""
    changed = differences(old, new)
    if not changed:
        return False
    listed = "; ".join(f"{k} {v}" for k, v in changed.items())
    others = [k for k in changed if k not in HORIZON_KEYS]
    if others:
        remedy = "give another run folder, or resume with the config it has"
        if "num_steps" in changed and set(others) <= set(RESOLVED_KEYS):
            keep = " ".join(f"{k}={_get(old, k)}" for k in others)
            remedy += f"; to take this run to another horizon, set what the recipe derives from it: {keep}"
        raise ConfigError(f"{where} belongs to another config ({listed}); {remedy}")
    if horizon_change == "refuse":
        raise ConfigError(
            f"{where} was made for another horizon ({listed}); say how to treat the schedule with horizon_change: 'exact' (only if "
            "both schedules agree so far) or 'follow_new'"
        )
    if step > new.num_steps:
        raise ConfigError(
            f"{where} is at step {step}, past the new num_steps {new.num_steps}; raise num_steps or use an older checkpoint"
        )
    if horizon_change == "exact" and not schedules_agree(old, new, step):
        raise ConfigError(
            f"{where}: the schedules differ within the {step} steps done ({listed}), so the result would be neither run's; use "
            "schedule.kind constant_then_decay for trunks, or horizon_change 'follow_new'"
        )
    return True


def own_start(config: TrainConfig, run_dir: Path, horizon_change: HorizonChange) -> Start | None:
    """The newest intact checkpoint of this run folder, checked to belong to `config`."""
    path = find_latest(run_dir / CHECKPOINTS_DIR)
    if path is None:
        return None
    state = read_state(path)
    if state.config is None:
        raise CheckpointError(
            f"{path}: holds no training config (kind {state.kind}), so it cannot be resumed; give another run folder"
        )
    changes = tuple(state.extra.get("horizon_changes", ()))
    if check_same_run(state.config, config, state.step, horizon_change, str(path)) and horizon_change == "follow_new":
        changes += (f"num_steps {state.config.num_steps} -> {config.num_steps} at step {state.step}",)
    return Start(path=path, state=state, horizon_changes=changes)


def trunk_start(config: TrainConfig, path: Path) -> Start:
    """A trunk's checkpoint for `config`, whose schedule must agree with the trunk's up to it. Raises ConfigError where it does
    not, or where anything but the horizon differs."""
    state = read_state(path)
    if state.config is None:
        raise CheckpointError(f"{path}: holds no training config (kind {state.kind}), so nothing can decay from it")
    expected = f"{state.run_id}@{state.step}"
    if config.trunk != expected:
        raise ConfigError(f"{path} is {expected}, but config.trunk says {config.trunk!r}; give the checkpoint it was made for")
    changed = set(differences(state.config, config)) - set(HORIZON_KEYS) - {"trunk"}
    if changed:
        raise ConfigError(f"{path}: the trunk differs in {', '.join(sorted(changed))}; a decay may change only the horizon")
    if state.step >= config.num_steps:
        raise ConfigError(
            f"{path} is at step {state.step}, not before num_steps {config.num_steps}; decay from an earlier checkpoint"
        )
    if not schedules_agree(state.config, config, state.step):
        raise ConfigError(
            f"{path}: the decay's schedule differs from the trunk's before step {state.step}; both need schedule.kind "
            "constant_then_decay, and the trunk's own decay must begin later"
        )
    return Start(path=path, state=state, is_trunk=True)


def parent_hashes(parents: dict[str, str], start: Start | None) -> dict[str, str]:
    """Content hashes of what a run is made from: its data, and the trunk it branched off, now or before an interruption."""
    if start is None:
        return parents
    if start.is_trunk:
        return parents | {"trunk": checkpoint_hash(start.path)}
    return parents | {k: v for k, v in start.state.parents.items() if k == "trunk"}
