"""What the process of one run does where the storage root is a URL: fetch before, and put its checkpoints and record there."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from nanochat_model.callbacks import Callback
from nanochat_model.checkpoint import CHECKPOINTS_DIR, CHECKSUMS_FILE, all_checkpoints
from nanochat_model.config import TrainConfig
from nanochat_model.distributed import current_ranks, on_main
from nanochat_model.errors import ConfigError
from nanochat_model.record import RECORD_FILE, RunRecord
from nanoladder.run_lock import exclusive
from nanoladder.storage import Remote

SHARDS_WAIT_SECONDS = 3600.0  # for another process of this node that fetches the same shards
log = logging.getLogger(__name__)


class RunMirror(Callback):
    """One run's folder and its copy at the URL. Rank 0 moves the run's files; every node fetches the shards it lacks."""

    def __init__(self, url: str, root: Path, run_dir: Path, *, keep_checkpoints: bool) -> None:
        self._remote = Remote(url)
        self._root, self._run_dir = root, run_dir
        self._path = run_dir.relative_to(root).as_posix()
        self._keep = keep_checkpoints
        self._num_steps = 0

    def fetch(self, config: TrainConfig) -> None:
        """Shards, unless this node has them, and what earlier attempts left of the run. Every rank calls it."""
        shards = Path(config.data.path)
        if config.data.path and shards.is_relative_to(self._root) and not (shards / "manifest.json").is_file():
            with exclusive(self._root / ".fetch", "the shards' download", wait_seconds=SHARDS_WAIT_SECONDS):
                self._get_folder(shards.relative_to(self._root).as_posix(), last="manifest.json")
        on_main(lambda: self._get_folder(self._path, last=CHECKSUMS_FILE))

    def _get_folder(self, folder: str, *, last: str) -> None:
        """Files that are missing here; those named `last` come after the others, as they say that the rest is there."""
        missing = [p for p in self._remote.listing(folder) if not (self._root / p).is_file()]
        for path in sorted(missing, key=lambda p: p.endswith(last)):
            self._remote.get(path, self._root / path)

    def on_start(self, config: TrainConfig, start_step: int) -> None:
        self._num_steps = config.num_steps

    def on_checkpoint(self, path: Path, step: int) -> None:
        """Put a checkpoint there, and take away those that are gone here. One that cannot be sent costs a warning: the next
        may get through."""
        if not current_ranks().is_main or (step == self._num_steps and not self._keep):
            return
        try:
            for file in sorted(path.iterdir(), key=lambda f: f.name == CHECKSUMS_FILE):  # last: without it the rest is void
                self._remote.put(file, f"{self._path}/{CHECKPOINTS_DIR}/{path.name}/{file.name}")
            here = {p.name for p in all_checkpoints(path.parent)}
            prefix = f"{self._path}/{CHECKPOINTS_DIR}/"
            for name in {p.removeprefix(prefix).split("/")[0] for p in self._remote.listing(prefix.rstrip("/"))} - here:
                self._remote.delete_folder(prefix + name)
        except ConfigError as e:
            log.warning("the checkpoint of step %d is only on this machine: %s", step, e)

    def finish(self, record: RunRecord) -> None:
        """Put the run's small files there, its record last, and remove checkpoints that nobody needs any more."""
        if not current_ranks().is_main:
            return
        files = [f for f in (*self._run_dir.glob("*.json"), *self._run_dir.glob("tokenizer/*")) if f.is_file()]
        for file in sorted(files, key=lambda f: f.name == RECORD_FILE):
            self._remote.put(file, f"{self._path}/{file.relative_to(self._run_dir).as_posix()}")
        if record.status == "complete" and not self._keep:
            shutil.rmtree(self._run_dir / CHECKPOINTS_DIR, ignore_errors=True)
            self._remote.delete_folder(f"{self._path}/{CHECKPOINTS_DIR}")
