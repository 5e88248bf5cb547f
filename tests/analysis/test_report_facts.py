"""The facts behind a report: five sentences, a recommendation that the known surface confirms, missing pieces in one line."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from report_inputs import TARGET, fitted, fronts, production, promotions
from synthetic_ladder import DEMO

from analysis.laws import Laws, fit_laws
from analysis.report import report_facts, to_markdown
from analysis.report.figures import build_figures
from analysis.report.html import CONTENTS, render, shown_contents
from analysis.report.sections import production_table
from analysis.report.write import drawn_runs
from analysis.table import RunTable, load_csv

BOOT = 200


@pytest.fixture(scope="module")
def demo() -> tuple[Laws, RunTable]:
    return fitted()


@pytest.fixture(scope="module")
def facts(demo: tuple[Laws, RunTable]) -> dict[str, Any]:
    laws, table = demo
    return report_facts(laws, table, production(measured=1.63), promotions(), fronts=fronts(), title="A ladder")


def test_facts_are_json_and_the_same_from_the_file(demo: tuple[Laws, RunTable], tmp_path: Path):
    laws, table = demo
    laws.save(tmp_path / "laws.json")
    direct, loaded = report_facts(laws, table), report_facts(Laws.load(tmp_path / "laws.json"), table)
    for one in (direct, loaded):
        json.dumps(one, allow_nan=False)
        one["source"].pop("generated_at")
    assert direct == loaded


def test_the_verdict_has_five_sentences_and_a_configuration_near_the_truth(facts: dict[str, Any]):
    verdict, truth = facts["verdict"], DEMO.surface
    assert len(verdict["sentences"]) == 5
    assert all(s.endswith(".") and len(s) < 320 for s in verdict["sentences"])
    assert verdict["status"] in ("ok", "warn", "refuse")
    best = verdict["recommended"]
    assert best["C"] == TARGET
    assert best["N"] == pytest.approx(truth.optimal_params(TARGET, 6.6), rel=0.2)
    assert best["ratio"] == pytest.approx(best["D"] / best["N"], rel=1e-6)
    assert best["N_low"] < best["N"] < best["N_high"]
    assert best["loss"]["low"] < best["loss"]["value"] < best["loss"]["high"]
    assert best["loss"]["value"] == pytest.approx(truth.loss(best["N"], best["D"]), rel=0.02)
    assert best["batch_size"]["value"] == pytest.approx(truth.batch[0] * best["D"] ** truth.batch[1], rel=0.3)


def test_each_law_tells_its_cells_and_its_value_at_the_target(facts: dict[str, Any]):
    for name in ("batch_size", "learning_rate", "weight_decay"):
        block = facts[name]
        assert len(block["cells"]) == 3
        assert [c["D"] for c in block["cells"]] == sorted(c["D"] for c in block["cells"])
        assert block["laws"] and block["text"].endswith(".")
        line = block["laws"][0]["line"]
        assert len(line["x"]) == len(line["y"]) > 10 and all(v > 0 for v in line["y"])
    assert facts["weight_decay"]["candidates"]


def test_an_optimum_at_the_edge_is_marked_in_facts_and_words():
    laws, table = fitted(replace(DEMO, edge=True))
    facts = report_facts(laws, table)
    edges = [c["edge"] for c in facts["batch_size"]["cells"]]
    assert "low" in edges
    assert "edge" in json.dumps(facts["warnings"])
    figures = build_figures(facts, drawn_runs(table)[0])
    symbols = [str(t.marker.symbol) for t in figures["batch_size_cells"].data if t.marker and t.marker.symbol]
    assert any("triangle" in s for s in symbols)


def test_missing_pieces_are_one_line_and_no_figure():
    laws, table = fitted(replace(DEMO, weight_decay_cells=0, batch_cells=0, seed_replicates=0, failed=0))
    facts = report_facts(laws, table)
    for name in ("batch_size", "learning_rate", "weight_decay", "promotions", "production", "noise"):
        assert set(facts[name]) == {"missing"}, name
        assert "\n" not in facts[name]["missing"] and facts[name]["missing"].endswith(".")
    built = build_figures(facts, drawn_runs(table)[0])
    assert "isoflop" in built and not any(k.startswith(("batch_size", "learning_rate", "weight_decay", "noise")) for k in built)
    assert "no law for batch" in facts["verdict"]["sentences"][1]
    page = to_markdown(facts)
    assert "## Not in these runs" in page and "## Batch size" not in page
    assert all(facts[name]["missing"] in page for name in ("batch_size", "learning_rate", "weight_decay", "promotions", "noise"))
    steps = facts["next_steps"]
    assert any("Sweep the batch, learning rate and weight decay" in s for s in steps) and any("three seeds" in s for s in steps)
    assert steps[-1].startswith("Then plan the run: `nanoladder plan --laws laws.json --flops ") and steps[-1] in page


def test_the_next_steps_follow_from_what_is_unsettled(demo: tuple[Laws, RunTable]):
    laws, table = demo
    raw = laws.as_dict()
    budgets = [dict(b) for b in raw["allocation"]["isoflop"]["budgets"]]
    budgets[0] |= {"status": "edge", "edge": "low"}
    raw["allocation"] = raw["allocation"] | {"isoflop": raw["allocation"]["isoflop"] | {"budgets": budgets}}
    raw["weight_decay"] = raw["weight_decay"] | {"status": "too_few", "separating_runs": []}
    steps = report_facts(raw, table, production(measured=1.63))["next_steps"]
    assert steps[0].startswith("At ") and "add smaller sizes" in steps[0]
    assert any(s.startswith("Sweep the weight decay in more cells") and "3 cells carry no law" in s for s in steps)
    assert steps[-1].startswith("The production run kept the prediction")
    assert "left its interval" in report_facts(raw, table, production(measured=1.9))["next_steps"][-1]
    raw["allocation"]["prediction"] |= {"verdict": "refuse"}
    assert report_facts(raw, table)["next_steps"][-1].startswith("Do not start a large run")


def test_production_is_compared_with_what_was_promised(demo: tuple[Laws, RunTable]):
    laws, table = demo
    inside = report_facts(laws, table, production(measured=1.63))["production"]
    outside = report_facts(laws, table, production(measured=1.70))["production"]
    assert inside["inside"] is True and "inside the interval" in inside["text"]
    assert outside["inside"] is False and "outside the interval" in outside["text"]
    assert outside["error"] == pytest.approx(1.70 / 1.62 - 1)
    unknown = report_facts(laws, table, production(measured=1.63) | {"low": None, "high": None})["production"]
    assert unknown["inside"] is None and "%, no interval could be given" in str(production_table(unknown, "loss"))
    waiting = report_facts(laws, table, production(measured=None))["production"]
    assert "error" not in waiting and "not ended" in waiting["text"]


def test_a_table_without_compute_budgets_or_knobs_still_makes_a_report(tmp_path: Path):
    rows = []
    for i in range(1, 9):
        for j in range(1, 9):
            n, d = 1e6 * 2.0**i, 2e7 * 2.0**j
            rows.append({"N": n, "D": d, "loss": 1.7 + 400 / n**0.34 + 410 / d**0.28 * math.exp(1e-3 * ((i * 7 + j * 3) % 5 - 2))})
    pd.DataFrame(rows).to_csv(tmp_path / "runs.csv", index=False)
    table = load_csv(tmp_path / "runs.csv")
    facts = report_facts(fit_laws(table, target_flops=1e20, n_boot=BOOT), table)
    assert facts["loss_name"] == "loss"
    counted = load_csv(tmp_path / "runs.csv", {"params_all": "N"})
    assert (counted.convention, counted.loss_name) == ("all", "loss")
    assert facts["next_steps"][-1].startswith("To plan a run by these laws, fit again and say what N counts: --params-all")
    assert facts["parametric"]["alpha"] == pytest.approx(0.34, abs=0.03)
    assert facts["runs"]["columns"]["run_id"][0] == "row 2"
    assert build_figures(facts, drawn_runs(table)[0])["surface"].data


def test_laws_of_other_runs_are_called_out(demo: tuple[Laws, RunTable]):
    laws, table = demo
    fewer = replace(table, frame=table.frame.iloc[5:].reset_index(drop=True))
    worst = report_facts(laws, fewer)["warnings"][0]
    assert worst["level"] == "bad" and "other runs" in worst["text"]


def test_a_production_run_after_the_fit_is_no_other_table(demo: tuple[Laws, RunTable]):
    laws, table = demo
    later = table.frame.iloc[[0]].assign(run_id="f" * 16, purpose="production", L=1.63)
    longer = replace(table, frame=pd.concat([table.frame, later], ignore_index=True))
    assert longer.hash != table.hash
    facts = report_facts(laws, longer)
    assert not any("other runs" in w["text"] for w in facts["warnings"])
    assert "production" in facts["runs"]["columns"]["use"]


class Cells(HTMLParser):
    """Sections of a page -> {anchor: texts of its table cells and leads}."""

    def __init__(self, page: str):
        super().__init__()
        self.anchor, self.texts, self.inside = "", {}, 0
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        known = dict(attrs)
        if tag == "section":
            self.anchor = known["id"] or ""
            self.texts[self.anchor] = []
        self.inside = 1 if tag in ("td", "dd", "li") or (tag == "p" and known.get("class") in ("lead", "missing")) else self.inside

    def handle_endtag(self, tag: str) -> None:
        self.inside = 0 if tag in ("td", "dd", "li", "p") else self.inside

    def handle_data(self, data: str) -> None:
        if self.anchor and self.inside and data.strip():
            self.texts[self.anchor].append(data.strip())


NUMBER = re.compile(r"(\d[\d,]*(?:\.\d+)?)(×10[⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+|[kMBT%]\b|%| min| h)?")
POWERS = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")
UNITS = {"": 1.0, "k": 1e3, "M": 1e6, "B": 1e9, "T": 1e12, "%": 0.01, " min": 60.0, " h": 3600.0}


def numbers(text: str) -> list[tuple[float, float]]:
    """Each number written in `text`, and by how much rounding may have moved it."""
    out = []
    for digits, unit in NUMBER.findall(text):
        scale = 10.0 ** int(unit[3:].translate(POWERS)) if unit.startswith("×") else UNITS[unit]
        plain = digits.replace(",", "")
        out.append((float(plain) * scale, 0.51 * 10.0 ** -len(plain.partition(".")[2]) * scale))
    return out


def leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, (dict, list)):
        for v in value.values() if isinstance(value, dict) else value:
            yield from leaves(v)
    else:
        yield value


def test_page_markdown_and_json_tell_the_same(facts: dict[str, Any], demo: tuple[Laws, RunTable]):
    page = Cells(render(facts, drawn_runs(demo[1])[0])).texts
    told = to_markdown(facts)
    known = list(leaves(json.loads(json.dumps(facts))))
    values = np.sort([abs(v) for v in known if isinstance(v, (int, float)) and not isinstance(v, bool)])
    words = {v for v in known if isinstance(v, str) and len(v) > 3}
    assert set(page) == {anchor for anchor, _ in shown_contents(facts)} == {anchor for anchor, _ in CONTENTS} - {"inside"}
    for anchor, texts in page.items():
        assert texts, anchor
        for text in texts:
            assert text in told, (anchor, text)
            if anchor == "reading" or any(text in word for word in words):
                continue
            for word in words:
                text = text.replace(word, "")
            for value, half in numbers(text):
                near = np.searchsorted(values, [value - half, value + half], side="left")
                assert near[1] > near[0] or np.isin(value, values), (anchor, text, value)


def test_markdown_holds_every_run_and_warning(facts: dict[str, Any]):
    text = to_markdown(facts)
    for sentence in facts["verdict"]["sentences"]:
        assert sentence in text
    assert text.count("\n## ") == len(CONTENTS) - 1, "only what happened inside the runs is absent"
    assert all(run_id in text for run_id in facts["runs"]["columns"]["run_id"])
    assert all(w["text"] in text for w in facts["warnings"])
    assert facts["left_out"][0]["reason"] in text
    assert "| adopt |" in text and "<" not in text.replace("<=", "")


def test_the_width_says_that_it_is_no_law(facts: dict[str, Any]):
    width = facts["verdict"]["recommended"]["width"]
    assert width["value"] == pytest.approx(facts["width"]) and "no law" in width["note"]
    assert "| Model width | " in to_markdown(facts)


def test_warnings_about_many_budgets_are_one_line_and_prediction_reasons_are_not_said_twice(demo: tuple[Laws, RunTable]):
    laws, table = demo
    raw = laws.as_dict()
    raw["warnings"] = [
        "budget 4e+11 FLOPs (too few): 1 runs of fewer than 3 sizes: no parabola",
        "budget 1.2e+12 FLOPs (too few): 2 runs of fewer than 3 sizes: no parabola",
        "3 rows are left out, each with its reason",
        "prediction: 40x beyond the largest compute fitted",
    ]
    raw["allocation"] = {**raw["allocation"], "warnings": []}
    raw["allocation"]["prediction"] |= {"verdict": "warn", "reasons": ["40x beyond the largest compute fitted"]}
    found = report_facts(raw, table)["warnings"]
    texts = [w["text"] for w in found]
    assert "Budgets 4×10¹¹ and 1.2×10¹² FLOPs (too few): fewer than three sizes, no parabola." in texts
    assert [w["level"] for w in found if "left out" in w["text"]] == ["note"]
    assert sum("40x beyond" in t for t in texts) == 1


def test_a_refused_prediction_is_no_recommendation(demo: tuple[Laws, RunTable]):
    laws, table = demo
    raw = laws.as_dict()
    raw["allocation"]["prediction"] |= {"verdict": "refuse", "reasons": ["400x beyond the largest compute fitted"]}
    facts = report_facts(raw, table)
    assert facts["verdict"]["status"] == "refuse"
    assert facts["verdict"]["sentences"][0].startswith("These runs do not carry a recommendation")
    assert facts["warnings"][0]["level"] == "bad"


def test_the_latest_stage_of_a_change_decides(demo: tuple[Laws, RunTable]):
    laws, table = demo
    first = promotions()[0]
    stages = [first, {**first, "stage": "d4", "verdict": "undecided"}]
    text = report_facts(laws, table, None, stages)["promotions"]["text"]
    assert "undecided weight_decay_multiplier=0.5" in text and "adopted" not in text
