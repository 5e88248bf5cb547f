"""Batch, learning-rate and weight-decay laws: published tables give the published figures, known ladders give their truth."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from synthetic_ladder import DEMO, REAL, write_ladder

from analysis.batch import fit_batch_size
from analysis.learning_rate import fit_learning_rate
from analysis.noise import estimate_noise
from analysis.optima import find_optima
from analysis.purposes import assign_purposes, cell_numbers, select, tuned_envelope
from analysis.table import load_csv, load_records
from analysis.weight_decay import WeightDecayLaw, fit_weight_decay, weight_decay_from_optima

STEPLAW = Path(__file__).parents[1] / "data" / "steplaw_dense.csv"  # 1911 dense runs of Step Law, arXiv 2503.04715


@pytest.fixture(scope="module")
def steplaw() -> pd.DataFrame:
    return load_csv(STEPLAW).frame


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> pd.DataFrame:
    folder = tmp_path_factory.mktemp("real")
    write_ladder(folder, replace(REAL, noise=0.001, batch_cells=4, weight_decay_cells=4))
    return load_records(folder).frame


def test_step_law_batch_exponent(steplaw):
    """Published 0.571 (arXiv 2503.04715); quadratics within 2% of the best loss give 0.569 ± 0.033, argmins 0.498 ± 0.078."""
    law = fit_batch_size(steplaw)
    assert law.n == 17 and law.status == "converged"
    assert law.parameters["D"] == pytest.approx(0.569, abs=0.001)
    assert law.standard_errors["D"] == pytest.approx(0.033, abs=0.001)
    assert law.intervals["D"][0] < 0.571 < law.intervals["D"][1]
    assert law.tests["argmin"]["exponent"] == pytest.approx(0.498, abs=0.001)
    assert law.tests["argmin"]["standard_error"] == pytest.approx(0.078, abs=0.001)
    assert all(c["edge"] == "interior" for c in law.cells)


def test_step_law_batch_has_an_n_term(steplaw):
    """In this table the test does find one: −0.20 ± 0.03 beside D^0.59. It is reported, the law stays B = k·D^γ."""
    term = fit_batch_size(steplaw).tests["N_term"]
    assert term["significant"] and term["exponent"] == pytest.approx(-0.20, abs=0.01)


def test_step_law_learning_rate_exponents(steplaw):
    """Quadratic optima give N^−0.695(37)·D^0.208(21); published 1.79·N^−0.713·D^0.307 (arXiv 2503.04715)."""
    law = fit_learning_rate(steplaw)
    assert (law.n, law.status) == (17, "converged")
    assert law.parameters["N"] == pytest.approx(-0.695, abs=0.002)
    assert law.parameters["D"] == pytest.approx(0.208, abs=0.005)
    assert law.standard_errors["N"] == pytest.approx(0.037, abs=0.002)
    assert law.standard_errors["D"] == pytest.approx(0.021, abs=0.001)


def test_step_law_in_other_units(steplaw):
    other = steplaw.assign(N=steplaw["N"] / 1e6, D=steplaw["D"] / 1e9, L=steplaw["L"] * 1.4427, B=steplaw["B"] / 2048)
    a, b = fit_batch_size(steplaw), fit_batch_size(other)
    assert b.parameters["D"] == pytest.approx(a.parameters["D"], rel=1e-9)
    assert b.intervals["D"] == pytest.approx(a.intervals["D"], rel=1e-9)
    assert fit_learning_rate(other).parameters["N"] == pytest.approx(fit_learning_rate(steplaw).parameters["N"], rel=1e-9)


def test_noisy_last_step_losses_give_no_confident_law():
    """The same runs by their raw last-step loss (1.4% noise): most valleys drown, and the law says so."""
    frame = load_csv(STEPLAW, {"loss": "loss"}).frame
    law = fit_batch_size(frame)
    assert law.status in ("not_identifiable", "at_bound", "too_few")
    assert "of 17 cells with an optimum inside the grid" in law.message


def params_of(depth: int, vocab: int = 32768) -> float:
    """Matrices + lm_head of nanochat's dial: 12·C²·L + V·C, C = 64·L."""
    return 12 * (64 * depth) ** 2 * depth + vocab * 64 * depth


