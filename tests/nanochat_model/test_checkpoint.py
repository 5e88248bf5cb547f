import dataclasses
import json
import logging
import os
import random
from pathlib import Path

import pytest
import torch

from nanochat_model import checkpoint as ck
from nanochat_model.config import GPTConfig, TrainConfig
from nanochat_model.errors import ConfigError
from nanochat_model.record import CurvePoint


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    base = torch.randn(6, 4, generator=g)
    return {"a.weight": base[:3], "b.weight": base[3:], "half": torch.randn(5, generator=g).bfloat16()}


def save(root: Path, step: int, **options) -> Path:
    state = ck.CheckpointState(
        step=step,
        model=GPTConfig(),
        config=TrainConfig(num_steps=50),
        run_id="r",
        parents={"shards": "h"},
        rng=ck.capture_rng(),
        curve=(CurvePoint(step=1, num_tokens=2, train_flops=3.0, seconds=0.1, val_bpb=1.5),),
        seconds=12.25,
        loop={"smooth_total": 0.1},
    )
    optimizer = {"num_steps": step, "params": {"a.weight": {"m": torch.full((3, 4), float(step))}}, 7: [None, True, 0.1]}
    return ck.save_checkpoint(root, state, weights(step), optimizer, **options)


def test_everything_comes_back(tmp_path: Path) -> None:
    path = save(tmp_path, 3)
    for name, value in weights(3).items():
        assert torch.equal(ck.read_model_state(path)[name], value) and ck.read_model_state(path)[name].dtype == value.dtype
    optimizer = ck.read_optimizer_state(path)
    assert optimizer["num_steps"] == 3 and optimizer[7] == [None, True, 0.1]
    assert torch.equal(optimizer["params"]["a.weight"]["m"], torch.full((3, 4), 3.0))
    state = ck.read_state(path)
    assert state.config == TrainConfig(num_steps=50) and state.curve[0].val_bpb == 1.5 and state.seconds == 12.25
    assert ck.find_latest(tmp_path) == path and ck.resolve(tmp_path) == path and ck.resolve(path) == path


def test_rng_continues_where_it_was_saved() -> None:
    state = ck.capture_rng()
    expected = torch.rand(3), random.random()
    ck.restore_rng(json.loads(json.dumps(state)))
    assert torch.equal(torch.rand(3), expected[0]) and random.random() == expected[1]


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("damage", [cut, flip, Path.unlink])
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "optimizer.json", "state.json", "checksums.json"])
def test_damage_is_found_named_and_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture, damage, name: str) -> None:
    good, bad = save(tmp_path, 1), save(tmp_path, 2)
    damage(bad / name)
    with caplog.at_level(logging.WARNING):
        assert ck.find_latest(tmp_path) == good
    assert "step_000002" in caplog.text and name in caplog.text
    with pytest.raises(ConfigError, match="step_000002"):
        ck.verify(bad)


def test_only_damaged_ones_left_is_an_error_that_says_so(tmp_path: Path) -> None:
    cut(save(tmp_path, 1) / "model.safetensors")
    assert ck.find_latest(tmp_path) is None
    with pytest.raises(ConfigError, match="every checkpoint"):
        ck.resolve(tmp_path)
    with pytest.raises(ConfigError, match="no checkpoint at"):
        ck.resolve(tmp_path / "nothing")


def test_a_crash_while_writing_leaves_the_old_ones_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = save(tmp_path, 1)
    before = {f.name: f.read_bytes() for f in good.iterdir()}

    def full_disk(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(ck.tensor_tree, "save_tree", full_disk)
    for step in (1, 2):
        with pytest.raises(OSError, match="no space"):
            save(tmp_path, step)
    assert [p.name for p in tmp_path.iterdir()] == ["step_000001"]
    assert {f.name: f.read_bytes() for f in good.iterdir()} == before


def test_keeps_the_last_and_the_named_ones(tmp_path: Path) -> None:
    for step in range(1, 7):
        save(tmp_path, step, keep_last=2, keep_steps=(3,))
    assert [ck.step_of(p) for p in ck.all_checkpoints(tmp_path)] == [6, 5, 3]


def test_same_step_again_replaces_it(tmp_path: Path) -> None:
    path = save(tmp_path, 4)
    (path / "junk").write_text("x")
    assert save(tmp_path, 4) == path and not (path / "junk").exists()


def test_another_format_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    data = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps({**data, "format": 99}))
    with pytest.raises(ConfigError, match="format 99"):
        ck.read_state(path)


def test_hash_names_the_content(tmp_path: Path) -> None:
    a, b = save(tmp_path / "a", 1), save(tmp_path / "b", 1)
    state = dataclasses.replace(ck.read_state(a))
    c = ck.save_checkpoint(tmp_path / "c", state, weights(5))
    d = ck.save_checkpoint(tmp_path / "d", state, weights(5))
    assert ck.checkpoint_hash(c) == ck.checkpoint_hash(d) != ck.checkpoint_hash(a) and b.name == a.name


def test_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    with pytest.raises(ConfigError, match=r"weight.*no such weight|weight is"):
        ck.load_weights(torch.nn.Linear(4, 3), path)
