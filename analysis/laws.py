"""Laws from runs: `fit_laws(table)` gives `Laws`, which is the file laws.json and holds each `Law`."""

from analysis.fit import fit_laws
from analysis.law import STATUSES, Law, Prediction, Status
from analysis.laws_file import SCHEMA_VERSION, Laws

__all__ = ["SCHEMA_VERSION", "STATUSES", "Law", "Laws", "Prediction", "Status", "fit_laws"]
