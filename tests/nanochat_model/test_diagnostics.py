import dataclasses
import logging
import math
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tiny_run import RUNTIME, tiny_config

from nanochat_model import device as devices
from nanochat_model import diagnostics
from nanochat_model.callbacks import Callback, StepInfo, StopTraining
from nanochat_model.distributed import Ranks
from nanochat_model.loop import Batch
from nanochat_model.record import RunRecord, add_measurement
from nanochat_model.resume import multipliers_at
from nanochat_model.session import Session, build_session
from nanochat_model.step_shares import describe_times, is_low, likely_cause
from nanochat_model.step_times import timed_step
from nanochat_model.train import pretrain


@pytest.fixture
def session() -> Iterator[Session]:
    session = build_session(tiny_config(model__num_kv_heads=1, model__depth=3), RUNTIME, Ranks())
    with torch.no_grad():  # away from initialization, where projections are zero and nothing flows
        g = torch.Generator().manual_seed(0)
        for p in session.model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=g))
    yield session
    session.close()


def test_norms_are_those_of_gradients_and_updates(session: Session) -> None:
    names = dict(session.model.named_parameters())
    session.stepper.forward_backward(session.batch(0))
    gradients = {n: p.grad.norm().item() for n, p in names.items() if p.grad is not None}
    session.optimizer.zero_grad()
    before = {n: p.detach().clone() for n, p in names.items()}
    metrics, seconds, outcome = diagnostics.measured_step(session.stepper, session.batch, 0, multipliers_at(session.config, 0))
    assert seconds["compute"] > 0
    assert not outcome.skipped and len(gradients) == len(names)
    for name, p in names.items():
        short = name.removeprefix("transformer.").removesuffix(".weight")
        update = (p.detach() - before[name]).norm().item()
        assert metrics[f"gradient_norm/{short}"] == pytest.approx(gradients[name], rel=1e-4)
        assert metrics[f"update_norm/{short}"] == pytest.approx(update, rel=1e-4) and update > 0
        assert metrics[f"update_to_weight/{short}"] == pytest.approx(update / before[name].norm().item(), rel=1e-4)


