"""Tables of runs: what is read, and that nothing unusable disappears without a reason."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from synthetic_ladder import DEMO, write_ladder

from analysis.budgets import assign_budgets
from analysis.errors import DataError
from analysis.purposes import assign_purposes
from analysis.table import load_csv, load_nanochat_results, load_records, table_from_frame

GOOD = pd.DataFrame({"N": [1e8, 2e8, 4e8, 8e8], "D": [8e9, 4e9, 2e9, 1e9], "L": [3.0, 2.9, 2.95, 3.1], "budget": [1e18] * 4})


def write_csv(tmp_path: Path, frame: pd.DataFrame) -> Path:
    path = tmp_path / "runs.csv"
    frame.to_csv(path, index=False)
    return path


def reasons(table) -> dict[str, str]:
    return {x.row: x.reason for x in table.left_out}


@pytest.mark.parametrize(
    ("column", "value", "words"),
    [
        ("L", np.nan, "L is missing"),
        ("L", np.inf, "L is not finite"),
        ("L", -1.0, "L is not positive: -1"),
        ("L", 300.0, "L is absurd"),
        ("N", 3.0, "N is absurd"),
        ("D", 0.0, "D is not positive"),
        ("N", "big", "N is not a number: big"),
        ("budget", -1e18, "budget is not positive"),
    ],
)
def test_bad_value_is_left_out_with_its_reason(tmp_path, column, value, words):
    bad = GOOD.astype(object)
    bad.loc[4] = {**GOOD.loc[0].to_dict(), column: value}
    table = load_csv(write_csv(tmp_path, bad))
    assert len(table) == 4
    assert list(reasons(table)) == ["row 6"]  # the line of the file
    assert words in reasons(table)["row 6"]


def test_failed_and_duplicate_rows_are_listed(tmp_path):
    frame = pd.concat([GOOD, GOOD.iloc[[1]]], ignore_index=True).assign(status="complete", seed=0)
    frame.loc[2, "status"] = "failed"
    table = load_csv(write_csv(tmp_path, frame))
    assert reasons(table) == {"row 4": "status failed", "row 6": "duplicate of row 3"}
    replicate = frame.assign(seed=range(5))  # the same settings with another seed are no duplicates
    assert len(load_csv(write_csv(tmp_path, replicate))) == 4


def test_same_run_id_twice_is_told_apart_by_its_loss():
    frame = GOOD.assign(run_id=["a", "b", "b", "a"], L=[3.0, 2.9, 2.9, 3.1])
    table = table_from_frame(frame, source="t")
    assert reasons(table) == {"row 3": "duplicate of row 2", "row 4": "same run_id with another loss as row 1"}


def test_units_do_not_matter(tmp_path):
    frame = GOOD.copy()
    frame.loc[4] = [1e8, 9e9, 400.0, 1e18]
    before = load_csv(write_csv(tmp_path, frame))
    after = load_csv(write_csv(tmp_path, frame * [1e-6, 1e-9, 0.7, 1e-18]))
    assert [x.row for x in before.left_out] == [x.row for x in after.left_out] == ["row 6"]
    np.testing.assert_allclose(after.frame["N"] * 1e6, before.frame["N"])


def test_mapping_names_columns_and_refuses_unknown_ones(tmp_path):
    frame = GOOD.rename(columns={"N": "size", "D": "seen", "L": "final"})
    path = write_csv(tmp_path, frame)
    with pytest.raises(DataError, match=r"no column for the parameters.*size, seen, final"):
        load_csv(path)
    table = load_csv(path, {"params": "size", "tokens": "seen", "loss": "final"})
    assert table.frame["budget"].unique().tolist() == [1e18]
    with pytest.raises(DataError, match="no column 'nope'"):
        load_csv(path, {"params": "nope"})
    with pytest.raises(DataError, match="'parms', which is unknown"):
        load_csv(path, {"parms": "size"})


def test_several_counts_of_parameters(tmp_path):
    frame = GOOD.rename(columns={"N": "body"}).assign(everything=lambda f: f["body"] * 2)
    table = load_csv(write_csv(tmp_path, frame), {"params_matrices": "body", "params_all": "everything"})
    assert table.conventions == ("all", "matrices")
    assert table.convention == "all" and table.frame["N"].tolist() == [2e8, 4e8, 8e8, 1.6e9]
    with pytest.raises(DataError, match="no count of parameters named 'matrices_lm_head'"):
        table.with_convention("matrices_lm_head")


def test_words_of_other_tables(tmp_path):
    """Their status may be called otherwise, and a column called purpose may mean something else."""
    table = load_csv(write_csv(tmp_path, GOOD.assign(status=["Finished", "ok", "crashed", "complete"], purpose="thesis")))
    assert reasons(table) == {"row 4": "status crashed"}
    assert set(assign_purposes(table.frame)) == {"allocation"}


def test_files_that_are_no_tables(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        load_csv(tmp_path / "absent.csv")
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(DataError, match="the file is empty"):
        load_csv(tmp_path / "empty.csv")
    (tmp_path / "head.csv").write_text("N,D,L\n")
    with pytest.raises(DataError, match="no rows"):
        load_csv(tmp_path / "head.csv")
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 torn")
    with pytest.raises(DataError, match="cannot be read as a table"):
        load_csv(tmp_path / "torn.parquet")
    only_bad = GOOD.assign(L=np.nan)
    with pytest.raises(DataError, match=r"no usable run among 4 .*row 2: L is missing"):
        load_csv(write_csv(tmp_path, only_bad))


def test_parquet_and_csv_give_the_same_table(tmp_path):
    GOOD.to_parquet(tmp_path / "runs.parquet")
    a, b = load_csv(tmp_path / "runs.parquet"), load_csv(write_csv(tmp_path, GOOD))
    pd.testing.assert_frame_equal(a.frame, b.frame)
    assert a.hash == b.hash


def test_hash_follows_the_numbers_not_their_order():
    a, b = (table_from_frame(f, source="t").hash for f in (GOOD, GOOD.iloc[::-1]))
    assert a == b
    assert table_from_frame(GOOD.assign(L=GOOD["L"] + 1e-9), source="t").hash != a


def test_outliers_are_kept_unless_dropped_by_name(tmp_path):
    path = write_csv(tmp_path, GOOD.assign(outlier=[False, True, False, False]))
    kept = load_csv(path)
    assert kept.frame["outlier"].tolist() == [False, True, False, False]
    dropped = load_csv(path, drop_outliers="outlier")
    assert reasons(dropped) == {"row 3": "flagged in column outlier"}
    with pytest.raises(DataError, match="no column 'odd'"):
        load_csv(path, drop_outliers="odd")


def test_nanochat_results(tmp_path):
    """Columns of nanochat's scaling-law script; a core_score of 0.0 there is a score that was never written."""
    frame = pd.DataFrame(
        {
            "flops_budget": [1e18, 1e18, 2.15e18], "depth": [8, 10, 12], "model_dim": [512, 640, 768], "params_wte": 1e7,
            "params_value_embeds": 4e7, "params_lm_head": 1e7, "params_transformer": [2.5e7, 4.9e7, 8.5e7], "params_scalars": 50,
            "params_total": [8.5e7, 1.09e8, 1.45e8], "num_iterations": 900, "tokens_trained": [3e9, 2e9, 2.5e9],
            "val_bpb": [0.91, 0.90, 0.0], "core_score": [0.12, 0.0, 0.0], "train_time_sec": 600,
        }
    )  # fmt: skip
    path = write_csv(tmp_path, frame)
    table = load_csv(path)
    assert table.convention == "matrices_lm_head"
    assert table.conventions == ("matrices_lm_head", "all", "matrices")
    assert table.frame["N"].tolist() == [3.5e7, 5.9e7]
    assert table.with_convention("all").frame["N"].tolist() == [8.5e7, 1.09e8]
    assert reasons(table) == {"row 4": "L is not positive: 0"}
    assert table.frame["core"].tolist()[0] == 0.12 and np.isnan(table.frame["core"][1])
    assert load_nanochat_results(path, convention="matrices").frame["N"].tolist() == [2.5e7, 4.9e7]
    with pytest.raises(DataError, match=r"not nanochat's results.csv"):
        load_nanochat_results(write_csv(tmp_path, GOOD))


