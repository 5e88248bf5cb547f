"""nanoladder fit and nanoladder report."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from nanochat_model.errors import ConfigError
from nanoladder.cli.common import Json, print_json, print_table
from nanoladder.workspace import Workspace

if TYPE_CHECKING:
    from analysis.table import RunTable


@dataclass(frozen=True, kw_only=True)
class TableOptions:
    """Where the runs come from: a storage root, or somebody's table."""

    table: Annotated[str, tyro.conf.Positional] = ""
    """A CSV or parquet table, nanochat's results.csv, or a folder of runs; left out: the runs of --storage."""
    storage: str = ""
    """Root folder whose runs are read and beside which laws.json and report.html are written."""
    mlflow: str = ""
    """Tracking URI of an MLflow whose runs are read instead, for example sqlite:///demo/mlflow.db."""
    experiment: str = "nanoladder"
    """With --mlflow: the experiment."""
    params: str = ""
    """Column of N, the parameters, in a table of your own."""
    tokens: str = ""
    """Column of D, the training tokens."""
    loss: str = ""
    """Column of L, the loss."""
    budget: str = ""
    """Column of the isoFLOP budget."""
    flops: str = ""
    """Column of C, the training FLOPs."""
    batch: str = ""
    """Column of B, the batch in tokens (in sequences with --batch-sequence-len)."""
    lr: str = ""
    """Column of the learning rate."""
    weight_decay: str = ""
    """Column of the weight decay."""
    width: str = ""
    """Column of the model's width."""
    group: str = ""
    """Column that names the trunk run of points that share one."""
    batch_sequence_len: int | None = None
    """Tokens a sequence, when the batch column counts sequences."""
    drop_outliers: str = ""
    """Column whose true rows are left out."""

    def mapping(self) -> dict[str, str]:
        names = ("params", "tokens", "loss", "budget", "flops", "batch", "lr", "weight_decay", "width", "group")
        return {name: getattr(self, name) for name in names if getattr(self, name)}

    def read(self) -> RunTable:
        """The table of runs. Raises DataError or ConfigError on what cannot be read."""
        from analysis.table import load_csv, load_records

        if self.mlflow:
            from nanoladder.mlflow_table import load_mlflow

            return load_mlflow(self.mlflow, self.experiment, self.mapping() or None)
        path = Path(self.table) if self.table else None
        if path is not None and path.is_file():
            return load_csv(
                path,
                self.mapping() or None,
                drop_outliers=self.drop_outliers or None,
                sequence_len=self.batch_sequence_len,
            )
        if path is not None:
            if not path.is_dir():
                raise ConfigError(f"no table or folder at {path}; give a CSV, a parquet file or a storage root")
            inner = path / "runs"
            return load_records(sorted((inner if inner.is_dir() else path).glob("*/record.json")) or path)
        if not self.storage:
            raise ConfigError("no runs were named; give a table, or --storage with a root folder of runs")
        paths = Workspace(self.storage).record_paths()
        if not paths:
            raise ConfigError(f"no run records under {Workspace(self.storage).runs_dir}; run a sweep first, or give a table")
        return load_records(paths)


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Fit the laws to run records, or to any table with parameters, tokens and loss, and write laws.json.

    Example: nanoladder fit --storage demo --json

    A table of your own: nanoladder fit runs.csv --params N --tokens D --loss loss --out laws.json
    """

    data: TableOptions = field(default_factory=TableOptions)
    out: str = ""
    """Where to write laws.json; left out: beside the runs of --storage, else nowhere."""
    target_flops: float | None = None
    """Also predict the loss at this compute."""
    n_boot: int = 4000
    """Bootstrap resamples."""
    seed: int = 0
    json: Json = False

    def run(self) -> None:
        from analysis.laws import fit_laws
        from nanoladder.law_table import rows_of

        table = self.data.read()
        laws = fit_laws(table, target_flops=self.target_flops, n_boot=self.n_boot, seed=self.seed)
        out = Path(self.out) if self.out else (Workspace(self.data.storage).laws_path if self.data.storage else None)
        if out is not None:
            laws.save(out)
        plain = laws.as_dict()
        if self.json:
            print_json(plain)
            return
        print_table(("law", "value", "interval (90%)", "status"), rows_of(plain), title=f"{len(table)} runs")
        for warning in plain.get("warnings", []):
            print(f"warning: {warning if isinstance(warning, str) else warning.get('message', warning)}")
        for item in table.left_out:
            print(f"left out: {item.row}: {item.reason}")
        if out is not None:
            print(f"written: {out}")


@dataclass(frozen=True, kw_only=True)
class Report:
    """Laws and runs as one self-contained HTML page.

    Example: nanoladder report --storage demo

    A table of your own: nanoladder report runs.csv --params N --tokens D --loss loss --out report.html
    """

    data: TableOptions = field(default_factory=TableOptions)
    laws: str = ""
    """laws.json; left out: that of --storage, else fitted now."""
    out: str = ""
    """Where to write the page; left out: report.html beside the runs of --storage."""
    title: str = "Scaling laws"
    mlflow_page: str = ""
    """Page of an MLflow experiment that runs should link to, for example http://127.0.0.1:5000/#/experiments/1."""
    markdown: bool = False
    """Print the facts as Markdown instead of writing the page."""
    json: Json = False

    def run(self) -> None:
        from analysis.laws import Laws, fit_laws
        from analysis.report import report_facts, to_markdown, write_report

        table = self.data.read()
        stored = Workspace(self.data.storage).laws_path if self.data.storage else None
        path = Path(self.laws) if self.laws else stored if stored is not None and stored.exists() else None
        laws = Laws.load(path) if path is not None else fit_laws(table)
        extra = self.recorded()
        if self.json:
            print_json(report_facts(laws, table, **extra))
            return
        if self.markdown:
            print(to_markdown(report_facts(laws, table, **extra)))
            return
        out = (
            Path(self.out) if self.out else (Workspace(self.data.storage).report_path if self.data.storage else Path("report.html"))
        )
        write_report(laws, table, out, title=self.title, mlflow_uri=self.mlflow_page or None, **extra)
        print(f"written: {out}")

    def recorded(self) -> dict[str, Any]:
        """Prediction against production, and promotions, where the storage root has them."""
        if not self.data.storage:
            return {}
        from nanoladder.outcomes import read_production, read_promotions

        root = Workspace(self.data.storage)
        return {"production": read_production(root), "promotions": read_promotions(root)}
