"""Configs, horizons, recipes and records: arithmetic, strictness, and a round trip through JSON."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest

from nanochat_model import ConfigError, GPTConfig, Horizon, PowerRule, Recipe, RunRecord, TrainConfig, count_params, flops_per_token
from nanochat_model.counts import count_params_2025
from nanochat_model.identity import from_dict, run_id
from nanochat_model.overrides import apply_overrides, dotted_keys, whole
from nanochat_model.recipe import D12_SCALING_PARAMS, NANOCHAT
from nanochat_model.record import CurvePoint


def test_d24_counts_match_the_published_figures():
    counts = count_params(GPTConfig.from_depth(24))
    assert (counts.wte, counts.value_embeds, counts.lm_head) == (50_331_648, 603_979_776, 50_331_648)
    assert (counts.transformer_matrices, counts.scalars, counts.total) == (679_478_976, 74, 1_384_122_122)


def test_older_counting_matches_its_published_figures():
    published = {4: 36.7e6, 8: 92.3e6, 12: 186e6, 20: 561e6}
    for depth, n in published.items():
        assert count_params_2025(depth) == pytest.approx(n, rel=5e-3)
    d4 = count_params_2025(4)
    assert 2 * 65536 * 256 / d4 == pytest.approx(0.91, abs=0.005)


def test_d12_reference_is_what_the_recipe_assumes():
    assert count_params(GPTConfig.from_depth(12)).scaling == D12_SCALING_PARAMS


def test_leaderboard_run_with_its_older_half_window_costs_4_33e19_flops():
    model = GPTConfig.from_depth(24)
    half_window = 12 * model.model_dim * (18 * 1024 + 6 * 2048)
    short_window = 12 * model.model_dim * sum(model.windows)
    tokens = 12 * count_params(model).scaling
    assert (flops_per_token(model) - short_window + half_window) * tokens == pytest.approx(4.33e19, rel=2e-3)


def test_windows_are_quarter_context_in_whole_tiles_and_the_last_layer_is_long():
    assert GPTConfig.from_depth(6).windows == (512, 512, 512, 2048, 512, 2048)
    assert GPTConfig(depth=2, model_dim=64, num_heads=2, num_kv_heads=2, sequence_len=256).windows == (128, 256)


def test_recipe_follows_the_runs_own_horizon():
    model = GPTConfig.from_depth(20)
    by_ratio = NANOCHAT.resolve(model)
    by_flops = NANOCHAT.resolve(model, Horizon(train_flops=12 * count_params(model).scaling * flops_per_token(model)))
    assert by_ratio.batch_tokens == by_flops.batch_tokens == 2**20
    assert by_flops.optimizer.weight_decay == pytest.approx(by_ratio.optimizer.weight_decay, rel=1e-9)
    short = NANOCHAT.resolve(model, Horizon(tokens_per_param=1.2))
    assert short.batch_tokens < by_ratio.batch_tokens
    expected = 0.28 * math.sqrt(short.batch_tokens / 2**19) * (12 * D12_SCALING_PARAMS) / (1.2 * count_params(model).scaling)
    assert short.optimizer.weight_decay == pytest.approx(expected, rel=1e-12)


def test_a_given_batch_moves_learning_rate_and_decay_by_their_rules():
    model = GPTConfig.from_depth(12)
    base = NANOCHAT.resolve(model)
    doubled = NANOCHAT.resolve(model, overrides={"batch_tokens": 2 * base.batch_tokens})
    assert doubled.optimizer.matrix_lr / base.optimizer.matrix_lr == pytest.approx(math.sqrt(2))
    assert doubled.optimizer.weight_decay / base.optimizer.weight_decay == pytest.approx(math.sqrt(2))
    assert doubled.optimizer.smear_lr == base.optimizer.smear_lr


def test_a_horizon_in_steps_finds_its_own_batch():
    model = GPTConfig.from_depth(12)
    recipe = dataclasses.replace(NANOCHAT, batch_rounding="row")
    config = recipe.resolve(model, Horizon(num_steps=2520))
    assert recipe.batch_size(D=float(config.num_tokens)) == pytest.approx(config.batch_tokens, rel=2e-3)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Horizon(num_tokens=1e9, train_flops=1e18), "exactly one"),
        (lambda: Horizon(), "exactly one"),
        (lambda: Horizon(num_tokens=-1), "positive"),
        (lambda: GPTConfig(model_dim=100, num_heads=3, num_kv_heads=3), "nearest: 102"),
        (lambda: GPTConfig(window_pattern="SX"), "window_pattern"),
        (lambda: TrainConfig(batch_tokens=500000), "nearest: 499712"),
        (lambda: NANOCHAT.resolve(GPTConfig(), overrides={"optimizer.weigth_decay": 1}), "did you mean 'optimizer.weight_decay'"),
        (lambda: NANOCHAT.resolve(GPTConfig(), overrides={"num_steps": "many"}), "not of type int"),
        (lambda: NANOCHAT.resolve(GPTConfig(), overrides={"compute_dtype": "int8"}), "must be one of"),
        (lambda: NANOCHAT.resolve(GPTConfig(), overrides={"batch_tokens": "half"}), "batch_tokens 'half' is not of type int"),
        (lambda: NANOCHAT.resolve(GPTConfig(), overrides={"lr_multiplier": "2x"}), "lr_multiplier '2x' is not of type float"),
        (lambda: PowerRule(coefficient=1, exponents={"Q": 1}), "unknown symbol"),
    ],
)
def test_bad_input_is_named_with_its_remedy(build, message):
    with pytest.raises(ConfigError, match=message):
        build()


def test_every_leaf_can_be_overridden_by_its_own_value():
    config = NANOCHAT.resolve(GPTConfig())
    values = {k: _leaf(config, k) for k in dotted_keys(config)}
    assert apply_overrides(config, values) == config
    as_text = {k: (",".join(map(str, v)) if isinstance(v, tuple) else str(v)) for k, v in values.items()}
    assert apply_overrides(config, as_text) == config


def test_whole_numbers_are_read_exactly():
    for given, expected in ((str(2**53 + 1), 2**53 + 1), (2**53 + 1, 2**53 + 1), ("1e6", 10**6), (1e6, 10**6), ("-3", -3)):
        assert whole(given) == expected
    for given in ("1.5", "nan", "x", None):
        with pytest.raises((ValueError, TypeError)):
            whole(given)


def _leaf(config, key):
    for part in key.split("."):
        config = getattr(config, part)
    return config


def test_run_id_ignores_where_the_data_lies_and_nothing_that_counts():
    config = NANOCHAT.resolve(GPTConfig())
    moved = apply_overrides(config, {"data.path": "/elsewhere", "eval.every_steps": 7})
    assert run_id(moved) == run_id(config)
    for key, value in {"seed": 1, "data.manifest_hash": "x", "optimizer.weight_decay": 0.1, "num_steps": 3}.items():
        assert run_id(apply_overrides(config, {key: value})) != run_id(config)


def _record() -> RunRecord:
    config = Recipe().resolve(GPTConfig.from_depth(12))
    point = CurvePoint(step=10, num_tokens=100, train_flops=1e9, seconds=1.5, val_bpb=1.2)
    return RunRecord(
        run_id=run_id(config), status="complete", config=config, seed=0, params=count_params(config.model).as_dict(),
        num_tokens=config.num_tokens, flops_per_token=flops_per_token(config.model), train_flops=1e18, curve=(point,), val_bpb=1.2,
    )  # fmt: skip


def test_record_survives_the_disk(tmp_path):
    record = _record()
    record.save(tmp_path)
    assert RunRecord.load(tmp_path) == record
    assert json.loads((tmp_path / "record.json").read_text())["comparable_hash"] == record.comparable_hash


def test_a_record_cut_short_or_of_another_schema_is_named(tmp_path):
    path = _record().save(tmp_path)
    text = path.read_text()
    path.write_text(text[: len(text) // 2])
    with pytest.raises(ConfigError, match=r"record\.json.*cut short"):
        RunRecord.load(tmp_path)
    path.write_text(text.replace('"schema_version": 1', '"schema_version": 99'))
    with pytest.raises(ConfigError, match="schema 99"):
        RunRecord.load(tmp_path)
    with pytest.raises(ConfigError, match="no run record"):
        RunRecord.load(tmp_path / "nowhere")


def test_unknown_field_in_a_config_is_refused():
    data = dataclasses.asdict(TrainConfig())
    data["model"]["n_layer"] = 3
    with pytest.raises(ConfigError, match=r"model\.n_layer"):
        from_dict(TrainConfig, data)
