"""The folder layout of one storage root, in one place. A root at a URL is worked on in a local copy (see storage.py).

corpus/ tokenizer/ shards/        data, each naming its parents by hash
runs/<run_id>/record.json         one folder a run; the record is the truth
sweeps/<name>/                    index of its runs, status, choices, verdicts
stages/<name>.json                what a multi-stage job (the demo) has finished
laws.json prediction.json report.html
mlflow.db optuna.db               mirrors for people to look at
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nanochat_model.config import DataConfig, Packing
from nanochat_model.errors import ConfigError
from nanochat_model.record import RECORD_FILE, RunRecord

if TYPE_CHECKING:
    from nanochat_model.shard_set import ShardSet


@dataclass(frozen=True)
class Workspace:
    """Paths under a storage root. Nothing is created until something is written."""

    root: Path
    remote: str = ""  # the URL that `root` is the working copy of, if any

    def __init__(self, root: str | Path) -> None:
        url = str(root) if "://" in str(root) else ""
        if url:
            from nanoladder.storage import local_folder

            root = local_folder(url)
        object.__setattr__(self, "remote", url)
        object.__setattr__(self, "root", Path(root).expanduser().absolute())

    @property
    def corpus_dir(self) -> Path:
        return self.root / "corpus"

    @property
    def tokenizer_dir(self) -> Path:
        return self.root / "tokenizer"

    @property
    def shards_dir(self) -> Path:
        return self.root / "shards"

    @property
    def runs_dir(self) -> Path:
        return self.root / "runs"

    @property
    def stages_dir(self) -> Path:
        return self.root / "stages"

    @property
    def laws_path(self) -> Path:
        return self.root / "laws.json"

    @property
    def prediction_path(self) -> Path:
        return self.root / "prediction.json"

    @property
    def report_path(self) -> Path:
        return self.root / "report.html"

    @property
    def mlflow_uri(self) -> str:
        return f"sqlite:///{self.root / 'mlflow.db'}"

    @property
    def optuna_uri(self) -> str:
        return f"sqlite:///{self.root / 'optuna.db'}"

    def run_dir(self, run_id: str) -> Path:
        return self.runs_dir / run_id

    def sweep_dir(self, name: str) -> Path:
        return self.root / "sweeps" / name

    def records(self, *, sweep: str = "") -> list[RunRecord]:
        """All run records (of one sweep), oldest first. A record that cannot be read raises a ConfigError that names it."""
        records, broken = self.read_records(sweep=sweep)
        if broken:
            more = f" (and {len(broken) - 1} more such records)" if len(broken) > 1 else ""
            raise ConfigError(broken[0] + more)
        return records

    def read_records(self, *, sweep: str = "") -> tuple[list[RunRecord], list[str]]:
        """Readable records, oldest first, and one line for each that is broken."""
        return read_records(self.record_paths(), sweep=sweep)

    def data_config(self, packing: Packing = "keep_remainder") -> DataConfig:
        """The token shards of this root as a DataConfig; ConfigError with the command that builds them when missing."""
        return self._shards().data_config(packing)

    @property
    def vocab_size(self) -> int:
        """Vocabulary of the shards' tokenizer (its special tokens included)."""
        return len(self._shards().token_bytes)

    @property
    def bytes_per_token(self) -> float:
        """Bytes of text a token, of the training shards."""
        return self._shards().bytes_per_token

    def _shards(self) -> ShardSet:
        if not (self.shards_dir / "manifest.json").is_file():
            raise ConfigError(f"no token shards at {self.shards_dir}; build them with: nanoladder data --storage {self.root}")
        from nanochat_model.shard_set import ShardSet

        return ShardSet.open(self.shards_dir)

    def record_paths(self) -> list[Path]:
        return sorted(self.runs_dir.glob(f"*/{RECORD_FILE}"))


def read_records(paths: Iterable[Path], *, sweep: str = "") -> tuple[list[RunRecord], list[str]]:
    """Records of `paths`, oldest first, and one line for each that cannot be read."""
    records: list[RunRecord] = []
    broken: list[str] = []
    for path in paths:
        try:
            record = RunRecord.load(path)
        except ConfigError as e:
            broken.append(str(e))
        else:
            if not sweep or sweep in record_sweeps(record):
                records.append(record)
    return sorted(records, key=lambda r: (r.started_at, r.run_id)), broken


def record_sweeps(record: RunRecord) -> list[str]:
    """The sweeps that a run belongs to: one run may serve several."""
    return [s for s in record.tags.get("sweeps", record.sweep).split(",") if s]
