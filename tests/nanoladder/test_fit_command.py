"""nanoladder fit on a table of records: the laws, the next runs, and runs that must not be mixed."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from synthetic_ladder import DEMO, write_ladder

from analysis.errors import DataError
from analysis.laws import Laws
from nanoladder.cli.common import print_table
from nanoladder.cli.laws import Fit, TableOptions


@pytest.fixture(scope="module")
def storage(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("storage")
    write_ladder(folder, DEMO)
    return folder


def test_fit_writes_laws_and_names_the_next_runs(storage, capsys):
    fit = Fit(data=TableOptions(storage=str(storage)), n_boot=100, target_flops=5e13, remaining_flops=2e13, json=True)
    fit.run()
    printed = json.loads(capsys.readouterr().out)
    runs = printed.pop("next_runs")["runs"]
    assert Laws.load(storage / "laws.json").as_dict() == printed
    assert printed["allocation"]["loss_name"] == "validation bpb"
    assert runs and sum(r["C"] for r in runs) <= 2e13 * 1.000001
    assert all(r["B"] > 0 and r["D"] > 0 for r in runs)
    assert [r["sd_after"] for r in runs] == sorted((r["sd_after"] for r in runs), reverse=True)


def test_a_folder_without_runs_is_refused_without_a_search_below_it(storage):
    (storage.parent / "deep" / "er").mkdir(parents=True)
    (storage.parent / "deep" / "er" / "est").symlink_to(storage)
    for folder in ("/", str(storage.parent / "deep")):
        with pytest.raises(DataError, match=rf"no run records in {folder}; give a folder that holds runs/\*/record.json"):
            TableOptions(table=folder).read()
    assert len(TableOptions(table=str(storage / "runs")).read()) == len(TableOptions(table=str(storage)).read()) > 9


def test_runs_that_are_not_comparable_need_a_name(storage, tmp_path, capsys):
    folder = tmp_path / "runs"
    for i, path in enumerate(sorted((storage / "runs").glob("*/record.json"))):
        record = json.loads(path.read_text())
        record["comparable_hash"] = "feed" if i % 2 else "beef"
        (folder / path.parent.name).mkdir(parents=True)
        (folder / path.parent.name / "record.json").write_text(json.dumps(record))
    with pytest.raises(DataError, match="2 kinds that are not comparable"):
        Fit(data=TableOptions(table=str(tmp_path)), n_boot=100).run()
    data = TableOptions(table=str(tmp_path), comparable=("beef",))
    Fit(data=data, n_boot=100, out=str(tmp_path / "laws.json")).run()
    assert Laws.load(tmp_path / "laws.json").source_hash == data.read().hash  # what a report checks
    text = capsys.readouterr().out
    assert "left out:" in text and "another validation set, packing or sequence length" in text


def test_a_narrow_terminal_loses_nothing_of_a_table(monkeypatch, capsys):
    def shown(*row: str) -> list[str]:
        print_table([f"column {i}" for i in range(len(row))], [row])
        return re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out).splitlines()

    words = ("best loss L*(C)", "0.360 + 29.72 · C^−0.108 and many words besides", "[0.345, 0.480]", "not_identifiable")
    monkeypatch.setenv("COLUMNS", "80")
    assert any(all(cell in line for cell in words) for line in shown(*words)), "in a pipe a row is one line"
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    wrapped = shown(*words)
    assert all(len(line) <= 80 for line in wrapped) and all(w in " ".join(wrapped) for w in " ".join(words).split())
    many = [f"{i:012}" for i in range(10)]
    assert any(all(cell in line for cell in many) for line in shown(*many)), "the terminal breaks what no wrapping makes fit"
