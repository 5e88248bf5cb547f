"""Runs read back from MLflow are the runs that the records describe."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from synthetic_ladder import DEMO, write_ladder

from analysis.errors import DataError
from analysis.table import load_records
from nanoladder.cells import Trial
from nanoladder.mlflow_table import load_mlflow
from nanoladder.tracking import MlflowWriter, connect

COLUMNS = [
    "N",
    "N_all",
    "N_matrices",
    "D",
    "C",
    "L",
    "budget",
    "B",
    "lr",
    "weight_decay",
    "width",
    "depth",
    "seed",
    "embedding_share",
]


@pytest.fixture(scope="module")
def mirrored(tmp_path_factory):
    """A sqlite store with a small ladder in it, and the ladder's own table."""
    folder = tmp_path_factory.mktemp("mlflow")
    spec = replace(DEMO, budgets=DEMO.budgets[:1], sizes=4, weight_decay_cells=0, batch_cells=0, seed_replicates=2)
    records = write_ladder(folder, spec)
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    writer = MlflowWriter(uri, folder / "artifacts")
    for sweep in dict.fromkeys(r.sweep for r in records):
        writer.begin(sweep, {})
    for r in records:
        trial = Trial(sweep=r.sweep, cell="", candidate=0, seed=r.seed, config=r.config, run_id=r.run_id, tags=r.tags)
        writer.record(trial, r)
    client = connect(uri)
    other = client.create_experiment("other", artifact_location=(folder / "other").as_uri())
    for n, loss in ((1e6, 2.5), (2e6, 2.4), (4e6, 2.45), (8e6, None)):
        run = client.create_run(other)
        client.log_param(run.info.run_id, "n_params", n)
        client.log_param(run.info.run_id, "tokens", 4e13 / n)
        if loss is not None:
            client.log_metric(run.info.run_id, "loss", loss)
        client.set_terminated(run.info.run_id, "FINISHED")
    return uri, load_records(folder)


def test_our_runs_come_back_as_the_records_give_them(mirrored):
    uri, expected = mirrored
    table = load_mlflow(uri)
    assert set(table.frame["run_id"]) == set(expected.frame["run_id"])
    ours, theirs = (t.frame.set_index("run_id").sort_index() for t in (table, expected))
    for column in COLUMNS:
        np.testing.assert_allclose(ours[column], theirs[column], err_msg=column)
    for column in ("purpose", "sweep", "stage", "comparable_hash", "device"):
        assert (ours[column] == theirs[column]).all(), column
    for column in ("cell", "variant"):  # other hashes, the same groups
        pairs = set(zip(ours[column], theirs[column], strict=True))
        assert len(pairs) == ours[column].nunique() == theirs[column].nunique(), column
    (failed,) = table.left_out
    assert "status failed: loss is nan at step 12" in failed.reason


def test_other_experiments_by_a_mapping(mirrored, tmp_path):
    uri, _ = mirrored
    mapping = {"params": "params.n_params", "tokens": "params.tokens", "loss": "metrics.loss"}
    table = load_mlflow(uri, "other", mapping)
    assert sorted(table.frame["N"]) == [1e6, 2e6, 4e6]
    assert [x.reason for x in table.left_out] == ["L is missing"]
    with pytest.raises(DataError, match=r"no run has metrics.bpb"):
        load_mlflow(uri, "other", {**mapping, "loss": "metrics.bpb"})
    with pytest.raises(DataError, match="was logged by a sweep; give a column mapping"):
        load_mlflow(uri, "other")
    with pytest.raises(DataError, match="no MLflow database at"):
        load_mlflow(f"sqlite:///{tmp_path}/absent.db")
    assert not (tmp_path / "absent.db").exists()
    with pytest.raises(DataError, match="no experiment 'absent'"):
        load_mlflow(uri, "absent")
