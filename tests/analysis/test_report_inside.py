"""What a run measured inside becomes a section: lines by layer, the ratio's 10⁻³, and where steps' time went."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from report_inputs import fitted

from analysis.records import inside_of, read_record
from analysis.report import report_facts, to_markdown, write_report
from analysis.report.figures import build_figures
from analysis.report.write import drawn_runs
from analysis.table import RunTable, load_records

STEPS = [10, 20, 30]
COLUMNS: dict[str, list[Any]] = {
    "step": STEPS,
    "gradient_norm/h.0.attn.c_q": [3.0, 3.0, 0.3],
    "gradient_norm/h.0.mlp.c_fc": [4.0, 4.0, 0.4],
    "gradient_norm/h.1.attn.c_q": [1.0, None, 0.2],
    "gradient_norm/wte": [0.5, 0.5, 0.5],
    "gradient_norm/x0_lambdas": [9.0, 9.0, 9.0],
    "update_norm/h.0.attn.c_q": [0.1, 0.1, 0.1],
    "update_to_weight/h.0.attn.c_q": [None, 2e-3, 1e-3],
    "update_to_weight/h.1.attn.c_q": [None, 2e-3, 2e-2],
    "dead_units/0": [0.0, 0.1, 0.125],
    "dead_units/1": [0.0, 0.0, 0.0],
    "saturated_units/0": [0.0, 0.0, 0.0],
    "attention_logit_max/1": [1.0, 2.0, 4.5],
    "x0_lambda/1": [0.1, 0.1, 0.2],
    "resid_lambda/0": [1.0, 1.0, 1.1],
    "smear_lambda": [0.0, 0.0, 0.1],
}
MEASURED = {
    "diagnostics": COLUMNS,
    "step_seconds": {"data": 0.1, "compute": 0.6, "wait": 0.1, "communication": 0.1, "optimizer": 0.1},
    "rank_compute_seconds": [0.5, 0.7],
    "startup_seconds": {"process": 2.0, "build": 0.5, "first_step": 0.5},
}


@pytest.fixture(scope="module")
def measured() -> tuple[Any, RunTable, str]:
    """A ladder of which one run measured its inside."""
    laws, table = fitted()
    run = str(table.frame["run_id"].iloc[3])
    return laws, replace(table, inside={run: MEASURED}), run


def test_lines_are_by_layer(measured: tuple[Any, RunTable, str]) -> None:
    laws, table, run = measured
    block = report_facts(laws, table)["inside"]
    assert block["run_id"] == run and block["step"] == STEPS and block["others"] == 0
    assert block["gradient"] == {"layer 0": [5.0, 5.0, 0.5], "layer 1": [1.0, None, 0.2], "wte": [0.5, 0.5, 0.5]}
    assert block["ratio"]["layer 1"] == [None, 2e-3, 2e-2]
    assert "12% of relu² units never fired" in block["text"] and "(layer 0)" in block["text"] and "4.5" in block["text"]
    assert "layer 1 is far off" in block["text"], "20 times the healthy ratio is named"


def test_figures_draw_them_with_the_healthy_ratio(measured: tuple[Any, RunTable, str], tmp_path: Path) -> None:
    laws, table, _ = measured
    facts = report_facts(laws, table)
    figures = {k: v for k, v in build_figures(facts, drawn_runs(table)[0]).items() if k.startswith("inside_")}
    assert sorted(figures) == [f"inside_{k}" for k in ("gradient", "lambdas", "logits", "ratio", "units", "update")]
    mark = next(t for t in figures["inside_ratio"].data if t.name == "10⁻³")
    assert mark.y == (1e-3, 1e-3) and figures["inside_ratio"].layout.yaxis.type == "log"
    low, high = figures["inside_ratio"].layout.yaxis.range
    assert low < -3 < -1.7 < high
    by_name = {t.name: t for t in figures["inside_gradient"].data}
    assert list(by_name["layer 0"].y) == [5.0, 5.0, 0.5] and by_name["layer 0"].line.color != by_name["layer 1"].line.color
    assert {t.name for t in figures["inside_lambdas"].data} == {"x0 1", "resid 0", "smear"}
    html = write_report(laws, table, tmp_path / "r.html").read_text(encoding="utf8")
    assert all(f'data-figure="{name}"' in html for name in figures)
    assert "Where a step's time goes" in html.replace("&#x27;", "'") and "40%" in html, "the slowest rank is 0.7 / 0.5"
    assert "layer 1 is far off" in to_markdown(facts)


def test_production_is_shown_before_larger_runs_and_those_before_smaller(measured: tuple[Any, RunTable, str]) -> None:
    laws, table, _ = measured
    ordered = table.frame.sort_values("C")["run_id"]
    small, large = str(ordered.iloc[0]), str(ordered.iloc[-1])
    both = replace(table, inside={small: MEASURED, large: MEASURED})
    block = report_facts(laws, both)["inside"]
    assert block["run_id"] == large and block["others"] == 1 and "1 other run measured as well" in block["text"]
    frame = table.frame.assign(purpose=table.frame["purpose"].where(table.frame["run_id"] != small, "production"))
    assert report_facts(laws, replace(both, frame=frame))["inside"]["run_id"] == small


def test_a_deep_model_names_its_first_and_last_layer_only(measured: tuple[Any, RunTable, str]) -> None:
    laws, table, run = measured
    deep = {"step": STEPS, **{f"attention_logit_max/{i}": [1.0, 2.0, 3.0] for i in range(24)}}
    facts = report_facts(laws, replace(table, inside={run: {**MEASURED, "diagnostics": deep}}))
    figures = build_figures(facts, drawn_runs(table)[0])
    assert [t.name for t in figures["inside_logits"].data if t.showlegend] == ["layer 0", "layer 23"]
    assert "inside_units" not in figures, "nothing measured, no figure"


def test_without_measurements_it_says_how_to_make_them() -> None:
    laws, table = fitted()
    block = report_facts(laws, replace(table, inside={}))["inside"]
    assert "--diagnostics-every-steps" in block["missing"] and block["times"] == []


def test_records_bring_them(tmp_path: Path) -> None:
    from synthetic_ladder import LadderSpec, write_ladder

    write_ladder(tmp_path, LadderSpec(budgets=(4e11,), weight_decay_cells=0, batch_cells=0, failed=0))
    path = sorted(tmp_path.rglob("record.json"))[0]
    record = json.loads(path.read_text()) | MEASURED
    path.write_text(json.dumps(record))
    assert load_records(tmp_path).inside[record["run_id"]] == MEASURED
    old = {k: v for k, v in record.items() if k not in MEASURED}  # as an earlier version wrote them
    path.write_text(json.dumps(old))
    assert not any(inside_of(old).values()) and read_record(path)[0]["run_id"] == record["run_id"]
