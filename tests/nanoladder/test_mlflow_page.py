"""A report's runs link to the page that `mlflow ui` will show for the storage root."""

from __future__ import annotations

import sqlite3

from analysis.report.write import run_url
from nanoladder.mlflow_page import local_page
from nanoladder.workspace import Workspace


def test_the_page_is_that_of_our_experiment(tmp_path):
    tmp_path /= "50% of a #root?"
    tmp_path.mkdir()
    root = Workspace(tmp_path)
    assert local_page(root) == {}
    with sqlite3.connect(tmp_path / "mlflow.db") as db:
        assert local_page(root) == {}
        db.execute("create table experiments (experiment_id integer, name text)")
        assert local_page(root) == {}
        db.executemany("insert into experiments values (?, ?)", [(0, "Default"), (7, "nanoladder")])
        db.commit()
    page = local_page(root)
    assert page["mlflow_store"] == f"sqlite:///{tmp_path / 'mlflow.db'}"
    assert "/experiments/7/runs?" in (run_url(page["mlflow_uri"]) or "")
