"""Draws the pictures of docs/laws.md for batch size, learning rate and weight decay, as SVG, from published tables.

Run from the repository root: python docs/figures/draw_knob_laws.py (needs Chromium on the PATH, which turns figures into SVG).
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from urllib.parse import unquote

import pandas as pd
import plotly.graph_objects as go

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "support"))

from chromium import Page, find_chromium  # noqa: E402

from analysis import load_csv, weight_decay_from_optima  # noqa: E402
from analysis.batch import fit_batch_size  # noqa: E402
from analysis.learning_rate import fit_learning_rate  # noqa: E402
from analysis.report.facts_settings import setting_facts  # noqa: E402
from analysis.report.figures.law import law_figure  # noqa: E402

WIDTH, HEIGHT = 760, 400


def knob_figures() -> dict[str, go.Figure]:
    """File name -> figure. Step Law's 1911 dense runs (arXiv 2503.04715); nanochat's weight-decay optima of January 2026."""
    frame = load_csv(ROOT / "tests" / "data" / "steplaw_dense.csv").frame
    depths = [8, 12, 16, 20]
    sizes = [12 * (64 * d) ** 2 * d + 32768 * 64 * d for d in depths]
    optima = pd.DataFrame(
        {"width": [64.0 * d for d in depths], "D": [10.5 * n for n in sizes], "weight_decay": [0.40, 0.22, 0.10, 0.08]}
    )
    raw = {
        "batch_size": fit_batch_size(frame).as_dict(),
        "learning_rate": fit_learning_rate(frame).as_dict(),
        "weight_decay": weight_decay_from_optima(optima).as_dict(),
    }
    facts = setting_facts(raw, {}, None)
    found = {f"law_{name}": law_figure(facts[name]["laws"][0], name) for name in raw}
    return {name: figure for name, figure in found.items() if figure is not None}


def write_svgs(figures: dict[str, go.Figure]) -> None:
    """Each figure as an SVG of its name beside this file."""
    binary = find_chromium()
    if binary is None:
        sys.exit("no Chromium on the PATH; install one to draw the pictures")
    with tempfile.TemporaryDirectory() as folder, Page(binary) as page:
        blank = Path(folder) / "blank.html"
        go.Figure().write_html(blank, include_plotlyjs=True)
        page.open(blank, ready="window.Plotly")
        for name, figure in figures.items():
            spec = json.loads(figure.to_json())
            spec["layout"] |= {"paper_bgcolor": "#ffffff", "plot_bgcolor": "#ffffff"}
            options = json.dumps({"format": "svg", "width": WIDTH, "height": HEIGHT})
            uri = page.evaluate(f"Plotly.toImage({json.dumps(spec)}, {options})")
            path = Path(__file__).with_name(f"{name}.svg")
            path.write_text(unquote(uri.split(",", 1)[1]), encoding="utf8")
            print(path.relative_to(ROOT))


if __name__ == "__main__":
    write_svgs(knob_figures())
