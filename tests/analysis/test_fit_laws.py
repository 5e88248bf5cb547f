"""Everything at once: a table in, laws.json out, with warnings in plain words."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from synthetic_ladder import DEMO, REAL, write_ladder

import analysis
from analysis.errors import DataError
from analysis.laws import Laws, fit_laws
from analysis.table import RunTable, load_csv, load_records, table_from_frame

STEPLAW = Path(__file__).parents[1] / "data" / "steplaw_dense.csv"
QUICK = 200  # bootstrap resamples: enough for an interval that has the right order


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> RunTable:
    folder = tmp_path_factory.mktemp("real")
    write_ladder(folder, replace(REAL, batch_cells=4, weight_decay_cells=4))
    return load_records(folder)


@pytest.fixture(scope="module")
def laws(real) -> Laws:
    return fit_laws(real, target_flops=2e20, n_boot=QUICK)


def test_a_ladder_of_records_gives_every_law(laws, real):
    assert laws.source_hash == real.hash and laws.n_runs == len(real)
    surface = laws.allocation["parametric"]
    assert {"E", "A", "B", "alpha", "beta", "objective_log", "n", "status", "intervals"} <= set(surface)
    assert surface["alpha"] == pytest.approx(0.37, abs=0.12) and surface["beta"] == pytest.approx(0.37, abs=0.12)
    assert {"isoflop", "frontier", "conventions"} <= set(laws.allocation)
    assert laws.batch_size.n == 4 and laws.learning_rate.n == 4 and laws.weight_decay.n == 4
    assert laws.noise["df"] >= 2
    used = laws.runs_used
    assert used["batch_size"] == 60 and used["weight_decay"] == 20
    assert used["allocation"] == (real.frame["purpose"] == "allocation").sum()  # no sweep's off-centre run among them


def test_laws_survive_the_file(laws, tmp_path):
    assert Laws.load(laws.save(tmp_path / "laws.json")).as_dict() == laws.as_dict()


def test_warnings_say_what_is_doubtful(laws, tmp_path):
    assert any("weight decay: not identifiable" in w for w in laws.warnings)
    assert any("left out, each with its reason" in w for w in laws.warnings)
    write_ladder(tmp_path, replace(DEMO, edge=True, seed_replicates=0))
    small = fit_laws(load_records(tmp_path), target_flops=4e15, n_boot=QUICK)
    text = " | ".join(small.warnings)
    assert "the noise is unknown; run 3 seeds" in text
    assert "batch size: 1 of 3 optima at the edge of the grid (low)" in text
    assert "beyond the largest compute fitted" in text
    assert small.batch_size.status == "too_few"


def test_a_sweep_alone_gives_its_own_law(real):
    """Only the weight-decay runs: their law, no allocation, and the reason for that."""
    decay_only = real.keep(real.frame["purpose"] == "weight_decay", "not asked for")
    laws = fit_laws(decay_only, n_boot=QUICK)
    assert laws.allocation is None and laws.batch_size is None and laws.weight_decay is not None
    assert any(w.startswith("no allocation:") for w in laws.warnings)


def test_too_small_a_table_is_refused():
    frame = pd.DataFrame({"N": [1e8, 2e8, 4e8], "D": [4e9, 2e9, 1e9], "L": [3.0, 2.9, 3.0]})
    with pytest.raises(DataError, match="3"):
        fit_laws(table_from_frame(frame, source="t"), n_boot=QUICK)
    with pytest.raises(DataError, match="target_flops -1"):
        fit_laws(table_from_frame(frame, source="t"), target_flops=-1)


def test_runs_that_are_not_comparable_are_refused_unless_forced(real):
    hashes = np.where(np.arange(len(real)) % 2, "feed", "beef")
    mixed = replace(real, frame=real.frame.assign(comparable_hash=hashes))
    with pytest.raises(DataError, match="not comparable"):
        fit_laws(mixed, n_boot=QUICK)
    decay_only = mixed.keep(mixed.frame["purpose"] == "weight_decay", "not asked for")
    forced = fit_laws(decay_only, n_boot=QUICK, force_comparable=("feed", "beef"))
    assert forced.n_runs == len(decay_only)
    single = fit_laws(decay_only, n_boot=QUICK, force_comparable=("feed",))
    assert single.n_runs < len(decay_only)
    assert any(x["reason"] == "another validation set, packing or sequence length" for x in single.left_out)


def test_production_runs_enter_no_law_and_fits_repeat(real, laws):
    """The same table with an absurdly good production run in it gives the same laws to the last digit."""
    extra = real.frame.iloc[[0]].assign(run_id="huge", purpose="production", L=0.5 * real.frame["L"].iloc[0])
    with_production = replace(real, frame=pd.concat([real.frame, extra], ignore_index=True))
    again = fit_laws(with_production, target_flops=2e20, n_boot=QUICK).as_dict()
    before = laws.as_dict()
    assert again["allocation"] == before["allocation"]
    for name in ("batch_size", "learning_rate"):
        assert {**again[name], "source_hash": ""} == {**before[name], "source_hash": ""}
    assert again["source_hash"] != before["source_hash"] and again["n_runs"] == before["n_runs"] + 1


def test_step_law_table_whole():
    laws = fit_laws(load_csv(STEPLAW), n_boot=QUICK)
    assert laws.batch_size.parameters["D"] == pytest.approx(0.569, abs=0.001)
    assert laws.learning_rate.parameters["N"] == pytest.approx(-0.695, abs=0.002)
    assert laws.weight_decay is None and laws.noise is None
    assert laws.runs_used["allocation"] == 17
    assert any("1,894 runs at worse settings than the best" in w for w in laws.warnings)
    assert any("an N term is significant" in w for w in laws.warnings)


def test_analysis_stands_alone():
    """In a fresh interpreter: names from `analysis` work, and neither torch nor Ray nor the model is imported."""
    code = (
        "import sys, json; from analysis import load_csv, fit_laws; "
        f"laws = fit_laws(load_csv({str(STEPLAW)!r}), n_boot=50); "
        "heavy = {'torch', 'ray', 'optuna', 'mlflow', 'nanochat_model', 'nanoladder'} & set(sys.modules); "
        "print(json.dumps([laws.batch_size.n, sorted(heavy)]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [17, []]


def test_every_name_that_analysis_offers_exists():
    for name in analysis.__all__:
        assert getattr(analysis, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'fit_everything'"):
        analysis.fit_everything  # noqa: B018
