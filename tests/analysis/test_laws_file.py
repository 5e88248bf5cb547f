"""laws.json: what is written can be read, and nothing else is."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis.batch import fit_batch_size
from analysis.errors import DataError
from analysis.laws_file import Laws
from analysis.table import load_csv
from analysis.weight_decay import weight_decay_from_optima

STEPLAW = Path(__file__).parents[1] / "data" / "steplaw_dense.csv"
SURFACE = {"E": 1.7, "A": 400.0, "B": 410.0, "alpha": 0.34, "beta": 0.28, "objective_log": 1e-3, "n": 40, "status": "converged"}


@pytest.fixture(scope="module")
def laws() -> Laws:
    table = load_csv(STEPLAW)
    optima = pd.DataFrame(
        {"width": [512.0, 768, 1024, 1280], "D": [4.4e8, 1.2e9, 2.5e9, 4.6e9], "weight_decay": [0.4, 0.22, 0.1, 0.08]}
    )
    return Laws(
        source_hash=table.hash,
        source="steplaw",
        n_runs=len(table),
        convention="as given",
        allocation={
            "convention": "as given",
            "parametric": {**SURFACE, "intervals": {"alpha": [0.3, np.nan]}},
            "isoflop": {},
            "frontier": {},
            "conventions": {},
            "warnings": [],
        },
        batch_size=fit_batch_size(table.frame, source_hash=table.hash),
        weight_decay=weight_decay_from_optima(optima),
        warnings=("one",),
        left_out=({"row": "row 3", "reason": "L is missing"},),
    )


def test_saved_laws_are_read_back_whole(laws, tmp_path):
    path = laws.save(tmp_path / "laws.json")
    again = Laws.load(path)
    assert again.as_dict() == laws.as_dict()
    a, b = (x.batch_size.predict(D=3e11) for x in (laws, again))
    assert (a.value, a.low, a.high) == (b.value, b.low, b.high)
    assert json.loads(path.read_text())["allocation"]["parametric"]["intervals"] == {"alpha": [0.3, None]}  # JSON knows no NaN
    assert oct(path.stat().st_mode & 0o777) == "0o644"
    assert [p.name for p in tmp_path.iterdir()] == ["laws.json"]  # no temporary file stays


def test_a_failed_write_keeps_the_old_file(laws, tmp_path, monkeypatch):
    path = laws.save(tmp_path / "laws.json")
    before = path.read_text()

    def broken(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(DataError, match="disk full"):
        laws.save(path)
    assert path.read_text() == before and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d.update(schema_version=2), "laws schema 2, this version reads 1"),
        (lambda d: d.pop("schema_version"), "laws schema None"),
        (lambda d: d["batch_size"].update(status="fine"), "batch_size/status|batch_size"),
        (lambda d: d["batch_size"].update(coefficient=-1.0), "batch_size"),
        (lambda d: d["batch_size"].pop("intervals"), "'intervals' is a required property|batch_size"),
        (lambda d: d["allocation"]["parametric"].update(alpha="steep"), "allocation"),
        (lambda d: d.update(extra=1), "'extra' was unexpected"),
        (lambda d: d.pop("weight_decay"), "'weight_decay' is a required property"),
    ],
)
def test_other_schemas_and_broken_fields_are_refused(laws, tmp_path, change, words):
    data = laws.as_dict()
    change(data)
    path = tmp_path / "laws.json"
    path.write_text(json.dumps(data))
    with pytest.raises(DataError, match=words) as error:
        Laws.load(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_torn_and_missing_files(laws, tmp_path):
    path = laws.save(tmp_path / "laws.json")
    path.write_text(path.read_text()[:-40])
    with pytest.raises(DataError, match=r"not valid JSON at character .*cut short"):
        Laws.load(path)
    with pytest.raises(DataError, match="no laws at"):
        Laws.load(tmp_path / "absent.json")
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="cannot be read"):
        Laws.load(path)
    path.write_text("[1, 2]")
    with pytest.raises(DataError, match="laws schema 'list'"):
        Laws.load(path)
