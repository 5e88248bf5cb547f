"""A storage root at a URL (s3://, gs://, or any that fsspec knows), worked on in a local folder.

What lies at the URL is the truth: records, checkpoints of unfinished runs, the sweeps' indexes and verdicts, laws and
predictions, and the shards that runs read. A run's process puts its record there before anybody counts the run as done, and a
checkpoint before training goes on. The local folder is a working copy that any machine can make again. MLflow's and Optuna's
databases stay local: `nanoladder sync` makes them from the records.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

from nanochat_model.errors import ConfigError
from nanochat_model.identity import content_hash
from nanochat_model.record import RECORD_FILE, RunRecord
from nanoladder.live_status import STATUS_FILE
from nanoladder.pool import load_record
from nanoladder.stopping import REQUEST_FILE

LOCAL_ENV = "NANOLADDER_LOCAL"  # folder under which working copies lie
CHECKPOINTS = "checkpoints"  # of a run: moved by the process that trains it, not with the rest
WHOLE_FOLDERS = ("shards", "tokenizer", "sweeps", "stages")
STEERING = (STATUS_FILE, REQUEST_FILE)  # of a sweep: moved by `remote_steering`, or an old request would end a later command
ATTEMPTS = 4
FIRST_PAUSE_SECONDS = 0.5  # doubled after each failed attempt
SHOW_SECONDS = 90.0  # acdirmax, after which NFS looks again, is 60
PARALLEL = 16  # transfers at a time: small files wait for the network, not for the CPU
log = logging.getLogger(__name__)


def is_url(storage: str | os.PathLike[str]) -> bool:
    return "://" in str(storage)


def local_folder(url: str) -> Path:
    """The working copy of a URL on this machine: under NANOLADDER_LOCAL, else the user's cache folder."""
    given = os.environ.get(LOCAL_ENV)
    base = Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "nanoladder"
    name = re.sub(r"[^A-Za-z0-9]+", "-", url.split("?")[0]).strip("-")[-60:]
    return base.absolute() / f"{name}-{content_hash(url)[:6]}"