def nanochat_decay() -> pd.DataFrame:
    """Optima of January 2026 (nanochat dev log): d8 0.40, d12 0.22, d16 0.10, d20 0.08; tokens at a fixed ratio."""
    depths = np.array([8, 12, 16, 20])
    sizes = np.array([params_of(d) for d in depths])
    return pd.DataFrame({"width": 64.0 * depths, "N": sizes, "D": 10.5 * sizes, "weight_decay": [0.40, 0.22, 0.10, 0.08]})


def test_nanochat_weight_decay_table():
    """Width exponent −1.85 ± 0.20 (95% ± 0.85, n = 4), reported upstream as −1.97; d24: 0.054 by width, 0.051 by D."""
    law = weight_decay_from_optima(nanochat_decay(), level=0.95)
    by_name = {c.name: c for c in law.candidates}
    width = by_name["width"]
    assert width.parameters["width"] == pytest.approx(-1.85, abs=0.005)
    assert width.standard_errors["width"] == pytest.approx(0.20, abs=0.005)
    low, high = width.intervals["width"]
    assert (high - low) / 2 == pytest.approx(0.85, abs=0.01)
    d24 = {"width": 1536.0, "N": params_of(24), "D": 10.5 * params_of(24)}
    assert width.predict(**d24).value == pytest.approx(0.054, abs=0.0005)
    assert by_name["D"].predict(**d24).value == pytest.approx(0.051, abs=0.0005)


def test_nanochat_weight_decay_is_not_identifiable():
    """Width and D have a correlation of 0.9994 there: nothing tells them apart, and the runs that would are named."""
    law = weight_decay_from_optima(nanochat_decay(), level=0.95)
    assert law.correlations["width,D"] == pytest.approx(0.9994, abs=0.0001)
    assert law.status == "not_identifiable" and law.selected is None
    d24 = {"width": 1536.0, "N": params_of(24), "D": 10.5 * params_of(24)}
    average = law.predict(**d24)
    assert average.value == pytest.approx(np.sqrt(0.05424 * 0.05108), rel=1e-3)
    assert average.low < 0.051 and average.high > 0.054
    (run,) = law.separating_runs
    assert run["what"] == "vary tokens per parameter at a fixed width"
    told = run["predictions"]
    assert told["width"][0] == told["width"][1] and told["D"][0] > 2 * told["D"][1]
    again = WeightDecayLaw.from_dict(json.loads(json.dumps(law.as_dict(), allow_nan=False)))
    assert again.as_dict() == law.as_dict()


def test_runs_off_the_ladder_separate_the_candidates():
    """The same truth (λ ~ D^−0.7) with tokens varied at a fixed width as well: D is selected."""
    rng = np.random.default_rng(0)
    rows = [
        {"width": 64.0 * d, "N": params_of(d), "D": ratio * params_of(d)} for d in (8, 12, 16, 20) for ratio in (3.0, 10.0, 30.0)
    ]
    frame = pd.DataFrame(rows)
    frame["weight_decay"] = 3e5 * frame["D"] ** -0.7 * np.exp(0.03 * rng.standard_normal(len(frame)))
    law = weight_decay_from_optima(frame)
    assert (law.selected, law.status) == ("D", "converged")
    assert law.average.exponents["D"] == pytest.approx(-0.7, abs=0.05)
    assert law.separating_runs == ()
    assert law.leave_one_scale_out["D"] < 0.3 * law.leave_one_scale_out["width"]