def test_dead_and_saturated_units_are_counted(session: Session) -> None:
    """Units whose weights are zero never fire; where all positions are alike, a unit fires at each of them or at none."""
    _, second, third = (block.mlp.c_fc for block in session.model.transformer["h"])
    with torch.no_grad():
        second.weight[: second.weight.shape[0] // 4] = 0
    third.register_forward_pre_hook(lambda module, args: (torch.ones_like(args[0]),))
    metrics = diagnostics.activation_metrics(session.model, session.batch(0), session.stepper)
    assert 0.25 <= metrics["dead_units/1"] < 0.5 and metrics["dead_units/0"] < 0.1
    firing = (third.weight.sum(1) > 0).float().mean().item()
    assert 0.1 < firing < 0.9 and metrics["saturated_units/2"] == pytest.approx(firing)
    assert metrics["dead_units/2"] == pytest.approx(1 - firing)


def test_largest_logit_is_the_largest_allowed_product() -> None:
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(7, 4, 6, generator=g), torch.randn(7, 2, 6, generator=g)
    for window in (0, 2, 7):
        slow = max(
            float(q[t, h] @ k[s, h // 2]) / math.sqrt(6)
            for h in range(4)
            for t in range(7)
            for s in range(max(0, t - window), t + 1)
        )
        assert diagnostics.attention_logit_max(q, k, window) == pytest.approx(slow, rel=1e-5)


def test_logits_are_those_of_attention(session: Session) -> None:
    """|q| = |k| = 1.2·√D bounds every logit by 1.44·√D; sharp ones come near."""
    metrics = diagnostics.activation_metrics(session.model, session.batch(0), session.stepper)
    bound = 1.44 * math.sqrt(session.config.model.head_dim)
    assert all(0 < metrics[f"attention_logit_max/{i}"] <= bound * 1.001 for i in range(3))
    attn = session.model.transformer["h"][0].attn
    with torch.no_grad():
        attn.c_k.weight.copy_(attn.c_q.weight[: attn.c_k.weight.shape[0]])  # keys equal queries: a position meets itself
    metrics = diagnostics.activation_metrics(session.model, session.batch(0), session.stepper)
    assert metrics["attention_logit_max/0"] == pytest.approx(bound, rel=1e-3)


def test_lambdas_by_layer(session: Session) -> None:
    metrics = diagnostics.lambda_metrics(session.model)
    assert metrics["x0_lambda/2"] == session.model.x0_lambdas[2].item() and len(metrics) == 8


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("transformer.h.1.mlp.c_fc.weight", math.nan, "the weights of transformer.h.1.mlp.c_fc.weight"),
        ("transformer.h.2.mlp.c_fc.weight", 1e38, "the output of transformer.h.2.mlp"),
        ("transformer.h.0.attn.c_v.weight", 3e38, "the output of transformer.h.0.attn"),
    ],
)
def test_finds_where_values_stop_being_finite(session: Session, name: str, value: float, expected: str) -> None:
    assert diagnostics.locate_non_finite(session.stepper, session.batch(0)) == ""
    with torch.no_grad():
        dict(session.model.named_parameters())[name][:] = value
    assert diagnostics.locate_non_finite(session.stepper, session.batch(0)).startswith(expected)


def test_finds_a_gradient_that_overflows(session: Session) -> None:
    """Finite forward, non-finite backward: the weight that the backward pass reaches first is named."""
    mlp = session.model.transformer["h"][1].mlp
    mlp.register_full_backward_hook(lambda module, grad_input, grad_output: (grad_input[0] * math.nan, *grad_input[1:]))
    found = diagnostics.locate_non_finite(session.stepper, session.batch(0))
    assert found == "the gradient of transformer.h.1.attn.c_proj.weight"
    assert all(not p.grad.any() for p in session.model.parameters() if p.grad is not None), "gradients are left at zero"


def test_backward_order() -> None:
    names = ["lm_head.weight", "transformer.h.2.mlp.c_proj.weight", "transformer.h.2.attn.c_proj.weight",
             "transformer.h.2.attn.c_v.weight", "value_embeds.2.weight", "transformer.h.0.mlp.c_fc.weight", "x0_lambdas",
             "transformer.wte.weight"]  # fmt: skip
    assert sorted(names, key=lambda n: diagnostics.backward_position(n, 3), reverse=True) == names


def test_parts_of_a_step_add_up(session: Session) -> None:
    seconds, outcome = timed_step(session.stepper, slow_batch(session, 0.2), 0, multipliers_at(session.config, 0))
    assert not outcome.skipped and seconds["data"] >= 0.2
    assert seconds["compute"] > 0 and seconds["optimizer"] > 0
    assert seconds["wait"] == seconds["communication"] == 0, "one rank waits for nobody"
    text = describe_times({**seconds, "compute": seconds["data"], "optimizer": 0.0}, (1.0, 1.5))
    assert text == "data 50%, compute 50%, slowest rank 1 (+50% on the fastest)" and describe_times({}) == ""


def slow_batch(session: Session, seconds: float) -> Callable[[int], Batch]:
    def batch(k: int) -> Batch:
        time.sleep(seconds)
        return session.batch(k)

    return batch


@pytest.mark.parametrize(
    ("parts", "options", "expected"),
    [
        ({"data": 0.3, "compute": 0.7}, {}, "waiting for data takes 30%"),
        ({"compute": 1.0}, {"compute_by_rank": (0.5, 0.6, 0.5, 1.0)}, "rank 3 needs 1 s for what the fastest does in 0.5 s"),
        ({"compute": 0.6, "communication": 0.4}, {}, "communication takes 40%"),
        ({"compute": 0.9, "optimizer": 0.1}, {"attention": "sdpa", "windowed": True}, "falls back to sdpa"),
        ({"compute": 0.5, "optimizer": 0.5}, {}, "optimizer takes 50%"),
        ({"compute": 0.9, "optimizer": 0.1}, {"micro_batch_tokens": 2048}, "micro-batch of 2048 tokens"),
        ({"compute": 0.9, "optimizer": 0.1}, {}, "none stands out: 90%"),
        ({}, {}, "no step was measured"),
        ({"compute": 0.9, "optimizer": 0.1}, {"mfu": 0.3, "usual_mfu": 0.5}, "recorded runs on this device reach 50%"),
        ({"compute": 0.9, "optimizer": 0.1}, {"mfu": 0.45, "usual_mfu": 0.5}, "none stands out: 90%"),
    ],
)
def test_the_likely_cause_of_a_low_mfu(parts: dict, options: dict, expected: str) -> None:
    assert expected in likely_cause(parts, **{"micro_batch_tokens": 65536, "attention": "fa3", "windowed": True, **options})


def test_what_mfu_is_low() -> None:
    assert is_low(0.39, 0.0) and not is_low(0.41, 0.0), "the rule for GPUs where nothing is recorded"
    assert is_low(0.41, 0.55) and not is_low(0.5, 0.55), "far below the recorded runs"


def test_a_low_mfu_is_explained_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """With a peak that no CPU reaches; the losses are those of a run that nobody timed."""
    losses: dict[bool, list[float]] = {}
    for timed in (False, True):
        kept = losses.setdefault(timed, [])

        class Keep(Callback):
            def on_step(self, info: StepInfo, kept: list[float] = kept) -> None:
                kept.append(info.train_loss)

        if timed:
            monkeypatch.setattr(devices, "peak_flops", lambda device: 1e15)
        with caplog.at_level(logging.WARNING):
            record = pretrain(tiny_config(num_steps=30), RUNTIME, run_dir=tmp_path / str(timed), callbacks=[Keep()])
        assert caplog.text.count("of the device's peak") == int(timed)
    assert "no step was measured" not in caplog.text and record.step_seconds["compute"] > 0, "steps are timed unasked"
    assert losses[True] == losses[False] and record.mfu is not None and record.mfu < 0.4


def test_an_impossible_mfu_fails_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "peak_flops", lambda device: 1e3)
    record = pretrain(tiny_config(), RUNTIME, run_dir=tmp_path)
    assert record.status == "failed" and "is not the peak of this device" in str(record.error)


