import dataclasses
import gc
import json
import math
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_run import RUNTIME, SEQUENCE_LEN, STILL, tiny_config, tiny_shards

from nanochat_model import train
from nanochat_model.callbacks import Callback, StepInfo, StopTraining
from nanochat_model.checkpoint import CHECKPOINTS_DIR, find_latest, load_model, read_model_state, read_state
from nanochat_model.config import RuntimeConfig, TrainConfig
from nanochat_model.counts import flops_per_token
from nanochat_model.errors import ConfigError
from nanochat_model.evaluate import evaluate_bpb
from nanochat_model.gpt import GPT
from nanochat_model.loader import Loader
from nanochat_model.loop import Batch, LossScale
from nanochat_model.optim import MuonAdamW
from nanochat_model.record import CurvePoint, RunRecord
from nanochat_model.session import Prefetcher
from nanochat_model.train import pretrain, rewind


class Trace(Callback):
    """Keeps what the loop says."""

    def __init__(self) -> None:
        self.steps: list[StepInfo] = []
        self.points: list[CurvePoint] = []
        self.saved: list[int] = []
        self.started_at: int | None = None
        self.ended: RunRecord | None = None

    def on_start(self, config: TrainConfig, start_step: int) -> None:
        self.started_at = start_step

    def on_step(self, info: StepInfo) -> None:
        self.steps.append(info)

    def on_eval(self, point: CurvePoint) -> None:
        self.points.append(point)

    def on_checkpoint(self, path: Path, step: int) -> None:
        assert (path / "model.safetensors").is_file()
        self.saved.append(step)

    def on_end(self, record: RunRecord) -> None:
        self.ended = record

    @property
    def losses(self) -> list[float]:
        return [i.train_loss for i in self.steps]


def run(tmp_path: Path, config: TrainConfig, runtime: RuntimeConfig = RUNTIME, **options) -> tuple[RunRecord, Trace]:
    trace = Trace()
    return pretrain(config, runtime, run_dir=tmp_path, callbacks=[trace], **options), trace


def test_a_run_leaves_a_true_record(tmp_path: Path) -> None:
    config = tiny_config(eval__every_steps=5)
    record, trace = run(tmp_path, config, name="n", sweep="s", stage="d2", tags={"purpose": "test"})
    assert record.status == "complete" and record.error is None
    assert RunRecord.load(tmp_path) == record == trace.ended
    assert [p.step for p in record.curve] == [5, 10, 12] and list(record.curve) == trace.points
    for point in record.curve:
        assert point.num_tokens == point.step * config.batch_tokens
        assert point.train_flops == point.num_tokens * flops_per_token(config.model)
    assert record.num_tokens == config.num_tokens and record.train_flops == record.curve[-1].train_flops
    assert record.val_bpb == record.curve[-1].val_bpb < record.curve[0].val_bpb
    assert 0 < record.curve[0].seconds < record.curve[-1].seconds <= record.train_seconds <= record.total_seconds
    assert (record.name, record.sweep, record.stage, record.tags) == ("n", "s", "d2", {"purpose": "test"})
    assert record.parents["shards"] == tiny_shards().manifest_hash
    assert [i.step for i in trace.steps] == list(range(1, 13)) and trace.saved == [12]
    assert json.loads((tmp_path / "config.json").read_text())["num_steps"] == 12


def test_the_saved_model_is_the_evaluated_one(tmp_path: Path) -> None:
    record, _ = run(tmp_path, tiny_config())
    model = load_model(tmp_path)
    loader = Loader(tiny_shards(), packing="keep_remainder", sequence_len=SEQUENCE_LEN, rows_per_batch=1)
    assert evaluate_bpb(model, loader.validation(2048), tiny_shards().token_bytes) == record.val_bpb


def test_a_complete_run_is_not_run_again(tmp_path: Path) -> None:
    first, _ = run(tmp_path, tiny_config())
    again, trace = run(tmp_path, tiny_config())
    assert again == first and trace.started_at is None


