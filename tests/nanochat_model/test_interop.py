"""Checkpoints in nanochat's layout: logits and bpb of an imported one against the slow reference, the way back, bad files."""

from __future__ import annotations

import json
import math

import pytest
import reference_model as ref
import torch

import nanochat_model
from nanochat_model.checkpoint import read_state
from nanochat_model.errors import ConfigError
from nanochat_model.evaluate import evaluate_bpb
from nanochat_model.interop import export_nanochat, import_nanochat

torch.set_num_threads(1)
CONFIG = ref.model_config(depth=4, dim=64, heads=4, kv_heads=2, T=150, vocab=100, pattern="SSL")


def write(folder, *, step=7, weights=None, config=None, prefix="", **meta):
    """What nanochat's save_checkpoint writes."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = ref.random_weights(CONFIG) if weights is None else weights
    torch.save({prefix + n: w for n, w in weights.items()}, folder / f"model_{step:06d}.pt")
    meta = {"step": step, "val_bpb": 1.25, "model_config": config or CONFIG, "user_config": {"depth": 4}, **meta}
    (folder / f"meta_{step:06d}.json").write_text(json.dumps(meta))
    return weights


@pytest.mark.parametrize("form", ["plain", "compiled, bf16 tables"])
def test_imported_logits_and_bpb_are_the_references(tmp_path, form):
    weights = ref.random_weights(CONFIG)
    if form != "plain":
        weights = {n: w.bfloat16() if "wte" in n or "value_embeds" in n else w for n, w in weights.items()}
    write(tmp_path / "d4", weights=weights, prefix="" if form == "plain" else "_orig_mod.")
    model = nanochat_model.load(str(import_nanochat(tmp_path / "d4", tmp_path / "out")), device="cpu", dtype=torch.float32)
    g = torch.Generator().manual_seed(0)
    idx, targets = (torch.randint(0, 100, (2, 150), generator=g) for _ in range(2))
    targets[0, :5] = -1
    logits = ref.logits({n: w.double() for n, w in weights.items()}, CONFIG, idx)
    found = model(idx)
    assert found.shape == (2, 150, 100) and found.dtype == torch.float32
    assert (found - logits).abs().max() < 1e-4
    token_bytes = torch.randint(0, 5, (100,), generator=g)
    counts = torch.where(targets >= 0, token_bytes[targets.clamp_min(0)], 0)
    counted = torch.where(counts > 0, targets, -1)
    bpb = ref.cross_entropy(logits.flatten(0, 1), counted.flatten()) / (math.log(2) * counts.sum())
    assert evaluate_bpb(model, (idx, targets), token_bytes) == pytest.approx(bpb.item(), abs=1e-5)


@pytest.mark.parametrize("bf16_tables", [False, True])
def test_there_and_back_is_exact(tmp_path, bf16_tables):
    weights = ref.random_weights(CONFIG)
    if bf16_tables:
        weights = {n: w.bfloat16() if "wte" in n or "value_embeds" in n else w for n, w in weights.items()}
    write(tmp_path / "d4", weights=weights)
    checkpoint = import_nanochat(tmp_path / "d4", tmp_path / "ours")
    export_nanochat(checkpoint, tmp_path / "back", bf16_tables=bf16_tables)
    back = torch.load(tmp_path / "back" / "model_000007.pt", weights_only=True)
    assert set(back) == set(weights)
    assert all(torch.equal(back[n], w) and back[n].dtype == w.dtype for n, w in weights.items())
    meta = json.loads((tmp_path / "back" / "meta_000007.json").read_text())
    assert meta["model_config"] == CONFIG and meta["step"] == 7 and meta["val_bpb"] == 1.25 and meta["user_config"] == {"depth": 4}


def test_the_last_step_is_taken_unless_told(tmp_path):
    for step in (5, 1000):
        write(tmp_path / "d4", step=step)
    assert import_nanochat(tmp_path / "d4", tmp_path / "a").name == "step_001000"
    assert import_nanochat(tmp_path / "d4", tmp_path / "b", step=5).name == "step_000005"
    with pytest.raises(ConfigError, match="no checkpoint of step 6"):
        import_nanochat(tmp_path / "d4", tmp_path / "c", step=6)


def test_a_file_a_wrong_folder_and_a_folder_not_yet_converted(tmp_path):
    for step in (5, 1000):
        write(tmp_path / "base_checkpoints" / "d4", step=step)
    folder = tmp_path / "base_checkpoints" / "d4"
    assert import_nanochat(folder / "model_000005.pt", tmp_path / "a").name == "step_000005"
    for wrong in (tmp_path, folder.parent):
        with pytest.raises(ConfigError, match=f"no model_<step>.pt in {wrong}; give one of {folder}$"):
            import_nanochat(wrong, tmp_path / "out")
    with pytest.raises(ConfigError, match="nowhere is no folder"):
        import_nanochat(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(ConfigError, match="is a nanochat checkpoint; convert it first: nanoladder import-nanochat"):
        nanochat_model.load(str(folder))
    with pytest.raises(ConfigError, match=r"torch sees no GPU|sees \d+ GPUs"):
        nanochat_model.load(str(tmp_path / "a"), device="cuda:99")


def test_a_tokenizer_that_does_not_fit_can_be_left_behind(tmp_path):
    write(tmp_path / "base_checkpoints" / "d4")
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.pkl").write_bytes(b"\x80\x04")
    with pytest.raises(ConfigError, match="not a pickled tiktoken Encoding"):
        import_nanochat(tmp_path / "base_checkpoints" / "d4", tmp_path / "out")
    folder = import_nanochat(tmp_path / "base_checkpoints" / "d4", tmp_path / "out", tokenizer="none")
    assert not (tmp_path / "out" / "tokenizer").exists() and read_state(folder).extra["tokenizer_path"] == ""


def test_scalars_that_nanochat_fills_are_filled_without_effect(tmp_path):
    weights = ref.random_weights(CONFIG)
    old = ("resid_lambdas", "x0_lambdas")
    config = {k: v for k, v in CONFIG.items() if k != "window_pattern"}
    write(tmp_path / "d4", weights={n: w for n, w in weights.items() if n not in old}, config=config)
    folder = import_nanochat(tmp_path / "d4", tmp_path / "out")
    assert read_state(folder).extra["filled"] == list(old)
    model = nanochat_model.load(str(folder))
    neutral = {"x0_lambdas": torch.zeros(4), "resid_lambdas": torch.ones(4)}
    idx = torch.randint(0, 100, (1, 150))
    expected = ref.logits({n: w.double() for n, w in (weights | neutral).items()}, {**CONFIG, "window_pattern": "L"}, idx)
    assert (model(idx) - expected).abs().max() < 1e-4


class Evil:
    def __reduce__(self):
        return (print, ("executed",))


def broken_checkpoints():
    weights = ref.random_weights(CONFIG)
    without = {n: w for n, w in weights.items() if n != "transformer.h.3.attn.ve_gate.weight"}
    return {
        "lacks transformer.h.3.attn.ve_gate.weight": {"weights": without},
        "has extra.weight, which": {"weights": {**weights, "extra.weight": torch.zeros(1)}},
        "lacks smear_lambda: it is from before": {"weights": {n: w for n, w in weights.items() if n != "smear_lambda"}},
        "gates of 32 channels, now 12: it is from before": {
            "weights": {n: torch.zeros(2, 32) if n.endswith("ve_gate.weight") else w for n, w in weights.items()}
        },
        "is \\(128, 64\\), its meta file": {"config": {**CONFIG, "vocab_size": 500}},
        "lacks n_head": {"config": {k: v for k, v in CONFIG.items() if k != "n_head"}},
        "has the unknown key n_experts": {"config": {**CONFIG, "n_experts": 8}},
        "not executed|not run": {"weights": {**weights, "evil": Evil()}},
    }


@pytest.mark.parametrize("message", broken_checkpoints())
def test_what_does_not_fit_is_named(tmp_path, message, capsys):
    write(tmp_path / "d4", **broken_checkpoints()[message])
    with pytest.raises(ConfigError, match=message):
        import_nanochat(tmp_path / "d4", tmp_path / "out")
    assert "executed" not in capsys.readouterr().out and not (tmp_path / "out").exists()


def test_missing_and_torn_files_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"no model_<step>.pt"):
        import_nanochat(tmp_path, tmp_path / "out")
    write(tmp_path / "d4")
    file = tmp_path / "d4" / "model_000007.pt"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(ConfigError, match="not readable"):
        import_nanochat(tmp_path / "d4", tmp_path / "out")
    (tmp_path / "d4" / "meta_000007.json").unlink()
    with pytest.raises(ConfigError, match=r"meta_000007.json is missing"):
        import_nanochat(tmp_path / "d4", tmp_path / "out")
