"""Scaling laws from run records, with intervals. numpy, scipy, pandas and plotly only.

In a notebook: `from analysis import load_csv, fit_laws; laws = fit_laws(load_csv("runs.csv"))`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from analysis.allocation import fit_allocation
    from analysis.batch import fit_batch_size
    from analysis.compare import compare_recipes, compare_runs, frontier_slope, promotion_test
    from analysis.design import suggest_runs
    from analysis.edge import extend_grid, next_grid
    from analysis.errors import DataError
    from analysis.laws import Law, Laws, fit_laws
    from analysis.learning_rate import fit_learning_rate
    from analysis.noise import SeedNoise, estimate_noise
    from analysis.report import report_facts, write_report
    from analysis.table import RunTable, load_csv, load_nanochat_results, load_records, table_from_frame
    from analysis.weight_decay import fit_weight_decay, weight_decay_from_optima

# Name -> module, imported on first use: reading a table needs no plotly, writing a report no optimizer.
_HOME = {
    "DataError": "errors", "Law": "laws", "Laws": "laws", "RunTable": "table", "SeedNoise": "noise", "compare_recipes": "compare",
    "compare_runs": "compare", "estimate_noise": "noise", "extend_grid": "edge", "fit_allocation": "allocation",
    "fit_batch_size": "batch", "fit_laws": "laws", "fit_learning_rate": "learning_rate", "fit_weight_decay": "weight_decay",
    "frontier_slope": "compare", "load_csv": "table", "load_nanochat_results": "table", "load_records": "table",
    "next_grid": "edge", "promotion_test": "compare", "report_facts": "report", "suggest_runs": "design",
    "table_from_frame": "table", "weight_decay_from_optima": "weight_decay", "write_report": "report",
}  # fmt: skip

__all__ = [
    "DataError", "Law", "Laws", "RunTable", "SeedNoise", "compare_recipes", "compare_runs", "estimate_noise", "extend_grid",
    "fit_allocation", "fit_batch_size", "fit_laws", "fit_learning_rate", "fit_weight_decay", "frontier_slope", "load_csv",
    "load_nanochat_results", "load_records", "next_grid", "promotion_test", "report_facts", "suggest_runs", "table_from_frame",
    "weight_decay_from_optima", "write_report",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"analysis.{_HOME[name]}"), name)
    raise AttributeError(f"module 'analysis' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
