"""The file: self-contained, atomic, safe with any name, links to MLflow, fast at 1,000 runs and possible at 100,000."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from report_inputs import fitted, fronts, production, promotions

from analysis.errors import DataError
from analysis.laws import Laws, fit_laws
from analysis.report import write_report
from analysis.report.write import MOST_DRAWN, drawn_runs, run_url
from analysis.table import RunTable, load_csv


@pytest.fixture(scope="module")
def table() -> RunTable:
    return fitted()[1]


@pytest.fixture(scope="module")
def laws() -> Laws:
    return fitted()[0]


def script(html: str, name: str):
    found = re.search(rf'<script type="application/json" id="{name}">(.*?)</script>', html, re.S)
    assert found, name
    return json.loads(found.group(1))


def many_runs(count: int, path: Path) -> RunTable:
    """A noisy table on a known surface: 8 budgets over 3 decades, `count` runs."""
    rng = np.random.default_rng(0)
    budget = np.geomspace(1e17, 1e20, 8)[np.arange(count) % 8]
    centre = np.sqrt(budget / 6 / 20)
    n = centre * 4.0 ** rng.uniform(-1, 1, count)
    d = budget / 6 / n
    loss = (1.69 + 406.4 / n**0.34 + 410.7 / d**0.28) * np.exp(0.003 * rng.standard_normal(count))
    ids = [f"{i:016x}" for i in range(count)]
    frame = pd.DataFrame({"run_id": ids, "N": n, "D": d, "loss": loss, "budget": budget, "flops": 6 * n * d, "sweep": "grid"})
    frame.to_csv(path, index=False)
    return load_csv(path)


def test_one_file_with_everything_in_it(table: RunTable, laws, tmp_path: Path):
    path = write_report(
        laws,
        table,
        tmp_path / "sub" / "report.html",
        production=production(measured=None),
        promotions=promotions(),
        fronts=fronts(),
    )
    html = path.read_text(encoding="utf8")
    assert html.count("* plotly.js v") == 1
    assert "predicted before the run, for its own N and D" in html, "why two predictions stand on the page"
    without_scripts = re.sub(r"<script\b.*?</script>", "", html, flags=re.S)
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//""", without_scripts)
    assert "@import" not in without_scripts and "url(" not in without_scripts
    assert "default-src 'none'" in html
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]
    assert len(html) < 6_500_000
    figures = script(html, "data-figures")
    assert {"isoflop", "surface", "frontier", "front_0"} <= set(figures)
    assert "Of 3 candidates, 2 are beaten by no other of their cell in all of val_bpb and train_seconds." in html
    line, points = figures["front_0"]["data"]
    assert (line["x"], line["y"], points["x"]) == ([5.0, 9.0], [1.65, 1.6], [5.0, 6.0, 9.0])
    assert script(html, "data-runs")["length"] == len(table)


def test_names_of_runs_cannot_become_markup(table: RunTable, laws, tmp_path: Path):
    nasty = "</script><img src=x onerror=alert(1)>&{run}"
    frame = table.frame.assign(name=nasty, sweep=nasty)
    made = {**production(measured=1.6), "name": nasty}
    bad = [{**promotions()[0], "change": nasty, "reason": nasty}]
    path = write_report(
        laws,
        RunTable(frame=frame, source=nasty),
        tmp_path / "r.html",
        production=made,
        promotions=bad,
        fronts=fronts(nasty),
        title=nasty,
    )
    html = path.read_text(encoding="utf8")
    assert "<img" not in re.sub(r"<script>\s*/\*\*\s*\* plotly.*?</script>", "", html, flags=re.S)
    assert nasty in script(html, "data-runs")["columns"][-2]["levels"] or nasty in json.dumps(script(html, "data-runs"))


def test_a_failed_write_leaves_the_old_report(table: RunTable, laws, tmp_path: Path):
    with pytest.raises(DataError, match=r"cannot be written"):
        (tmp_path / "file").write_text("x")
        write_report(laws, table, tmp_path / "file" / "report.html")


def test_addresses_of_mlflow():
    assert run_url(None) is None
    assert run_url("sqlite:////tmp/mlflow.db") is None
    assert run_url("https://ml.example/run/{run_id}") == "https://ml.example/run/{run_id}"
    link = run_url("http://127.0.0.1:5000/#/experiments/1")
    assert link == "http://127.0.0.1:5000/#/experiments/1/runs?searchFilter=tags.%60nanoladder.run_id%60%20%3D%20%27{run_id}%27"
    with pytest.raises(DataError, match="names no experiment"):
        run_url("http://127.0.0.1:5000")


def test_the_mlflow_address_reaches_the_page(table: RunTable, laws, tmp_path: Path):
    path = write_report(laws, table, tmp_path / "r.html", mlflow_uri="http://127.0.0.1:5000/#/experiments/7")
    assert "{run_id}" in script(path.read_text(encoding="utf8"), "data-settings")["run_url"]
    path = write_report(laws, table, tmp_path / "r.html", mlflow_uri="sqlite:////tmp/mlflow.db")
    html = path.read_text(encoding="utf8")
    assert script(html, "data-settings")["run_url"] is None
    assert "mlflow ui --backend-store-uri sqlite:////tmp/mlflow.db" in html


def test_a_thousand_runs_take_less_than_20_seconds_with_the_fit(tmp_path: Path):
    table = many_runs(1000, tmp_path / "runs.csv")
    start = time.process_time()  # of all threads: more than the wall clock's on an idle machine, and not moved by a busy one
    write_report(fit_laws(table, target_flops=4e20), table, tmp_path / "r.html")
    assert time.process_time() - start < 20


def test_a_hundred_thousand_runs_are_listed_and_sampled(laws, tmp_path: Path):
    table = many_runs(100_000, tmp_path / "runs.csv")
    drawn, of = drawn_runs(table)
    assert of == 100_000 and len(drawn) <= MOST_DRAWN + 8
    best = table.frame.loc[table.frame.groupby("budget")["L"].idxmin(), "run_id"]
    assert set(best) <= set(drawn["run_id"])
    path = write_report(laws, table, tmp_path / "r.html")  # laws of other runs: it says so, and draws these
    html = path.read_text(encoding="utf8")
    assert script(html, "data-runs")["length"] == 100_000
    assert "of 100,000 runs; every fit uses all of them" in html
    assert len(html) < 25_000_000
