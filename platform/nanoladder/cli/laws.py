"""nanoladder fit and nanoladder report."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from nanochat_model.errors import ConfigError
from nanoladder.cli.common import Json, print_json, print_table
from nanoladder.workspace import Workspace

if TYPE_CHECKING:
    from analysis.design import Design
    from analysis.laws import Laws
    from analysis.table import RunTable
    from nanoladder.mlflow_page import MlflowPage

LEVEL_WORDS = {"bad": "problem", "warn": "caution", "note": "note"}
MOST_LEFT_OUT = 20  # rows named one by one


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
    params_matrices_lm_head: str = ""
    """Column of N counted as matrices and lm_head, where a table counts parameters in several ways."""
    params_all: str = ""
    """Column of N counted as all parameters."""
    params_matrices: str = ""
    """Column of N counted as matrices only."""
    convention: Literal["matrices_lm_head", "all", "matrices"] | None = None
    """Which count of parameters is N where several are known: records, MLflow, results.csv, or the columns above."""
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
    seed: Annotated[str, tyro.conf.arg(name="seed-column")] = ""
    """Column of the seed: runs that differ in nothing else tell the noise."""
    batch_sequence_len: int | None = None
    """Tokens a sequence, when the batch column counts sequences."""
    drop_outliers: str = ""
    """Column whose true rows are left out."""
    comparable: tuple[str, ...] = ()
    """Runs whose validation set, packing or sequence length differ are refused together: the comparable hash to use, or
    several to mix them in spite of it."""

    def mapping(self) -> dict[str, str]:
        names = ["params", "params_matrices_lm_head", "params_all", "params_matrices", "tokens", "loss", "budget", "flops"]
        names += ["batch", "lr", "weight_decay", "width", "group", "seed"]
        return {name: getattr(self, name) for name in names if getattr(self, name)}

    def read(self) -> RunTable:
        """The table of runs, only those of --comparable where that is given. Raises DataError or ConfigError on what cannot be
        read."""
        table = self._read()
        if self.convention:
            table = table.with_convention(self.convention)
        return table.only_comparable(self.comparable) if self.comparable else table

    def _read(self) -> RunTable:
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
            return load_records(path)
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
    n_boot: int = 10_000
    """Bootstrap resamples."""
    seed: int = 42
    """Of the resamples; 42 draws those of arXiv 2404.10102."""
    remaining_flops: float | None = None
    """Also name the next runs that narrow the target's tokens per parameter most, for this much compute in all."""
    json: Json = False

    def run(self) -> None:
        from analysis.laws import fit_laws

        for name, value in (
            ("n_boot", self.n_boot),
            ("target_flops", self.target_flops),
            ("remaining_flops", self.remaining_flops),
        ):
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"{name} {value} must be over 0 and finite")
        table = self.data.read()
        laws = fit_laws(
            table,
            target_flops=self.target_flops,
            n_boot=self.n_boot,
            seed=self.seed,
            force_comparable=self.data.comparable,
        )
        out = Path(self.out) if self.out else (Workspace(self.data.storage).laws_path if self.data.storage else None)
        if out is not None:
            laws.save(out)
        plain = laws.as_dict()
        design = self.next_runs(table, laws) if self.remaining_flops is not None else None
        if self.json:
            print_json(plain if design is None else {**plain, "next_runs": design.as_dict()})
            return
        self.show(table, laws)
        if design is not None:
            rows = [
                (f"{r.N:.3g}", f"{r.D:.3g}", f"{r.C:.3g}", f"{r.B:.3g}" if r.B else "", f"{r.sd_after:.3g}") for r in design.runs
            ]
            print_table(("N", "D", "FLOPs", "batch (tokens)", "sd of log D/N after it"), rows, title="next runs")
            print(design.message)
        print(f"written: {out}" if out is not None else "not written; --out laws.json keeps the laws for `nanoladder plan`")

    def show(self, table: RunTable, laws: Laws) -> None:
        """The laws as a table, then in words, with what speaks against them and what to do next."""
        from analysis.report import report_facts
        from nanoladder.law_table import rows_of

        print_table(("law", "value", "interval (90%)", "status"), rows_of(laws.as_dict()), title=f"{laws.n_runs} runs")
        facts = report_facts(laws, table)
        print("\n".join(facts["verdict"]["sentences"]), end="\n\n")
        for warning in facts["warnings"]:
            print(f"{LEVEL_WORDS[warning['level']]}: {warning['text']}")
        for note in laws.notes:
            print(f"note: {note}")
        for item in laws.left_out[:MOST_LEFT_OUT]:
            print(f"left out: {item['row']}: {item['reason']}")
        if len(laws.left_out) > MOST_LEFT_OUT:
            print(f"left out: {len(laws.left_out) - MOST_LEFT_OUT:,} more rows, in the JSON (--json, --out) with their reasons")
        for step in facts["next_steps"]:
            print(f"next: {step}")

    def next_runs(self, table: RunTable, laws: Laws) -> Design:
        """The design for --remaining-flops; ConfigError without a fitted allocation."""
        from analysis.design import suggest_runs

        if laws.allocation is None:
            raise ConfigError(
                "--remaining-flops needs an allocation law, and these runs carry none; see the warnings of fit without it"
            )
        target = self.target_flops or float(laws.allocation["prediction"]["C"])
        assert self.remaining_flops is not None
        noise = float(laws.noise["sd"]) if laws.noise else None
        return suggest_runs(
            table.frame,
            laws.allocation["parametric"],
            target_flops=target,
            remaining_flops=self.remaining_flops,
            noise_sd=noise,
            batch_law=laws.batch_size,
        )


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
    """Page of an MLflow experiment that runs should link to, for example http://127.0.0.1:5000/#/experiments/1; left out: the page
    that `mlflow ui` shows for the MLflow of --storage."""
    markdown: bool = False
    """Print the facts as Markdown instead of writing the page."""
    json: Json = False

    def run(self) -> None:
        from analysis.laws import Laws, fit_laws
        from analysis.report import report_facts, to_markdown, write_report

        table = self.data.read()
        stored = Workspace(self.data.storage).laws_path if self.data.storage else None
        path = Path(self.laws) if self.laws else stored if stored is not None and stored.exists() else None
        laws = Laws.load(path) if path is not None else fit_laws(table, force_comparable=self.data.comparable)
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
        write_report(laws, table, out, title=self.title, **self.mlflow_address(), **extra)
        print(f"written: {out}")

    def mlflow_address(self) -> MlflowPage:
        if self.mlflow_page:
            return {"mlflow_uri": self.mlflow_page}
        if not self.data.storage:
            return {}
        from nanoladder.mlflow_page import local_page

        return local_page(Workspace(self.data.storage))

    def recorded(self) -> dict[str, Any]:
        """Prediction against production, promotions and fronts, where the storage root has them."""
        if not self.data.storage:
            return {}
        from nanoladder.outcomes import read_fronts, read_production, read_promotions

        root = Workspace(self.data.storage)
        return {"production": read_production(root), "promotions": read_promotions(root), "fronts": read_fronts(root)}