class Pause(Callback):
    def on_step(self, info: StepInfo) -> None:
        if info.step == 7:
            raise StopTraining("pause")


def test_a_record_says_where_time_went_and_what_was_measured(tmp_path: Path) -> None:
    """Also across an interruption: what was measured before it is kept, and nothing is measured twice."""
    runtime = dataclasses.replace(RUNTIME, diagnostics_every_steps=3, checkpoint_every_steps=5)
    first = pretrain(tiny_config(), runtime, run_dir=tmp_path, callbacks=[Pause()])
    assert first.diagnostics["step"] == [3, 6]
    shutil.rmtree(tmp_path / "checkpoints" / "step_000007")  # so that step 6 is done again
    record = pretrain(tiny_config(), runtime, run_dir=tmp_path)
    assert record.diagnostics["step"] == [3, 6, 9, 12] and record == RunRecord.load(tmp_path)
    assert all(len(column) == 4 for column in record.diagnostics.values())
    assert record.diagnostics["gradient_norm/h.1.mlp.c_fc"][:2] == first.diagnostics["gradient_norm/h.1.mlp.c_fc"]
    assert record.diagnostics["update_to_weight/h.1.mlp.c_proj"][0] > 0 and "x0_lambda/1" in record.diagnostics
    assert record.step_seconds["compute"] > 0 and record.rank_compute_seconds == (record.step_seconds["compute"],)
    assert list(record.startup_seconds) == ["process", "build", "first_step"] and record.startup_seconds["first_step"] > 0
    assert record.startup_seconds["process"] == 0, "counted once a process"


def test_measurements_stay_few_and_aligned() -> None:
    columns: dict[str, list] = {}
    for step in range(1, 200):
        add_measurement(columns, step, {"a": step / 3} | ({"late": math.inf if step == 199 else 1.0} if step > 50 else {}))
    assert 32 <= len(columns["step"]) <= 64 and columns["step"][-1] == 199
    assert columns["a"] == [float(f"{s / 3:.4g}") for s in columns["step"]]
    assert columns["late"] == [1.0 if 50 < s < 199 else None for s in columns["step"]]
