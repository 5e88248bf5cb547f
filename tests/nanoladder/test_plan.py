"""The planner's arithmetic against runs that happened, and the mistakes it must expose."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from nanochat_model.config import DataConfig, GPTConfig
from nanochat_model.counts import count_params, count_params_2025, flops_per_token
from nanochat_model.errors import ConfigError
from nanochat_model.hardware import find_device, require_device
from nanochat_model.horizon import Horizon
from nanochat_model.memory import choose_micro_batch_rows, estimate_memory
from nanochat_model.overrides import apply_overrides
from nanochat_model.recipe import NANOCHAT
from nanochat_model.record import RunRecord
from nanoladder.launch import launch_runtime
from nanoladder.laws_to_recipe import recipe_from_laws
from nanoladder.plan import make_plan
from nanoladder.plan_backwards import Goal, _flops_for_loss, solve_goal
from nanoladder.plan_text import plan_sections
from nanoladder.recipes import find_recipe, recipe_of_run, write_recipe
from nanoladder.target import Target
from nanoladder.throughput import all_reduce_seconds, estimate_throughput, flops_mistake, mfu_mistake, mfu_of

D24 = GPTConfig.from_depth(24, window_pattern="L")
NO_LAWS = recipe_from_laws(None, NANOCHAT)
MI300X_RUN = Target(device="mi300x", tokens_per_second=68_000)  # nanochat d24, SDPA, window L, device batch 32


def test_hours_of_the_62_hour_run() -> None:
    plan = make_plan(D24, horizon=Horizon(num_steps=29_000), target=MI300X_RUN, overrides={"batch_tokens": 524_288})
    assert plan.hours == pytest.approx(62, abs=0.2)
    assert plan.step_seconds == pytest.approx(7.7, abs=0.05)
    assert plan.tokens_per_param == pytest.approx(20.8, abs=0.05)
    assert plan.throughput.mfu == pytest.approx(0.275, abs=0.001)


def test_hours_at_ratio_12() -> None:
    plan = make_plan(D24, horizon=Horizon(tokens_per_param=12), target=MI300X_RUN, overrides={"batch_tokens": 524_288})
    assert plan.hours == pytest.approx(36, abs=0.5)


def test_d24_with_the_default_recipe_is_nanochats_million_token_batch() -> None:
    plan = make_plan(D24, target=MI300X_RUN)
    assert plan.config.batch_tokens == 2**20
    assert plan.tokens_per_param == pytest.approx(12, rel=1e-3)


def test_flops_of_the_leaderboard_run() -> None:
    """d24 at ratio 12 with the short window of half the context that nanochat had then: 4.33e19 FLOPs."""
    model = GPTConfig.from_depth(24, window_pattern="SSSL")
    windows = [2048 if w == 2048 else 1024 for w in model.windows]
    flops = flops_per_token(model, windows) * 12 * count_params(model).scaling
    assert flops == pytest.approx(4.33e19, rel=2e-3)
    rate = flops / 10_949  # seconds on 8 devices
    assert rate / 8 == pytest.approx(494e12, rel=2e-3)
    h100 = require_device("NVIDIA H100 80GB HBM3")
    assert mfu_of(model, rate / flops_per_token(model, windows), h100, num_devices=8, windows=windows) == pytest.approx(
        0.5, abs=1e-3
    )


def test_gradients_on_gigabit_ethernet() -> None:
    """186M parameters in fp32: 744 MB, 6 s a step between two machines and towards 12 s between many."""
    gradients = 4 * count_params_2025(12)
    assert gradients == pytest.approx(744e6, rel=3e-3)
    assert all_reduce_seconds(gradients, num_nodes=2, bandwidth_bytes=125e6) == pytest.approx(6, abs=0.1)
    assert all_reduce_seconds(gradients, num_nodes=100, bandwidth_bytes=125e6) == pytest.approx(12, abs=0.3)
    assert all_reduce_seconds(gradients, num_nodes=1, bandwidth_bytes=125e6) == 0


def test_memory_of_the_105_gigabyte_run() -> None:
    """nanochat keeps its tables in bf16 and whole logits; ours are fp32 tables and chunked logits."""
    theirs = estimate_memory(D24, micro_batch_rows=32, table_bytes=2, logits="whole")
    assert theirs.total == pytest.approx(105e9, rel=0.05)
    ours = estimate_memory(D24, micro_batch_rows=32)
    assert ours.logits < theirs.logits / 7
    assert estimate_memory(D24, micro_batch_rows=32, num_devices=8).optimizer == ours.optimizer / 8


def test_micro_batch_fits_or_says_why_not() -> None:
    rows = choose_micro_batch_rows(D24, rows_per_device=256, memory_bytes=80e9)
    assert 256 % rows == 0
    assert estimate_memory(D24, micro_batch_rows=rows).total < 80e9
    assert estimate_memory(D24, micro_batch_rows=2 * rows).total > 0.92 * 80e9
    with pytest.raises(ConfigError, match=r"needs \d+ GB, the card offers 74 GB of its 80 GB; take a smaller"):
        choose_micro_batch_rows(GPTConfig.from_depth(60), rows_per_device=8, memory_bytes=80e9)


def test_mfu_above_100_percent_is_refused_and_explained() -> None:
    """68k tokens/s on an MI300X divided by an A100's peak is the famous 108–113%."""
    with pytest.raises(ConfigError, match=r"MFU 115% is over 100%.*a wrong device \(a H100 could do it\)"):
        mfu_of(D24, 68_000, require_device("a100"))
    with pytest.raises(ConfigError, match="MFU"):
        make_plan(D24, target=Target(device="a100", tokens_per_second=68_000))
    with pytest.raises(ConfigError, match=r"mfu 45 must lie in 0\.\.1"):
        estimate_throughput(D24, "h100", mfu=45)