def test_without_checkpoints_only_config_and_record_are_written(tmp_path: Path) -> None:
    run(tmp_path, tiny_config(), dataclasses.replace(RUNTIME, keep_last=0))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "record.json"]


def test_losses_are_those_of_the_model_on_the_batches(tmp_path: Path) -> None:
    """The first loss is that of the initial weights on global batch 0, and training uses batch k at step k."""
    config = tiny_config()
    _, trace = run(tmp_path, config)
    loader = Loader(tiny_shards(), packing="keep_remainder", sequence_len=SEQUENCE_LEN, rows_per_batch=8, seed=config.seed)
    inputs, targets = (torch.from_numpy(a) for a in loader.batch(0))
    expected = GPT(config.model).init_weights(config.seed).loss(inputs, targets)
    assert trace.losses[0] == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("micro_batch_rows", [1, 3, 8])
def test_micro_batches_do_not_move_losses(tmp_path: Path, micro_batch_rows: int) -> None:
    """Equal to rounding, also where the last micro-batch is smaller (8 rows in parts of 3)."""
    _, reference = run(tmp_path / "a", tiny_config(**STILL))
    _, other = run(tmp_path / "b", tiny_config(**STILL), dataclasses.replace(RUNTIME, micro_batch_rows=micro_batch_rows))
    np.testing.assert_allclose(other.losses, reference.losses, rtol=2e-5)


def test_same_seed_same_bits_other_seed_other_losses(tmp_path: Path) -> None:
    a, b, c = (run(tmp_path / n, tiny_config(seed=s))[1].losses for n, s in (("a", 1), ("b", 1), ("c", 2)))
    assert a == b != c


def test_measuring_changes_nothing(tmp_path: Path) -> None:
    _, plain = run(tmp_path / "a", tiny_config())
    _, measured = run(tmp_path / "b", tiny_config(), dataclasses.replace(RUNTIME, diagnostics_every_steps=4))
    assert measured.losses == plain.losses
    assert [bool(i.diagnostics) for i in measured.steps] == [i.step % 4 == 0 for i in measured.steps]


def test_garbage_collection_is_given_back(tmp_path: Path) -> None:
    run(tmp_path, tiny_config())
    assert gc.isenabled() and gc.get_freeze_count() == 0


def test_a_callback_can_stop_and_the_run_goes_on_later(tmp_path: Path) -> None:
    class Stop(Callback):
        def on_step(self, info: StepInfo) -> None:
            if info.step == 5:
                raise StopTraining("good enough")

    record = pretrain(tiny_config(), RUNTIME, run_dir=tmp_path, callbacks=[Stop()])
    assert record.status == "stopped" and record.error == "good enough" and record.num_tokens == 5 * record.config.batch_tokens
    assert RunRecord.load(tmp_path).status == "stopped"
    whole, trace = run(tmp_path, tiny_config())
    assert trace.started_at == 5 and whole.status == "complete"


def test_an_exception_leaves_a_failed_record_and_is_raised(tmp_path: Path) -> None:
    class Broken(Callback):
        def on_step(self, info: StepInfo) -> None:
            raise RuntimeError("tracker exploded")

    with pytest.raises(RuntimeError, match="exploded"):
        pretrain(tiny_config(), RUNTIME, run_dir=tmp_path, callbacks=[Broken()])
    record = RunRecord.load(tmp_path)
    assert record.status == "failed" and record.error == "RuntimeError: tracker exploded"
    assert run(tmp_path, tiny_config())[0].status == "complete"