def test_timescale_law_recovers_its_exponent():
    """τ = B/(η·λ·D) = 0.4·(D/N)^−0.527 (the exponent of arXiv 2505.13738), B and η varied beside."""
    rng = np.random.default_rng(1)
    rows = []
    for n in (1e7, 4e7, 1.6e8):
        for ratio in (5.0, 20.0, 80.0):
            b, lr = 2.0 ** rng.integers(15, 20), 10 ** rng.uniform(-3, -2)
            tau = 0.4 * ratio**-0.527
            rows.append({"width": 64 * round((n / 1e6) ** 0.4), "N": n, "D": ratio * n, "B": b, "lr": lr,
                         "weight_decay": b / (lr * ratio * n * tau) * np.exp(0.02 * rng.standard_normal())})  # fmt: skip
    law = weight_decay_from_optima(pd.DataFrame(rows))
    assert law.selected == "timescale"
    (timescale,) = [c for c in law.candidates if c.name == "timescale"]
    assert timescale.parameters["rho"] == pytest.approx(-0.527, abs=0.03)
    low, high = timescale.intervals["rho"]
    assert low < -0.527 < high
    row = rows[4]
    told = timescale.predict(**{k: row[k] for k in ("N", "D", "B", "lr")})
    assert told.low < row["weight_decay"] < told.high
    assert told.value == pytest.approx(row["weight_decay"], rel=0.1)


def test_known_ladder_of_records_gives_its_batch_and_rate(real):
    """Truth: B* = 60·D^0.40, lr* = 2.1·N^−0.25·√(B/B*)."""
    purposes = assign_purposes(real)
    noise = estimate_noise(real)
    frame = select(real, purposes, "batch_size")
    law = fit_batch_size(frame, noise=noise)
    assert law.n == 4 and all(c["how"] == "quadratic in log lr and log B" for c in law.cells)
    assert law.intervals["D"][0] < 0.40 < law.intervals["D"][1]
    for cell in law.cells:
        assert cell["low"] * 0.9 < 60 * cell["D"] ** 0.40 < cell["high"] * 1.1
    rate = fit_learning_rate(frame, noise=noise)
    assert rate.n == 4 and rate.status == "not_identifiable"  # N and D move together on this ladder
    for cell in rate.cells:
        assert cell["value"] == pytest.approx(2.1 * cell["N"] ** -0.25, rel=0.15)


def test_known_ladder_of_records_gives_its_weight_decay(real):
    law = fit_weight_decay(select(real, assign_purposes(real), "weight_decay"), noise=estimate_noise(real))
    (width,) = [c for c in law.candidates if c.name == "width"]
    assert width.intervals["width"][0] < -1.85 < width.intervals["width"][1]
    assert law.n == 4 and len(law.cells) == 4


def test_edge_cell_is_marked_and_kept_as_a_bound(tmp_path):
    write_ladder(tmp_path, replace(DEMO, edge=True, batch_cells=4, noise=0.001))
    frame = load_records(tmp_path).frame
    law = fit_batch_size(select(frame, assign_purposes(frame), "batch_size"), noise=estimate_noise(frame))
    edges = [c["edge"] for c in law.cells]
    assert edges.count("low") == 1 and law.n == 3
    (edge,) = [c for c in law.cells if c["edge"] == "low"]
    assert edge["value"] is None and edge["bounds"][0] is None and edge["bounds"][1] > 0
    assert "without_edge_cells" in law.tests


@pytest.mark.parametrize("num_cells", [1, 2])
def test_demo_sized_sweeps_are_honest(tmp_path, num_cells):
    """One or two horizons: published exponent with a fitted constant, no exponent's interval."""
    write_ladder(tmp_path, replace(DEMO, batch_cells=num_cells, weight_decay_cells=num_cells))
    frame = load_records(tmp_path).frame
    purposes, noise = assign_purposes(frame), estimate_noise(frame)
    law = fit_batch_size(select(frame, purposes, "batch_size"), noise=noise)
    assert law.status == "too_few" and law.exponents == {"D": 0.383} and law.intervals["D"] is None
    truth = 1.6 * law.references["D"] ** 0.46
    assert law.predict(D=law.references["D"]).value == pytest.approx(truth, rel=0.2)
    decay = fit_weight_decay(select(frame, purposes, "weight_decay"), noise=noise)
    assert decay.status == "too_few" and decay.average is not None