@pytest.mark.parametrize(
    ("claimed", "name"),
    [(lambda c: 2 * c.scaling, "2N"), (lambda c: 6 * c.total, "6 × all"), (lambda c: 6 * c.scaling, "6N without attention")],
)
def test_flops_mistakes_are_named(claimed, name: str) -> None:
    found = flops_mistake(D24, claimed(count_params(D24)))
    assert found is not None and found.startswith(name)
    assert flops_mistake(D24, flops_per_token(D24)) is None


def test_unknown_cards_have_no_peak() -> None:
    assert find_device("AMD Instinct MI300X VF").name == "MI300X"  # type: ignore[union-attr]
    assert find_device("NVIDIA A100-SXM4-40GB").memory_bytes == 40e9  # type: ignore[union-attr]
    assert find_device("NVIDIA H100 PCIe") is None
    assert find_device("AMD EPYC 9755") is None
    with pytest.raises(ConfigError, match=r"is not in the table of peaks"):
        require_device("rtx 4090")


def test_batch_must_divide_over_devices() -> None:
    with pytest.raises(ConfigError, match="256 rows does not divide over 3 devices; nearest batch_tokens: 522240"):
        make_plan(D24, target=Target(num_devices=3), overrides={"batch_tokens": 524_288})


def test_every_value_names_its_rule() -> None:
    plan = make_plan(D24, target=Target(device="h100", num_devices=8, price_per_device_hour=2.0))
    assert {u.quantity: u.kind for u in plan.uses} == dict.fromkeys(
        ("allocation", "batch_size", "learning_rate", "weight_decay"), "rule"
    )
    assert plan.dollars == pytest.approx(plan.hours * 16)
    assert not plan.throughput.measured and "assumed: MFU 50%" in plan.throughput.source
    assert any("no loss is predicted" in w for w in plan.warnings)
    assert plan.accumulation_steps * plan.micro_batch_rows * 8 == plan.config.rows_per_batch


