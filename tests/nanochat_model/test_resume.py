"""Interrupted runs go on with the same tokens and, on the same ranks and micro-batch, the same bits; trunks branch exactly."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_run import RUNTIME, tiny_config

from nanochat_model.callbacks import Callback, StepInfo
from nanochat_model.checkpoint import CHECKPOINTS_DIR, checkpoint_hash, read_model_state, step_dir
from nanochat_model.config import RuntimeConfig, TrainConfig
from nanochat_model.errors import ConfigError
from nanochat_model.identity import run_id
from nanochat_model.loader import Loader
from nanochat_model.record import RunRecord
from nanochat_model.resume import schedules_agree
from nanochat_model.train import decay_config, decay_from, pretrain, rewind

SAVING = dataclasses.replace(RUNTIME, checkpoint_every_steps=3)


class Losses(Callback):
    def __init__(self, crash_at: int = -1) -> None:
        self.losses: dict[int, float] = {}
        self.crash_at = crash_at

    def on_step(self, info: StepInfo) -> None:
        if info.step == self.crash_at:
            raise InterruptedError
        self.losses[info.step] = info.train_loss


def crash(config: TrainConfig, run_dir: Path, at: int, runtime: RuntimeConfig = SAVING) -> Losses:
    losses = Losses(crash_at=at)
    with pytest.raises(InterruptedError):
        pretrain(config, runtime, run_dir=run_dir, callbacks=[losses])
    return losses


def finish(config: TrainConfig, run_dir: Path, runtime: RuntimeConfig = SAVING, **options) -> tuple[RunRecord, Losses]:
    losses = Losses()
    return pretrain(config, runtime, run_dir=run_dir, callbacks=[losses], **options), losses


def final_weights(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    return read_model_state(step_dir(run_dir / CHECKPOINTS_DIR, step))


@pytest.mark.parametrize("crash_at", [2, 4, 8])
def test_resumed_losses_are_identical_to_the_bit(tmp_path: Path, crash_at: int) -> None:
    config = tiny_config(eval__every_steps=4)
    whole, reference = finish(config, tmp_path / "whole")
    crash(config, tmp_path / "cut", crash_at)
    record, resumed = finish(config, tmp_path / "cut")
    assert min(resumed.losses) == (crash_at - 1) // 3 * 3 + 1, "starts after the newest checkpoint"
    assert resumed.losses == {k: v for k, v in reference.losses.items() if k in resumed.losses}
    assert record.val_bpb == whole.val_bpb and record.run_id == whole.run_id
    assert [(p.step, p.val_bpb, p.train_loss) for p in record.curve] == [(p.step, p.val_bpb, p.train_loss) for p in whole.curve]
    a, b = final_weights(tmp_path / "whole", 12), final_weights(tmp_path / "cut", 12)
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_resume_with_another_micro_batch_sees_the_same_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[int, np.ndarray] = {}
    real = Loader.batch

    def spy(self, k, rank=0, world_size=1):
        inputs, targets = real(self, k, rank, world_size)
        seen[k] = inputs.copy()
        return inputs, targets

    monkeypatch.setattr(Loader, "batch", spy)
    config = tiny_config()
    _, reference = finish(config, tmp_path / "whole")
    expected = dict(seen)
    crash(config, tmp_path / "cut", 5)
    seen.clear()
    _, resumed = finish(config, tmp_path / "cut", dataclasses.replace(SAVING, micro_batch_rows=3))
    assert sorted(seen) == list(range(3, 12))
    assert all(np.array_equal(seen[k], expected[k]) for k in seen)
    for k, loss in resumed.losses.items():
        assert loss == pytest.approx(reference.losses[k], rel=2e-5)


def test_killed_between_checkpoint_and_record(tmp_path: Path) -> None:
    """Everything is done but the record is missing: it is made without another step or evaluation."""
    first, _ = finish(tiny_config(), tmp_path)
    (tmp_path / "record.json").unlink()
    again, losses = finish(tiny_config(), tmp_path)
    assert losses.losses == {} and again.val_bpb == first.val_bpb and again.status == "complete"


def test_damaged_checkpoint_means_the_one_before(tmp_path: Path) -> None:
    config = tiny_config()
    _, reference = finish(config, tmp_path / "whole")
    crash(config, tmp_path / "cut", 8)
    newest = step_dir(tmp_path / "cut" / CHECKPOINTS_DIR, 6) / "model.safetensors"
    newest.write_bytes(newest.read_bytes()[:-100])
    _, resumed = finish(config, tmp_path / "cut")
    assert min(resumed.losses) == 4 and resumed.losses[12] == reference.losses[12]


def test_a_changed_horizon_is_refused_unless_told_how(tmp_path: Path) -> None:
    crash(tiny_config(), tmp_path, 8)
    longer = tiny_config(num_steps=20)
    with pytest.raises(ConfigError, match=r"another horizon \(num_steps 12 -> 20\).*horizon_change"):
        finish(longer, tmp_path)
    with pytest.raises(ConfigError, match=r"to take this run to another horizon, .*: optimizer.weight_decay=0.05$"):
        finish(tiny_config(num_steps=20, optimizer__weight_decay=0.03), tmp_path, horizon_change="follow_new")
    with pytest.raises(ConfigError, match="schedules differ"):
        finish(longer, tmp_path, horizon_change="exact")
    with pytest.raises(ConfigError, match="past the new num_steps 5"):
        finish(tiny_config(num_steps=5), tmp_path, horizon_change="follow_new")
    record, losses = finish(longer, tmp_path, horizon_change="follow_new")
    assert min(losses.losses) == 7 and record.num_tokens == longer.num_tokens
    assert record.tags == {"horizon_changes": "num_steps 12 -> 20 at step 6"}
    (tmp_path / "record.json").unlink()
    assert finish(longer, tmp_path)[0].tags == record.tags, "not forgotten when it is resumed again"


def test_a_finished_trunk_can_be_lengthened_exactly(tmp_path: Path) -> None:
    """Without a decay so far, the longer run is the one that would have been."""
    trunk = {"schedule__kind": "constant_then_decay", "schedule__warmdown_fraction": 0.0}
    finish(tiny_config(**trunk, num_steps=6), tmp_path / "grown")
    grown, _ = finish(tiny_config(**trunk, num_steps=9), tmp_path / "grown", horizon_change="exact")
    whole, _ = finish(tiny_config(**trunk, num_steps=9), tmp_path / "whole")
    assert grown.val_bpb == whole.val_bpb and grown.run_id == whole.run_id


def test_rewind_goes_back_and_keeps_what_it_leaves(tmp_path: Path) -> None:
    runtime = dataclasses.replace(SAVING, keep_last=9)
    first, reference = finish(tiny_config(), tmp_path, runtime)
    with pytest.raises(ConfigError, match="no checkpoint at step 5"):
        rewind(tmp_path, 5)
    rewind(tmp_path, 3)
    record, losses = finish(tiny_config(), tmp_path, runtime)
    assert min(losses.losses) == 4 and record.val_bpb == first.val_bpb and losses.losses[12] == reference.losses[12]
    assert (tmp_path / CHECKPOINTS_DIR / "step_000012.before-1").is_dir()


TRUNK = {"schedule__kind": "constant_then_decay", "schedule__warmdown_fraction": 0.0}


def test_a_decay_equals_the_run_it_stands_for(tmp_path: Path) -> None:
    """Trunk to step 6, then 4 decaying steps: to the bit what a run of 10 steps with that schedule gives."""
    trunk = tiny_config(**TRUNK, num_steps=12)
    runtime = dataclasses.replace(RUNTIME, keep_steps=(6,))
    trunk_record, _ = finish(trunk, tmp_path / "trunk", runtime)
    record = decay_from(tmp_path / "trunk", 6, decay_steps=4, run_dir=tmp_path / "decay", runtime=RUNTIME, stage="decay")
    scratch_config = dataclasses.replace(decay_config(trunk, 6, decay_steps=4), trunk="")
    assert scratch_config.num_steps == 10
    scratch, _ = finish(scratch_config, tmp_path / "scratch")
    assert record.val_bpb == scratch.val_bpb != trunk_record.val_bpb
    a, b = final_weights(tmp_path / "decay", 10), final_weights(tmp_path / "scratch", 10)
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert record.config.trunk == f"{run_id(trunk)}@6" and record.run_id not in (run_id(trunk), scratch.run_id)
    assert record.parents["trunk"] == checkpoint_hash(step_dir(tmp_path / "trunk" / CHECKPOINTS_DIR, 6))
    assert record.num_tokens == scratch.num_tokens and record.stage == "decay"


def test_an_interrupted_decay_goes_on_from_itself(tmp_path: Path) -> None:
    finish(tiny_config(**TRUNK, num_steps=6), tmp_path / "trunk", RUNTIME)
    whole = decay_from(tmp_path / "trunk", 6, decay_steps=5, run_dir=tmp_path / "whole", runtime=RUNTIME)
    options = {"decay_steps": 5, "run_dir": tmp_path / "cut", "runtime": dataclasses.replace(RUNTIME, checkpoint_every_steps=1)}
    with pytest.raises(InterruptedError):
        decay_from(tmp_path / "trunk", 6, callbacks=[Losses(crash_at=9)], **options)
    losses = Losses()
    record = decay_from(tmp_path / "trunk", 6, callbacks=[losses], **options)
    assert min(losses.losses) == 9 and record.val_bpb == whole.val_bpb and record.parents == whole.parents


def test_what_cannot_be_branched_is_refused(tmp_path: Path) -> None:
    finish(tiny_config(), tmp_path / "plain")
    with pytest.raises(ConfigError, match="constant_then_decay"):
        decay_from(tmp_path / "plain", 12, decay_steps=4, run_dir=tmp_path / "d", runtime=RUNTIME)
    with pytest.raises(ConfigError, match=r"no checkpoint at step 7 \(it has: 12, 9\)"):
        decay_from(tmp_path / "plain", 7, decay_steps=4, run_dir=tmp_path / "d", runtime=RUNTIME)
    with pytest.raises(ConfigError, match="needs start_from"):
        pretrain(tiny_config(trunk="abc@3"), RUNTIME, run_dir=tmp_path / "d")
    decayed = tiny_config(schedule__kind="constant_then_decay", schedule__warmdown_fraction=0.5)
    finish(decayed, tmp_path / "late")
    with pytest.raises(ConfigError, match="schedule differs"):
        decay_from(tmp_path / "late", 9, decay_steps=4, run_dir=tmp_path / "d", runtime=RUNTIME)


def test_schedules_agree_until_the_earlier_decay() -> None:
    a = tiny_config(schedule__kind="constant_then_decay", schedule__warmdown_fraction=0.25, num_steps=40)  # decays from 30
    b = tiny_config(schedule__kind="constant_then_decay", schedule__warmdown_fraction=0.25, num_steps=80)
    assert schedules_agree(a, b, 31) and not schedules_agree(a, b, 32)