def test_records_are_read_and_broken_ones_listed(tmp_path):
    records = write_ladder(tmp_path, DEMO)
    paths = sorted(tmp_path.rglob("record.json"))
    complete = [p for p in paths if json.loads(p.read_text())["status"] == "complete"]
    torn, old, odd = complete[:3]
    torn.write_text(torn.read_text()[:-300])
    old.write_text(old.read_text().replace('"schema_version": 1', '"schema_version": 7'))
    odd.write_text('{"schema_version": 1, "run_id": "x"}')
    table = load_records(tmp_path)
    assert len(table) == len(records) - 4
    why = reasons(table)
    assert "cut short" in why[str(torn)]
    assert why[str(old)] == "record schema 7, this version reads 1"
    assert "not a run record" in why[str(odd)]
    assert any(w == "status failed: loss is nan at step 12" for w in why.values())


def test_record_columns_agree_with_the_record(tmp_path):
    by_id = {r.run_id: r for r in write_ladder(tmp_path, DEMO)}
    table = load_records(tmp_path)
    for _, row in table.frame.iterrows():
        record = by_id[row["run_id"]]
        assert row["N"] == record.params["transformer_matrices"] + record.params["lm_head"] == record.params["scaling"]
        assert (row["D"], row["C"], row["L"]) == (record.num_tokens, record.train_flops, record.val_bpb)
        assert row["comparable_hash"] == record.comparable_hash
        assert (row["B"], row["lr"]) == (record.config.batch_tokens, record.config.optimizer.matrix_lr)
        curve = table.curves[row["run_id"]]
        assert curve.shape == (len(record.curve), 5) and curve[-1, 4] == record.curve[-1].val_bpb
    replicates = table.frame[table.frame["sweep"] == "seeds"]
    assert replicates["cell"].nunique() == 1 and replicates["run_id"].nunique() == 3
    assert table.frame["variant"].nunique() == 1  # one recipe: size, horizon, batch, rate and decay are no other recipe