def solve(**goal: float):
    target = Target(device="h100", num_devices=8, price_per_device_hour=3.0)
    return solve_goal(Goal(**goal), target=target, resolved=NO_LAWS, model_args={})


def test_backwards_from_flops_hours_and_dollars() -> None:
    model, flops = solve(flops=4.33e19)
    assert model.depth == 24 and flops == 4.33e19
    by_hours, flops_by_hours = solve(budget_hours=10_949 / 3600)
    assert abs(by_hours.depth - 24) <= 1
    assert flops_by_hours == pytest.approx(4.33e19, rel=0.02)
    by_dollars, flops_by_dollars = solve(budget_dollars=24 * 10_949 / 3600)
    assert by_dollars == by_hours and math.isclose(flops_by_dollars, flops_by_hours)


@pytest.mark.parametrize("goal", [{"budget_hours": 4.0}, {"budget_dollars": 300.0}])
def test_a_budget_pays_for_the_network_too(goal: dict[str, float]) -> None:
    """Four nodes on slow Ethernet, where averaging gradients takes longer than computing them."""
    target = Target(device="h100", num_devices=32, price_per_device_hour=3.0, network_bytes_per_second=1.25e9)
    model, flops = solve_goal(Goal(**goal), target=target, resolved=NO_LAWS, model_args={})
    plan = make_plan(model, horizon=Horizon(train_flops=flops), target=target, depth_solved=True)
    assert plan.all_reduce_seconds > 0.5 * plan.step_seconds
    assert plan.dollars is not None
    spent, budget = (plan.hours, 4.0) if "budget_hours" in goal else (plan.dollars, 300.0)
    assert 0.9 * budget < spent <= budget
    with pytest.raises(ConfigError, match="does not pay for one step"):
        solve_goal(Goal(budget_hours=1e-6), target=target, resolved=NO_LAWS, model_args={})


def test_a_given_horizon_is_named_as_such() -> None:
    given = make_plan(D24, horizon=Horizon(tokens_per_param=20))
    assert [(u.kind, u.source) for u in given.uses if u.quantity == "allocation"] == [("given", "tokens_per_param 20")]
    solved = make_plan(D24, horizon=Horizon(train_flops=4e19), depth_solved=True)
    source = next(u.source for u in solved.uses if u.quantity == "allocation")
    assert source == "train_flops 4e+19; depth by 12 tokens per parameter, recipe nanochat"


def test_a_given_value_is_named_and_its_law_stops_nothing() -> None:
    laws = {"weight_decay": {"status": "too_few", "average": {}}, "batch_size": {"status": "too_few"}}
    assert len(make_plan(D24, laws=laws).blocking) == 2
    given = make_plan(D24, laws=laws, overrides={"batch_tokens": 2**20, "optimizer.weight_decay": 0.1})
    assert not given.blocking
    found = {u.quantity: (u.kind, u.source) for u in given.uses}
    assert found["batch_size"] == ("given", "batch_tokens 1048576")
    assert found["weight_decay"] == ("given", "optimizer.weight_decay 0.1")
    assert found["learning_rate"][0] == "rule"


def test_backwards_needs_what_it_needs() -> None:
    with pytest.raises(ConfigError, match="needs fitted laws"):
        solve(target_bpb=0.72)
    with pytest.raises(ConfigError, match="no frontier"):
        _flops_for_loss(0.72, {"predictor": None, "frontier": {"E": None}})
    with pytest.raises(ConfigError, match="needs a price"):
        solve_goal(Goal(budget_dollars=100), target=Target(), resolved=NO_LAWS, model_args={})
    with pytest.raises(ConfigError, match="2 goals are given"):
        Goal(flops=1e19, budget_hours=3)