class Poison(Callback):
    """Spoils one weight after a step, through the model the loop trains."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str, at: int, *, value: float = math.nan) -> None:
        self.name, self.at, self.value, self.models = name, at, value, []
        real = train.build_session

        def spy(*args):
            session = real(*args)
            self.models.append(session.model)
            return session

        monkeypatch.setattr(train, "build_session", spy)

    def on_step(self, info: StepInfo) -> None:
        if info.step == self.at:
            with torch.no_grad():
                dict(self.models[-1].named_parameters())[self.name].view(-1)[0] = self.value


def test_lasting_non_finite_values_fail_the_run_naming_step_and_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poison = Poison(monkeypatch, "transformer.h.1.attn.c_v.weight", at=4)
    trace = Trace()
    record = pretrain(tiny_config(num_steps=40), RUNTIME, run_dir=tmp_path, callbacks=[poison, trace])
    assert record.status == "failed" and record.error is not None
    assert "since step 5" in record.error and "transformer.h.1.attn.c_v" in record.error
    assert trace.steps[-1].step < 40 and record == RunRecord.load(tmp_path)


def test_a_passing_non_finite_value_costs_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch that overflows once: the update is skipped and the run ends well."""
    from nanochat_model.loop import Stepper

    real = Stepper.forward_backward
    calls = []

    def once(self, batch):
        part = real(self, batch)
        calls.append(1)
        return part * math.nan if len(calls) == 4 else part

    monkeypatch.setattr(Stepper, "forward_backward", once)
    record, trace = run(tmp_path, tiny_config())
    assert record.status == "complete" and trace.steps[-1].skipped_steps == 1
    assert math.isnan(trace.losses[3]) and all(map(math.isfinite, trace.losses[:3] + trace.losses[4:]))


def test_skipping_leaves_the_weights_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A non-finite gradient on an otherwise finite loss skips the update too."""
    poison = Poison(monkeypatch, "transformer.wte.weight", at=99)
    seen: list[torch.Tensor] = []

    class Watch(Callback):
        def on_step(self, info: StepInfo) -> None:
            seen.append(poison.models[-1].transformer["h"][0].mlp.c_fc.weight.detach().clone())

    from nanochat_model.loop import Stepper

    real = Stepper.forward_backward

    def spoil(self, batch):
        part = real(self, batch)
        if len(seen) == 2:
            self.model.transformer["h"][0].mlp.c_fc.weight.grad[0, 0] = math.inf
        return part

    monkeypatch.setattr(Stepper, "forward_backward", spoil)
    pretrain(tiny_config(num_steps=4), RUNTIME, run_dir=tmp_path, callbacks=[Watch()])
    assert torch.equal(seen[2], seen[1]) and not torch.equal(seen[1], seen[0]) and not torch.equal(seen[3], seen[2])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"data__manifest_hash": "0" * 16}, "manifest_hash"),
        ({"data__path": ""}, "data.path is empty"),
        ({"model__vocab_size": 512}, "set model.vocab_size=320"),
        ({"eval__num_tokens": 0}, "eval.num_tokens 0 must be at least 1"),
    ],
)
def test_bad_input_is_one_line_and_writes_no_record(tmp_path: Path, overrides: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as e:
        run(tmp_path, tiny_config(**overrides))
    assert "\n" not in str(e.value) and not (tmp_path / "record.json").exists()


def test_another_config_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    record, _ = run(tmp_path, tiny_config())
    with pytest.raises(ConfigError, match=r"optimizer\.matrix_lr 0\.02 -> 0\.03"):
        run(tmp_path, tiny_config(optimizer__matrix_lr=0.03))
    assert RunRecord.load(tmp_path) == record


def test_starting_afresh_sets_aside_what_was_there(tmp_path: Path) -> None:
    run(tmp_path, tiny_config())
    record, trace = run(tmp_path, tiny_config(seed=5), resume=False)
    assert trace.started_at == 0 and record.seed == 5
    old = find_latest(tmp_path / f"{CHECKPOINTS_DIR}.before-1")
    assert old is not None and read_state(old).config == tiny_config() and (tmp_path / "record.json.before-1").is_file()


def test_checkpoints_when_asked(tmp_path: Path) -> None:
    runtime = dataclasses.replace(RUNTIME, checkpoint_every_steps=4, keep_last=2, keep_steps=(1,))
    _, trace = run(tmp_path, tiny_config(), runtime)
    assert trace.saved == [1, 4, 8, 12]
    assert sorted(p.name for p in (tmp_path / CHECKPOINTS_DIR).iterdir()) == ["step_000001", "step_000008", "step_000012"]


def test_checkpoints_by_the_clock(tmp_path: Path) -> None:
    _, trace = run(tmp_path, tiny_config(num_steps=3), dataclasses.replace(RUNTIME, checkpoint_every_seconds=1e-9))
    assert trace.saved == [1, 2, 3]


def test_fp16_trains_with_a_loss_scale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too high a scale only costs skipped steps; the scale is part of the checkpoint."""
    monkeypatch.setattr(LossScale, "for_dtype", classmethod(lambda cls, dtype: cls(value=2.0**28, dynamic=True)))
    config, runtime = tiny_config(compute_dtype="float16", num_steps=28), dataclasses.replace(RUNTIME, keep_steps=(20,))
    record, trace = run(tmp_path, config, runtime)
    assert record.status == "complete" and 0 < trace.steps[-1].skipped_steps < 12
    assert trace.steps[-1].smooth_train_loss < trace.steps[0].train_loss - 0.5
    state = read_state(find_latest(tmp_path / CHECKPOINTS_DIR))
    assert 1.0 <= state.loop["loss_scale"] < 2.0**28
    rewind(tmp_path, 20)
    assert run(tmp_path, config, runtime)[1].losses == trace.losses[20:], "a scale that starts anew would skip steps again"