def test_one_dimensional_sweeps():
    """Only B varies, the rate following it by a rule; only the rate varies."""
    rows = []
    for d in (1e9, 3e9, 1e10, 3e10):
        for factor in (0.25, 0.5, 1, 2, 4):
            best = 50 * d**0.45
            rows.append(
                {"N": d / 10, "D": d, "B": best * factor, "lr": 0.01 * np.sqrt(factor), "L": 2 * np.exp(0.01 * np.log(factor) ** 2)}
            )
    frame = standard(pd.DataFrame(rows))
    law = fit_batch_size(frame)
    assert law.parameters["D"] == pytest.approx(0.45, abs=1e-6)
    assert law.cells[0]["how"] == "quadratic in log B, lr tied to it"
    assert fit_learning_rate(frame).cells == ()  # a rate that follows the batch tells nothing
    only_rate = frame.assign(lr=0.004 * frame["N"] ** -0.1 * frame["lr"], B=1e5)
    rate = fit_learning_rate(only_rate)
    assert rate.n == 4 and rate.cells[0]["how"] == "quadratic in log lr"
    assert fit_batch_size(only_rate).cells == ()


def standard(frame: pd.DataFrame) -> pd.DataFrame:
    text = dict.fromkeys(("run_id", "sweep", "purpose"), "")
    numbers = {c: np.nan for c in ("B", "lr", "weight_decay", "width") if c not in frame}
    return frame.assign(**text, **numbers)


def test_horizons_that_differ_by_rounding_are_one_cell():
    frame = standard(pd.DataFrame({"N": [1e8] * 4 + [2e8], "D": [1e9, 1.01e9, 0.99e9, 2e9, 1e9], "L": 3.0}))
    numbers = cell_numbers(frame)
    assert numbers[0] == numbers[1] == numbers[2]
    assert len(set(numbers)) == 3


def test_purposes_are_inferred_from_what_varies(steplaw, real):
    assert set(assign_purposes(steplaw)) == {"allocation,batch_size,learning_rate"}
    blank = real.assign(purpose="")
    inferred = assign_purposes(blank)
    by_sweep = {s: set(inferred[blank["sweep"] == s]) for s in blank["sweep"].unique()}
    assert by_sweep["isoflop"] == {"allocation"}
    assert by_sweep["weight_decay"] == {"weight_decay"}
    assert by_sweep["batch_lr"] == {"batch_size,learning_rate"}
    several = real.assign(purpose="allocation,batch_size")
    assert len(select(several, assign_purposes(several), "batch_size")) == len(real)
    promoted = real.assign(purpose="promotion")
    assert select(promoted, assign_purposes(promoted), "allocation", "batch_size").empty


def test_allocation_takes_each_cell_at_its_best_knobs(steplaw):
    kept, set_aside = tuned_envelope(steplaw)
    assert (len(kept), set_aside) == (17, 1894)
    best = steplaw.groupby(["N", "D"])["L"].min()
    assert sorted(kept["L"]) == sorted(best)
    plain = standard(pd.DataFrame({"N": [1e8, 1e8, 2e8], "D": [1e9, 1e9, 1e9], "L": [3.0, 3.1, 2.9]}))
    assert tuned_envelope(plain)[1] == 0  # replicates are not a sweep


def test_weight_decay_of_zero_has_no_place_on_a_logarithmic_grid():
    rows = [{"N": 1e8, "D": 1e9, "B": 1e5, "lr": 0.01, "weight_decay": w, "L": 2 + 0.02 * np.log(max(w, 1e-3) / 0.1) ** 2}
            for w in (0.0, 0.025, 0.05, 0.1, 0.2, 0.4)]  # fmt: skip
    (cell,) = find_optima(standard(pd.DataFrame(rows)), "weight_decay", hold=("B", "lr"))
    assert cell.optimum.num_points == 5
    assert np.exp(cell.optimum.log_value) == pytest.approx(0.1, rel=0.02)