def recorded_run(device: str, rate: float, depth: int, num_devices: int = 1) -> RunRecord:
    """`rate`: FLOP/s of one device."""
    config = NANOCHAT.resolve(GPTConfig.from_depth(depth), Horizon(num_tokens=1e9))
    flops = float(flops_per_token(config.model)) * config.num_tokens
    return RunRecord(
        run_id=f"{depth}{device}", status="complete", config=config, seed=0, params=count_params(config.model).as_dict(),
        num_tokens=config.num_tokens, flops_per_token=flops_per_token(config.model), train_flops=flops, device=device,
        train_seconds=flops / rate / num_devices, num_devices=num_devices,
    )  # fmt: skip


def test_recorded_runs_on_the_device_tell_the_speed() -> None:
    records = [recorded_run("AMD EPYC (1 of 2 threads)", 50e9, 4), recorded_run("NVIDIA H100 80GB HBM3", 400e12, 12)]
    on_cpu = estimate_throughput(GPTConfig.from_depth(4), "cpu", records=records)
    assert on_cpu.measured and on_cpu.flops_per_second == pytest.approx(50e9) and on_cpu.mfu is None
    on_gpu = estimate_throughput(GPTConfig.from_depth(12), "h100", num_devices=8, records=records)
    assert on_gpu.measured and on_gpu.mfu == pytest.approx(400 / 989)
    assert not estimate_throughput(GPTConfig.from_depth(12), "mi300x", records=records).measured


def test_a_fine_tuning_is_no_record_of_pretrainings_speed() -> None:
    base, tuned = recorded_run("NVIDIA H100 80GB HBM3", 400e12, 12), recorded_run("NVIDIA H100 80GB HBM3", 100e12, 12)
    records = [replace(tuned, kind="sft", run_id=f"sft{i}") for i in range(3)]
    model = GPTConfig.from_depth(12)
    assert estimate_throughput(model, "h100", records=[*records, base]).flops_per_second == pytest.approx(400e12)
    assert not estimate_throughput(model, "h100", records=records).measured
    assert launch_runtime(make_plan(model, records=records)).usual_mfu == 0.0


def test_the_network_in_a_recorded_speed_is_not_added_again() -> None:
    one_node, two_nodes = (recorded_run("NVIDIA H100 80GB HBM3", rate, 24, n) for rate, n in ((400e12, 8), (300e12, 16)))
    on_two = Target(device="h100", num_devices=16)
    plan = make_plan(D24, target=on_two, records=[one_node])
    computing = plan.config.batch_tokens / plan.throughput.tokens_per_second
    assert plan.step_seconds == pytest.approx(computing + plan.all_reduce_seconds), "one node has none of it"
    plan = make_plan(D24, target=on_two, records=[one_node, two_nodes])
    assert plan.throughput.flops_per_second == pytest.approx(16 * 300e12), "the run that spanned nodes too"
    assert plan.all_reduce_seconds > 0 and plan.step_seconds == plan.config.batch_tokens / plan.throughput.tokens_per_second
    assert "network included" in plan.throughput.source
    times = dict(next(rows for title, rows in plan_sections(plan) if title == "Time and money"))
    assert "(in the speed already)" in times["gradients"]
    alone = make_plan(D24, target=Target(device="h100", num_devices=8), records=[one_node, two_nodes])
    assert alone.throughput.flops_per_second == pytest.approx(8 * 400e12) and "network" not in alone.throughput.source


def test_a_launch_is_told_the_mfu_of_recorded_runs() -> None:
    """So that its run can say when it is far below."""
    records = [recorded_run("NVIDIA H100 80GB HBM3", 400e12, 12)]
    told = [launch_runtime(make_plan(GPTConfig.from_depth(12), records=given)).usual_mfu for given in (records, [])]
    assert told == [pytest.approx(400 / 989), 0.0], "an assumed speed is nobody's record"