def test_bf16_follows_fp32(tmp_path: Path) -> None:
    _, full = run(tmp_path / "a", tiny_config(**STILL))
    _, half = run(tmp_path / "b", tiny_config(compute_dtype="bfloat16", **STILL))
    np.testing.assert_allclose(half.losses, full.losses, rtol=0.02)
    assert {t.dtype for t in read_model_state(find_latest(tmp_path / "b" / CHECKPOINTS_DIR)).values()} == {torch.float32}


def test_reading_ahead_gives_the_same_batches() -> None:
    """In order, again, backwards and past the end; always from one thread."""
    threads = set()

    def batch(k: int) -> Batch:
        threads.add(threading.current_thread().name)
        return Batch(inputs=np.full((1, 2), k), targets=np.full((1, 2), k), num_targets=2)

    ahead = Prefetcher(batch, num_steps=6)
    for k in (0, 1, 2, 2, 5, 3, 4, 5, 0):
        assert ahead(k).inputs[0, 0] == k
    ahead.close()
    assert len(threads) == 1 and threading.current_thread().name not in threads


def test_a_compiled_run_compiles_nothing_after_its_first_step(tmp_path, monkeypatch):
    """Learning rate, momentum and weight decay move at every step, and the last micro-batch is as large as the others."""
    compiled, multipliers = [], set()

    class Count(Trace):
        def on_step(self, info: StepInfo) -> None:
            compiled.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])

    original = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **kwargs: original(f, **kwargs, backend="eager"))  # graphs without a compiler
    step = MuonAdamW.step

    def note(self, *args, **kwargs):
        multipliers.add((*args, *kwargs.values()))
        return step(self, *args, **kwargs)

    monkeypatch.setattr(MuonAdamW, "step", note)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    config = tiny_config(num_steps=6, schedule__warmup_steps=3, schedule__momentum_warmup_steps=6)
    pretrain(config, dataclasses.replace(RUNTIME, compile="on"), run_dir=tmp_path, callbacks=[Count()])
    assert len(multipliers) == 6, "the schedules were to move at every step"
    assert len(compiled) == 6 and compiled[0] > 0 and set(compiled) == {compiled[0]}
