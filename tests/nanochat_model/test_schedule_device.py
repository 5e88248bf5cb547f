"""Schedules at their corners, device choice, peaks and MFU, and a golden trace of training."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nanochat_model import device
from nanochat_model.config import GPTConfig, OptimizerConfig, ScheduleConfig, TrainConfig
from nanochat_model.errors import ConfigError
from nanochat_model.gpt import GPT
from nanochat_model.optim import build_optimizer
from nanochat_model.schedule import decay_start, lr_multiplier, muon_momentum, weight_decay_multiplier

torch.set_num_threads(1)
GOLDEN = Path(__file__).parent.parent / "golden" / "train_trace.json"


def test_nanochat_learning_rate():
    s = ScheduleConfig(warmup_steps=10, warmdown_fraction=0.5, final_lr_fraction=0.1)
    values = [lr_multiplier(i, 100, s) for i in range(101)]
    assert values[0] == pytest.approx(0.1) and values[9] == values[10] == values[50] == 1.0
    assert values[75] == pytest.approx(0.55) and values[100] == pytest.approx(0.1)
    assert values[:10] == sorted(values[:10]) and values[50:] == sorted(values[50:], reverse=True)


def test_nanochat_momentum_and_decay():
    s = ScheduleConfig(warmdown_fraction=0.65)
    assert muon_momentum(0, 2000, s) == pytest.approx(0.85) and muon_momentum(200, 2000, s) == pytest.approx(0.91)
    assert muon_momentum(400, 2000, s) == muon_momentum(699, 2000, s) == pytest.approx(0.97)
    assert muon_momentum(1350, 2000, s) == pytest.approx(0.935) and muon_momentum(2000, 2000, s) == pytest.approx(0.90)
    assert muon_momentum(99, 100, s) == pytest.approx(0.85 + 0.12 * 99 / 400), "a short run never leaves the warm-up"
    assert [weight_decay_multiplier(i, 100, s) for i in (0, 50, 100)] == pytest.approx([1.0, 0.5, 0.0])


def test_without_warmup_or_warmdown_nothing_divides_by_zero():
    s = ScheduleConfig(warmup_steps=0, warmdown_fraction=0.0, momentum_warmup_steps=0)
    assert {lr_multiplier(i, 10, s) for i in range(11)} == {1.0}
    assert {muon_momentum(i, 10, s) for i in range(11)} == {0.97}
    trunk = ScheduleConfig(kind="constant_then_decay", warmdown_fraction=0.0)
    assert {weight_decay_multiplier(i, 10, trunk) for i in range(11)} == {1.0}


def test_a_trunk_is_the_same_whatever_the_horizon():
    """constant_then_decay: before the decay starts no multiplier knows num_steps, so runs can branch off one trunk."""
    s = ScheduleConfig(kind="constant_then_decay", warmdown_fraction=0.2)
    start = decay_start(500, s)
    for f in (lr_multiplier, muon_momentum, weight_decay_multiplier):
        assert [f(i, 500, s) for i in range(start)] == [f(i, 900, s) for i in range(start)], f.__name__
    assert weight_decay_multiplier(500, 500, s) == pytest.approx(0.0, abs=1e-12) and lr_multiplier(500, 500, s) == 0.05
    assert muon_momentum(500, 500, s) == pytest.approx(0.90)
    longer = ScheduleConfig(kind="constant_then_decay", warmdown_fraction=0.3, momentum_warmup_steps=0)
    assert decay_start(500, longer) == 350
    halfway = (f(425, 500, longer) for f in (lr_multiplier, muon_momentum, weight_decay_multiplier))
    assert list(halfway) == pytest.approx([0.525, 0.935, 0.5])
    assert weight_decay_multiplier(400, 500, longer) == pytest.approx(0.75)  # (1 + cos 60°)/2


def test_device_choice_names_what_is_missing():
    assert device.choose_device("cpu") == torch.device("cpu")
    with pytest.raises(ConfigError, match="'tpu' is not known"):
        device.choose_device("tpu")
    if not torch.cuda.is_available():
        assert device.choose_device("auto") == torch.device("cpu")
        with pytest.raises(ConfigError, match="torch sees no GPU"):
            device.choose_device("cuda:1")


def test_mfu_is_unknown_without_a_peak_and_impossible_above_one():
    assert device.peak_flops(torch.device("cpu")) is None
    assert device.model_flops_utilization(1e9, 1e3, None) is None
    assert device.model_flops_utilization(1e9, 1e5, 989e12, 2) == pytest.approx(1e14 / 989e12 / 2)
    with pytest.raises(ConfigError, match="MFU 108% of a peak of 312"):  # an MI300X divided by an A100's peak
        device.model_flops_utilization(1e9, 337e3, 312e12)


@pytest.mark.parametrize(
    "status, num_steps, expected", [("native", 10**6, False), ("pytorch", 10**6, True), ("pytorch", 10, False)]
)
def test_a_cpu_compiles_only_long_runs_without_c_kernels(status, num_steps, expected, monkeypatch):
    monkeypatch.setattr(device, "native_status", lambda: status)
    model = GPTConfig(depth=2, model_dim=64, num_heads=4, num_kv_heads=4, sequence_len=256, vocab_size=1024)
    config = TrainConfig(model=model, batch_tokens=2048, num_steps=num_steps)
    assert device.use_compile("auto", torch.device("cpu"), config) is expected
    assert device.use_compile("on", torch.device("cpu"), config) and device.use_compile("auto", torch.device("cuda"), config)
    assert not device.use_compile("off", torch.device("cuda"), config)


def test_process_settings_keep_freed_memory():
    """After tune_process a large buffer that is freed and taken again costs no new page faults."""
    code = """
import resource, torch
from nanochat_model.device import tune_process
tune_process(1)
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3): torch.zeros(1 << 24)
before = faults()
for _ in range(10): torch.zeros(1 << 24)
print(faults() - before, torch.get_num_threads())
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    if sys.platform == "linux":
        # not zero: a kernel short of memory may take idle pages back by itself
        assert int(out[0]) < 82_000, "64 MiB taken ten times would fault 163,840 times"
    assert out[1] == "1"


def golden_trace() -> list[float]:
    """Losses of 20 float32 steps on learnable batches, all schedules moving; rates low enough that rounding does not grow."""
    config = GPTConfig(depth=3, model_dim=64, num_heads=4, num_kv_heads=2, sequence_len=160, vocab_size=200, window_pattern="SL")
    schedule = ScheduleConfig(warmup_steps=4, momentum_warmup_steps=8)
    model = GPT(config).init_weights(42)
    optimizer = build_optimizer(model, OptimizerConfig(embedding_lr=0.03, scalar_lr=0.02, smear_lr=0.02))
    g = torch.Generator().manual_seed(0)
    losses = []
    for step in range(20):
        idx = (torch.randint(0, 200, (4, 1), generator=g) + 7 * torch.arange(161)) % 200
        loss = model.loss(idx[:, :-1], idx[:, 1:])
        loss.backward()
        optimizer.step(*(f(step, 20, schedule) for f in (lr_multiplier, muon_momentum, weight_decay_multiplier)))
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_golden_training_trace():
    """A refactor must reproduce this. After an intended change of numerics: python tests/nanochat_model/test_schedule_device.py"""
    expected = json.loads(GOLDEN.read_text())["losses"]
    assert golden_trace() == pytest.approx(expected, rel=2e-4, abs=5e-5)  # at 0.02 nats other kernels round 1e-5 apart


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps({"losses": [round(x, 6) for x in golden_trace()]}, indent=1) + "\n")
