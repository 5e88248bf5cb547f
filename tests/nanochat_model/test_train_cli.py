import json
from pathlib import Path

import pytest
from tiny_run import VOCAB_SIZE, tiny_shards

from nanochat_model.recipe import NANOCHAT
from nanochat_model.record import RunRecord
from nanochat_model.train_cli import main

SMALL = ["--depth", "2", "--model-dim", "32", "--head-dim", "16", "--sequence-len", "32", "--window-pattern", "L",
         "--batch-tokens", "256", "--eval-tokens", "1024", "--device", "cpu", "--num-threads", "1", "--compile", "off",
         "--compute-dtype", "float32", "--packing", "keep_remainder"]  # fmt: skip


def call(*arguments: str) -> int:
    with pytest.raises(SystemExit) as e:
        main([str(tiny_shards().path), *SMALL, *arguments])
    return int(e.value.code or 0)


def test_trains_and_tells(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--num-steps", "6", "--eval-every", "3", "--log-every-steps", "2", "--price-per-device-hour", "3.6"]
    assert call("--run-dir", str(tmp_path), "--name", "small", *options) == 0
    out = capsys.readouterr().out
    record = RunRecord.load(tmp_path)
    assert record.status == "complete" and record.name == "small" and record.config.model.vocab_size == VOCAB_SIZE
    assert [line.split()[1] for line in out.splitlines() if "tok/s" in line] == ["2/6", "4/6", "6/6"]
    assert f"{record.curve[0].val_bpb:.6f} bits per byte" in out and "$" in out and "saved" in out
    assert record.run_id in out


def test_goes_on_from_a_chosen_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--run-dir", str(tmp_path), "--num-steps", "6", "--checkpoint-every-steps", "2", "--keep-last", "9"]
    assert call(*options, "--log-every-steps", "1") == 0
    first = RunRecord.load(tmp_path)
    capsys.readouterr()
    assert call(*options, "--log-every-steps", "1", "--resume-from-step", "2") == 0
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines() if "tok/s" in line] == ["3/6", "4/6", "5/6", "6/6"]
    assert RunRecord.load(tmp_path).val_bpb == first.val_bpb
    assert call(*options, "--resume-from-step", "3") == 2
    assert "has no checkpoint at step 3 (it has: 6, 4, 2)" in capsys.readouterr().err


def test_overrides_and_recipe_values_reach_the_config(tmp_path: Path) -> None:
    options = ["--num-steps", "2", "--matrix-lr", "0.04", "--weight-decay", "0", "--set", "optimizer.polar_steps=4"]
    assert call("--run-dir", str(tmp_path), *options, "--set", "eval.num_tokens=512") == 0
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["optimizer"]["polar_steps"] == 4 and config["eval"]["num_tokens"] == 512
    assert config["optimizer"]["weight_decay"] == 0
    assert config["optimizer"]["matrix_lr"] == pytest.approx(0.04 * NANOCHAT.lr_multiplier(B=256.0))


def test_a_dry_run_trains_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--run-dir", str(tmp_path / "r"), "--tokens-per-param", "3", "--dry-run") == 0
    out = capsys.readouterr().out
    assert "scaling parameters" in out and "(3.0 a scaling parameter)" in out and not (tmp_path / "r").exists()
    assert "warning" not in out
    assert call("--num-steps", "20", "--dry-run") == 0
    assert "warning: learning rate × weight decay is 0.71 a step" in capsys.readouterr().out, "14 by the number of steps"


def test_a_trunk_and_two_decays_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Standard output holds one JSON object; a decay is a record of its own with the trunk as parent."""
    trunk = ["--run-dir", str(tmp_path / "trunk"), "--num-steps", "6", "--schedule", "constant_then_decay"]
    assert call(*trunk, "--warmdown-fraction", "0", "--keep-steps", "2", "4", "--log-every-steps", "2", "--json") == 0
    printed = capsys.readouterr()
    facts, record = json.loads(printed.out), RunRecord.load(tmp_path / "trunk")
    assert (facts["run_id"], facts["status"], facts["val_bpb"]) == (record.run_id, "complete", record.val_bpb)
    assert facts["checkpoint"] == str(tmp_path / "trunk/checkpoints/step_000006") and "curve" not in facts
    assert "step 6/6" in printed.err and "bits per byte" in printed.err
    for step in (2, 4):
        run_dir = tmp_path / f"decay{step}"
        options = ["--decay-from", f"{tmp_path / 'trunk'}@{step}", "--decay-steps", "2", "--run-dir", str(run_dir)]
        with pytest.raises(SystemExit) as e:
            main([str(tiny_shards().path), *options, "--device", "cpu", "--num-threads", "1", "--json"])
        facts = json.loads(capsys.readouterr().out)
        assert e.value.code == 0 and facts["num_tokens"] == (step + 2) * 256 and facts["run_id"] != record.run_id
        assert RunRecord.load(run_dir).config.trunk == f"{record.run_id}@{step}" and facts["parents"]["trunk"]
    with pytest.raises(SystemExit) as e:
        main([str(tiny_shards().path), *options, "--device", "cpu", "--seed", "3"])
    assert e.value.code == 2 and "packing and seed as well" in capsys.readouterr().err
    assert call("--decay-from", f"{tmp_path / 'trunk'}@4", "--decay-steps", "2") == 2
    assert "takes model, batch, rates and schedule from the trunk" in capsys.readouterr().err
    assert call("--num-steps", "3", "--dry-run", "--json") == 0
    assert json.loads(capsys.readouterr().out)["num_steps"] == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--decay-steps", "3"], "needs --decay-from"),
        (["--decay-from", "trunk"], "not of the form RUN_DIR@STEP"),
        (["--num-steps", "3", "--num-tokens", "1e5"], "give exactly one"),
        (["--num-steps", "3", "--set", "optimizer.matrix_rl=1"], "did you mean 'optimizer.matrix_lr'"),
        (["--num-steps", "3", "--set", "seed"], "not of the form key=value"),
        (["--num-steps", "3", "--batch-tokens", "100"], "not a multiple of sequence_len 32"),
        (["--num-steps", "3", "--fp8", "tensorwise"], "needs a GPU with fp8 units"),
        (["--num-steps", "3", "--core-bundle", "/nowhere"], "neither a folder"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    tmp_path: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("--run-dir", str(tmp_path / "r"), *options) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1 and not (tmp_path / "r" / "record.json").exists()


def test_missing_shards(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as e:
        main([str(tmp_path / "nowhere")])
    assert e.value.code == 2 and "no token shards" in capsys.readouterr().err


def test_help_shows_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as e:
        main(["--help"])
    out = capsys.readouterr().out
    assert e.value.code == 0 and "torchrun --nproc_per_node=8 -m nanochat_model.train" in out and "--tokens-per-param" in out