class Remote:
    """The files under a URL, by paths relative to it. Transfers are tried several times; what then fails is a ConfigError."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._fs, base = _open(url)
        self._base = base.rstrip("/")

    def listing(self, folder: str = "") -> dict[str, tuple[int, int]]:
        """Relative path of every file under `folder` -> (bytes, modification time in ns)."""
        from pyarrow import fs

        root = f"{self._base}/{folder}".rstrip("/")
        selector = fs.FileSelector(root, recursive=True, allow_not_found=True)
        found = self._try(f"list {folder or 'it'}", lambda: self._fs.get_file_info(selector))
        cut = len(self._base) + 1
        return {i.path[cut:]: (i.size, i.mtime_ns or 0) for i in found if i.type == fs.FileType.File}

    def stat(self, path: str) -> tuple[int, int] | None:
        from pyarrow import fs

        info = self._try(f"look at {path}", lambda: self._fs.get_file_info(f"{self._base}/{path}"))
        return (info.size, info.mtime_ns or 0) if info.type == fs.FileType.File else None

    def put(self, local: Path, path: str) -> None:
        """Upload one file, and give the local one the time of the copy."""
        self._send(lambda: local.open("rb"), path)
        self._stamp(local, path)

    def _send(self, open_source: Callable[[], BinaryIO], path: str) -> None:
        """(An object store shows a file whole or not at all; other file systems get it under another name first.)"""

        def act() -> None:
            target = f"{self._base}/{path}"
            atomic = self._fs.type_name in ("s3", "gcs", "abfs")
            if not atomic:
                self._fs.create_dir(target.rpartition("/")[0], recursive=True)
            written = target if atomic else f"{target}.partial-{os.getpid()}"
            with open_source() as source, self._fs.open_output_stream(written) as sink:
                shutil.copyfileobj(source, sink, 1 << 22)
            if not atomic:
                self._fs.move(written, target)

        self._try(f"write {path}", act)

    def get(self, path: str, local: Path) -> None:
        """Download one file, atomically, with the time it was written."""

        def act() -> None:
            local.parent.mkdir(parents=True, exist_ok=True)
            partial = local.with_name(f".{local.name}.{os.getpid()}")
            try:
                with self._fs.open_input_stream(f"{self._base}/{path}") as source, partial.open("wb") as sink:
                    shutil.copyfileobj(source, sink, 1 << 22)
                os.replace(partial, local)
            finally:
                partial.unlink(missing_ok=True)

        self._try(f"read {path}", act)
        self._stamp(local, path)

    def _stamp(self, local: Path, path: str) -> None:
        """Give the local file the time of the one at the URL."""
        facts = self.stat(path)
        if facts is not None and facts[1]:
            os.utime(local, ns=(facts[1], facts[1]))

    def put_text(self, path: str, text: str) -> None:
        """Write a small file that several sides change: object stores show it whole or not at all."""
        self._send(lambda: io.BytesIO(text.encode()), path)

    def get_text(self, path: str) -> str | None:
        """The text of a small file, None where there is none."""

        def act() -> str | None:
            try:
                with self._fs.open_input_stream(f"{self._base}/{path}") as source:
                    return str(source.read().decode("utf8"))
            except FileNotFoundError:
                return None

        found: str | None = self._try(f"read {path}", act)
        return found

    def delete_file(self, path: str) -> None:
        """Remove a file; nothing happens where there is none."""

        def act() -> None:
            with contextlib.suppress(FileNotFoundError):
                self._fs.delete_file(f"{self._base}/{path}")

        self._try(f"remove {path}", act)

    def delete_folder(self, folder: str) -> None:
        if self.listing(folder):
            self._try(f"remove {folder}", lambda: self._fs.delete_dir(f"{self._base}/{folder}"))

    def _try(self, what: str, act: Any) -> Any:
        for attempt in range(ATTEMPTS):
            try:
                return act()
            except OSError as e:
                if attempt == ATTEMPTS - 1:
                    raise ConfigError(
                        f"storage {self.url} cannot {what} ({str(e).splitlines()[0][:200]}); check the URL, the network and the "
                        "credentials, then give the same command again"
                    ) from None
                time.sleep(FIRST_PAUSE_SECONDS * 2**attempt)
        return None


def _open(url: str) -> tuple[Any, str]:
    import pyarrow
    from pyarrow import fs

    try:
        return fs.FileSystem.from_uri(url)
    except pyarrow.ArrowInvalid:
        pass
    try:
        import fsspec

        found, base = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as e:
        raise ConfigError(f"storage {url}: {e}; give a folder, s3://bucket/prefix, gs://… or what fsspec knows") from None
    return fs.PyFileSystem(fs.FSSpecHandler(found)), base


def pull(url: str, root: Path) -> int:
    """Bring the working copy up to what lies at the URL: all but checkpoints. Returns how many files came."""
    remote = Remote(url)
    there = {p: f for p, f in remote.listing().items() if f"/{CHECKPOINTS}/" not in p and not p.endswith(STEERING)}
    wanted = [p for p, facts in there.items() if _is_old(root / p, facts)]
    _parallel(wanted, lambda p: remote.get(p, root / p))
    return len(wanted)


def push(url: str, root: Path) -> int:
    """Put what is new in the working copy to the URL: all but checkpoints, logs and databases. Returns how many files went."""
    remote = Remote(url)
    there = remote.listing()
    paths = {str(f.relative_to(root)): f for f in _small_files(root)}
    new = [p for p, f in paths.items() if _is_new(f, there.get(p))]
    _parallel(new, lambda p: remote.put(paths[p], p))
    return len(new)


@contextlib.contextmanager
def mirrored(storage: str) -> Iterator[None]:
    """A command on a storage root: where that is a URL, the working copy is pulled before, and pushed after, also when the
    command failed or was interrupted."""
    if not is_url(storage):
        yield
        return
    root = local_folder(storage)
    pull(storage, root)
    try:
        yield
    finally:
        push(storage, root)


def find_record(storage: str, root: str, run_dir: str) -> RunRecord | None:
    """The record of a run that ended on some node: from the URL where there is one, else from the shared folder."""
    folder = Path(run_dir)
    if storage:
        remote, path = Remote(storage), f"{folder.relative_to(root).as_posix()}/{RECORD_FILE}"
        facts = remote.stat(path)
        local = folder / RECORD_FILE
        if facts is not None and not (local.is_file() and (local.stat().st_size, local.stat().st_mtime_ns) == facts):
            remote.get(path, local)  # stores count whole seconds: a record of the same second may be another
    return load_record(folder)


def left_record(storage: str, root: str, run_dir: str) -> RunRecord:
    """`find_record` of a run that says it has left one: an NFS client that looked before believes for up to a minute that it is not
    there. Raises ConfigError where it never shows."""
    deadline = time.monotonic() + SHOW_SECONDS
    while (record := find_record(storage, root, run_dir)) is None:
        if time.monotonic() > deadline:
            raise ConfigError(
                f"a run has ended and its record is not to be seen in {run_dir}; give a --storage that all nodes share, or a URL"
            )
        time.sleep(0.2)
    return record


def _small_files(root: Path) -> Iterator[Path]:
    for pattern in ("*.json", "*.html", "runs/*/*.json", "runs/*/tokenizer/*"):
        yield from root.glob(pattern)
    for folder in WHOLE_FOLDERS:
        files = (f for f in (root / folder).rglob("*") if f.is_file() and not f.name.startswith("."))
        yield from (f for f in files if f.name not in STEERING)


# Both copies of a file carry the time at which it was written at the URL, so each side can tell what is new to it.


def _is_old(local: Path, facts: tuple[int, int]) -> bool:
    try:
        stat = local.stat()
    except FileNotFoundError:
        return True
    return facts[1] > stat.st_mtime_ns or (stat.st_size != facts[0] and facts[1] == stat.st_mtime_ns)


def _is_new(local: Path, facts: tuple[int, int] | None) -> bool:
    return facts is None or local.stat().st_mtime_ns > facts[1]


def _parallel(paths: Iterable[str], act: Any) -> None:
    with ThreadPoolExecutor(PARALLEL) as pool:
        for _ in pool.map(act, paths):
            pass