def test_runs_that_are_not_comparable_are_refused(tmp_path):
    write_ladder(tmp_path, DEMO)
    table = load_records(tmp_path)
    (other,) = table.frame["comparable_hash"].unique()
    mixed = table.frame.assign(comparable_hash=[other] * 40 + ["feed"] * (len(table) - 40))
    mixed_table = table_from_frame(mixed, source="t")
    with pytest.raises(DataError, match=rf"2 kinds that are not comparable.*'{other}' \(40 runs\)"):
        mixed_table.only_comparable()
    only = mixed_table.only_comparable(["feed"])
    assert len(only) == len(table) - 40 and len(only.left_out) == 40
    assert len(mixed_table.only_comparable([other, "feed"])) == len(table)
    with pytest.raises(DataError, match="no runs with comparable_hash 'beef'"):
        mixed_table.only_comparable(["beef"])


def test_no_records_at_all(tmp_path):
    with pytest.raises(DataError, match=r"no run records in"):
        load_records(tmp_path)
    with pytest.raises(DataError, match="no such file or folder"):
        load_records(tmp_path / "absent")


def test_budgets_are_grouped_by_gaps_in_log_compute():
    rng = np.random.default_rng(0)
    true = np.repeat([1e18, 2.15e18, 4.64e18, 1e19], 6)
    compute = true * np.exp(rng.uniform(-0.06, 0.06, len(true)))
    found, _ = assign_budgets(compute)
    assert len(np.unique(found)) == 4
    np.testing.assert_allclose(found, true, rtol=0.06)
    scaled, _ = assign_budgets(compute * 1e-7)
    np.testing.assert_allclose(scaled * 1e7, found)


def test_budgets_hidden_in_a_continuum():
    """Dense lines in runs that else spread over compute (as in the points read off Hoffmann et al.'s figure) are found."""
    rng = np.random.default_rng(1)
    lines = np.concatenate([c * np.exp(rng.uniform(-0.04, 0.04, 20)) for c in (1e19, 3e19, 1e20, 3e20)])
    between = np.exp(rng.uniform(np.log(9e18), np.log(4e20), 50))
    budgets, text = assign_budgets(np.concatenate([lines, between]))
    found = np.unique(budgets[np.isfinite(budgets)])
    np.testing.assert_allclose(found, [1e19, 3e19, 1e20, 3e20], rtol=0.05)
    assert "4 density peaks" in text
    assert not np.isfinite(assign_budgets(np.geomspace(1e18, 1e21, 200))[0]).any()  # evenly spread: no budgets at all
    small = np.full(7, 1e15)
    np.testing.assert_allclose(assign_budgets(np.concatenate([small, lines, between]))[0], [*small, *budgets])


def test_large_table_is_read_whole(tmp_path):
    rng = np.random.default_rng(0)
    n = 100_000
    frame = pd.DataFrame({"N": np.exp(rng.uniform(16, 22, n)), "D": np.exp(rng.uniform(20, 25, n)), "L": rng.uniform(2, 4, n)})
    frame.loc[::1000, "L"] = np.nan
    table = table_from_frame(frame, source="t")
    assert (len(table), len(table.left_out)) == (99_900, 100)
