"""nanoladder sync: MLflow and Optuna from the records."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass

from nanochat_model.errors import ConfigError
from nanoladder.cli.common import Json, Storage, print_json
from nanoladder.workspace import Workspace


@dataclass(frozen=True, kw_only=True)
class Sync:
    """Bring MLflow and Optuna up to the run records, which are the truth; runs that are there already are left as they are.

    Example: nanoladder sync --storage runs --mlflow http://127.0.0.1:5000
    """

    storage: Storage = "runs"
    mlflow: str | None = None
    """Tracking URI; left out: the storage root's own database; "" skips MLflow."""
    optuna: str | None = None
    """Storage URI; left out: the storage root's own database; "" skips Optuna."""
    json: Json = False

    def run(self) -> int:
        from nanoladder.sync import sync

        say, root = None if self.json else print, Workspace(self.storage)
        if not root.runs_dir.is_dir():
            raise ConfigError(f"no runs under {root.root}; give the --storage of a sweep")
        report = sync(root, mlflow_uri=self.mlflow, optuna_uri=self.optuna, say=say)
        if self.json:
            print_json(asdict(report))
        else:
            print(f"{report.num_runs} runs of {report.num_sweeps} sweeps, {report.num_studies} studies")
            if report.num_settled:
                print(f"{report.num_settled} trials that a dead command left running are settled in Optuna")
        for line in report.broken:
            print(f"nanoladder: {line}", file=sys.stderr)
        return 1 if report.broken else 0
