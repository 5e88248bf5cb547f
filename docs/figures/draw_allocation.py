"""Draws the pictures of docs/laws.md for allocation and prediction, as SVG, from Marin's published Comma ladder.

Run from the repository root: python docs/figures/draw_allocation.py (needs Chromium on the PATH, which turns figures into SVG).
"""

from __future__ import annotations

import plotly.graph_objects as go
from draw_knob_laws import ROOT, write_svgs

from analysis import fit_laws, load_csv, report_facts
from analysis.report.figures import error_figure, frontier_figure, isoflop_figure, surface_figure


def allocation_figures() -> dict[str, go.Figure]:
    """File name -> figure."""
    table = load_csv(ROOT / "tests" / "data" / "marin_comma.csv")
    facts = report_facts(fit_laws(table, target_flops=3e21, n_boot=2000), table)
    found = {
        "law_surface": surface_figure(facts, table.frame),
        "law_isoflop": isoflop_figure(facts, table.frame),
        "law_frontier": frontier_figure(facts),
        "law_prediction": error_figure(facts),
    }
    return {name: figure for name, figure in found.items() if figure is not None}


if __name__ == "__main__":
    write_svgs(allocation_figures())