def test_decay_that_would_erase_the_weights_stops_a_launch() -> None:
    plan = make_plan(GPTConfig.from_depth(4), horizon=Horizon(num_tokens=1e6), target=Target(device="cpu"))
    assert any("weights would be gone" in line and "--recipe" in line for line in plan.blocking)
    assert not make_plan(GPTConfig.from_depth(12)).blocking
    mended = make_plan(
        GPTConfig.from_depth(4),
        horizon=Horizon(num_tokens=1e6),
        target=Target(device="cpu"),
        overrides={"optimizer.weight_decay": 0.1},
    )
    assert not mended.blocking


def test_what_best_fit_drops_must_be_downloaded_too() -> None:
    whole = make_plan(D24, data=DataConfig(packing="keep_remainder"))
    dropped = make_plan(D24, data=DataConfig(packing="best_fit"))
    assert whole.data_bytes == pytest.approx(whole.config.num_tokens * 4.8)
    assert dropped.data_bytes == pytest.approx(whole.data_bytes / 0.65)
    assert whole.data_shards == 170, "what nanochat's own script fetches for this run"
    assert whole.token_bytes == 2 * whole.config.num_tokens


def test_a_wrong_peak_and_other_misreadings_are_named() -> None:
    mi300x = require_device("mi300x")
    rate = flops_per_token(D24) * 68_000
    assert mfu_mistake(D24, rate / 1307.4e12, 68_000, mi300x) is None
    found = mfu_mistake(D24, rate / 312e12, 68_000, mi300x)
    assert found is not None and "divided by the peak of a A100" in found and "it is 27.5% of 1 × MI300X" in found
    share = 2 * count_params(D24).scaling * 68_000 / 1307.4e12
    assert "2N taken for 6N" in (mfu_mistake(D24, share, 68_000, mi300x) or "")
    assert "no mistake known" in (mfu_mistake(D24, 0.7, 68_000, mi300x) or "")


def test_a_recipe_from_a_run_gives_that_run_back_and_carries_it(tmp_path) -> None:
    base = replace(NANOCHAT, name="small", batch_size=replace(NANOCHAT.batch_size, coefficient=2.0**14, references={"D": 1e7}))
    model = GPTConfig.from_depth(4)
    config = base.resolve(model, Horizon(num_tokens=1e7), overrides={"optimizer.weight_decay": 0.02})
    record = replace(recorded_run("cpu", 1e10, 4), config=config)
    recipe = recipe_of_run(record)
    again = recipe.resolve(model, Horizon(num_steps=config.num_steps))
    assert again.optimizer == config.optimizer and again.batch_tokens == config.batch_tokens
    assert again.num_steps == config.num_steps
    larger = recipe.resolve(model, Horizon(num_tokens=8 * config.num_tokens))
    assert larger.batch_tokens == 2 * config.batch_tokens, "8^0.383, to a power of two"
    assert larger.optimizer.weight_decay == pytest.approx(0.02 * math.sqrt(2) / 8, rel=0.01)
    plan = make_plan(model, horizon=Horizon(num_tokens=1e7), recipe=recipe, target=Target(device="cpu"))
    assert not plan.blocking and "run 4cpu" in plan.recipe
    write_recipe(recipe, tmp_path / "recipe.json")
    assert find_recipe(laws_path=str(tmp_path / "laws.json")) == recipe, "the recipe beside the laws"
    assert find_recipe(str(tmp_path / "recipe.json")) == recipe
    record.save(tmp_path / "run")
    assert find_recipe(str(tmp_path / "run")) == recipe
    assert find_recipe() == NANOCHAT and find_recipe("demo").name == "demo"
    none = recipe_of_run(replace(record, config=apply_overrides(config, {"optimizer.weight_decay": 0.0})))
    assert none.resolve(model, Horizon(num_tokens=4e7)).optimizer.weight_decay == 0
    with pytest.raises(ConfigError, match="no file and no run's folder"):
        find_recipe("nothing")
    (tmp_path / "bad.json").write_text('{"tokens_per_parameter": 3}')
    with pytest.raises(ConfigError, match=r"unknown field .*tokens_per_parameter"):
        find_recipe(str(tmp_path / "bad.json"))
