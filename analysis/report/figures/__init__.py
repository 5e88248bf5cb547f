"""The report's figures as plain plotly figures, one duty a file; each also works in a notebook."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from analysis.report.figures.allocation import allocation_figure
from analysis.report.figures.front import front_figures
from analysis.report.figures.inside import inside_figures
from analysis.report.figures.isoflop import isoflop_figure
from analysis.report.figures.law import SETTINGS, cells_figure, law_figure
from analysis.report.figures.noise import noise_figure
from analysis.report.figures.prediction import error_figure, frontier_figure
from analysis.report.figures.surface import residual_figure, surface_figure

__all__ = [
    "allocation_figure",
    "build_figures",
    "cells_figure",
    "error_figure",
    "front_figures",
    "frontier_figure",
    "inside_figures",
    "isoflop_figure",
    "law_figure",
    "noise_figure",
    "residual_figure",
    "surface_figure",
]


def build_figures(facts: Mapping[str, Any], drawn: pd.DataFrame) -> dict[str, go.Figure]:
    """Every figure that the facts support, by name. `drawn`: the runs of the allocation fits, sampled where there are many."""
    built = {
        "isoflop": isoflop_figure(facts, drawn),
        "surface": surface_figure(facts, drawn),
        "residuals": residual_figure(facts, drawn),
        **{f"allocation_{q}": allocation_figure(facts, q) for q in ("N", "D", "ratio")},
        "frontier": frontier_figure(facts),
        "errors": error_figure(facts),
        "noise": noise_figure(facts),
        **inside_figures(facts),
        **front_figures(facts),
    }
    for name in SETTINGS:
        block = facts[name]
        built[f"{name}_cells"] = cells_figure(block, name, facts["loss_name"])
        for i, law in enumerate(block.get("laws") or []):
            built[f"{name}_law_{i}" if i else f"{name}_law"] = law_figure(law, name)
    return {name: figure for name, figure in built.items() if figure is not None}
