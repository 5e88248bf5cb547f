"""The facts of a report as one plain dict: what the page shows, what --json prints, what Markdown says."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

import numpy as np

from analysis.report import format as fmt
from analysis.report.cautions import warning_facts
from analysis.report.facts_allocation import allocation_facts
from analysis.report.facts_inside import inside_facts
from analysis.report.facts_runs import cost_facts, noise_facts, production_facts, promotion_facts, run_columns, with_production
from analysis.report.facts_settings import setting_facts
from analysis.report.fronts import front_facts
from analysis.report.next_steps import next_steps
from analysis.report.verdict import verdict_facts
from analysis.table import NO_CONVENTION, RunTable

FACTS_SCHEMA = 1
DEFAULT_TITLE = "Scaling laws"
CONVENTION_LABELS = {
    "matrices_lm_head": "matrices + lm_head",
    "all": "all parameters",
    "matrices": "matrices only",
    NO_CONVENTION: "given in the table",
}


def report_facts(
    laws: Any,
    table: RunTable,
    production: Mapping[str, Any] | None = None,
    promotions: Sequence[Mapping[str, Any]] | None = None,
    *,
    fronts: Sequence[Mapping[str, Any]] | None = None,
    title: str = DEFAULT_TITLE,
) -> dict[str, Any]:
    """Everything a report says, JSON-ready (no NaN). `laws`: a Laws or its dict. A block without data holds only {"missing":
    one line}. `production`, `promotions` and `fronts`: see write_report."""
    raw: dict[str, Any] = laws.as_dict() if hasattr(laws, "as_dict") else dict(laws)
    facts: dict[str, Any] = {
        "schema_version": FACTS_SCHEMA,
        "title": title,
        "loss_name": table.loss_name,
        "convention": raw.get("convention") or table.convention,
    }
    facts["convention_label"] = CONVENTION_LABELS.get(facts["convention"], facts["convention"])
    facts["source"] = _source(raw, table)
    facts["noise"] = noise_facts(raw.get("noise"), table)
    facts |= allocation_facts(raw.get("allocation") or {}, table.frame, facts["convention"], CONVENTION_LABELS)
    facts["production"] = production_facts(production, facts["loss_name"])
    facts["held_out"] = with_production(facts["held_out"], facts["production"])
    facts["width"] = _width_at(table, facts["prediction"].get("N"))
    facts |= setting_facts(raw, facts["prediction"], facts["width"])
    facts["promotions"] = promotion_facts(promotions)
    facts["fronts"] = front_facts(fronts)
    facts["inside"] = inside_facts(table)
    facts["cost"] = cost_facts(table)
    facts["left_out"] = [x.as_dict() for x in table.left_out]
    facts["warnings"] = warning_facts(raw, table, facts)
    facts["verdict"] = verdict_facts(facts)
    facts["next_steps"] = next_steps(facts)
    facts["runs"] = run_columns(table)
    return plain(facts)


def plain(value: Any) -> Any:
    """JSON-ready: NaN and infinities become null, numpy numbers become Python's."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if value is None or isinstance(value, (str, int, bool)):
        return value
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    raise TypeError(f"{type(value).__name__} in the facts")


def _source(raw: Mapping[str, Any], table: RunTable) -> dict[str, Any]:
    used, left = len(table), len(table.left_out)
    text = f"{fmt.plural(used, 'run')} {'is' if used == 1 else 'are'} listed below"
    text += (
        f"; {fmt.plural(left, 'row')} {'was' if left == 1 else 'were'} left out, with reasons." if left else "; none was left out."
    )
    return {
        "n_runs": used,
        "n_left_out": left,
        "table": table.source,
        "table_hash": table.hash,
        "laws_hash": str(raw.get("source_hash") or ""),
        "notes": list(table.notes),
        "generated_at": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "version": _version(),
        "text": text,
    }


def _version() -> str:
    try:
        return metadata.version("nanoladder")
    except metadata.PackageNotFoundError:  # used from a source folder
        return ""


def _width_at(table: RunTable, params: Any) -> float | None:
    """Model dimension to expect at N = `params`: log-linear in N through the table's own shapes; None without widths."""
    known = table.frame[["N", "width"]].dropna()
    if not fmt.is_number(params) or known["N"].nunique() < 2:
        return None
    slope, intercept = np.polyfit(np.log(known["N"]), np.log(known["width"]), 1)
    return float(np.exp(intercept + slope * math.log(params)))
