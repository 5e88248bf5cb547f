"""Data sets of parquet from the Hugging Face hub (or a mirror of it, or plain addresses), in parallel and verified.

A download's folder holds the files, each whole or as `.part`, and download.json, which names the revision they are of and
every verified file's size and SHA-256. Called again it fetches what is missing.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanochat_model.errors import ConfigError
from nanochat_model.identity import content_hash, write_atomic
from nanochat_model.transfer import Corrupt, Line, Patience, RemoteFile, TransferFailed, ask, fetch, part_bytes, url_file, verify

# Short names of the corpora that nanochat trains on; any other data set is given as owner/name.
DATASETS = {"climbmix": "karpathy/climbmix-400b-shuffle", "fineweb-edu": "karpathy/fineweb-edu-100b-shuffle"}
DOWNLOAD_FILE = "download.json"
WORKERS = 8


@dataclass(frozen=True, kw_only=True)
class Source:
    """Files on offer, in order, and the revision they are of."""

    dataset: str
    revision: str
    files: tuple[RemoteFile, ...]
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class State:
    """How far a download is, over all its files; bytes verified before count as done."""

    done_bytes: int
    total_bytes: int  # of the files whose size is known
    done_files: int
    total_files: int
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Downloaded:
    """A finished download. `hash` is over names and contents, not over where they came from."""

    folder: str
    dataset: str
    revision: str
    files: tuple[dict[str, Any], ...]
    hash: str
    fetched_bytes: int  # by this call
    refetched: int  # connections that broke, or waits that the server asked for
    num_offered: int

    @property
    def num_bytes(self) -> int:
        return sum(f["size"] for f in self.files)


def dataset_folder(root: Path, dataset: str) -> Path:
    """Where a data set goes below a storage root."""
    name = DATASETS.get(dataset, dataset)
    if "://" in name:
        name = f"urls-{content_hash(sorted(name.split()))[:8]}"
    return root / "download" / name.replace("/", "--")


def find_source(dataset: str, *, revision: str = "", endpoint: str = "", token: str | None = None) -> Source:
    """Parquet files of a data set: "climbmix", "fineweb-edu", "owner/name", or addresses separated by blanks.

    An address may carry "#sha256=…" to be verified by. `endpoint` (default HF_ENDPOINT, else huggingface.co) may be a mirror.
    Raises ConfigError when there is no such data set, no parquet in it, or no answer.
    """
    if "://" in dataset:
        return _url_source(dataset.split())
    repo = DATASETS.get(dataset, dataset)
    if repo.count("/") != 1:
        raise ConfigError(f"dataset {dataset!r} is none of {', '.join(DATASETS)}, no owner/name and no address; give one of these")
    import huggingface_hub as hub
    from huggingface_hub.utils import build_hf_headers

    api = hub.HfApi(endpoint=endpoint or None, token=token)
    what = f"dataset {repo} at {api.endpoint}"
    info = ask(lambda: api.dataset_info(repo, revision=revision or None), what)
    commit = info.sha or revision or "main"
    tree = ask(lambda: list(api.list_repo_tree(repo, repo_type="dataset", revision=commit, recursive=True)), what)
    files = tuple(
        RemoteFile(
            name=f.path,
            url=hub.hf_hub_url(repo, f.path, repo_type="dataset", revision=commit, endpoint=api.endpoint),
            size=f.size,
            sha256=f.lfs.sha256 if f.lfs else None,
            git_sha1=None if f.lfs else f.blob_id,
        )
        for f in sorted(tree, key=lambda f: f.path)
        if isinstance(f, hub.RepoFile) and f.path.endswith(".parquet")
    )
    if not files:
        raise ConfigError(f"dataset {repo} at {commit[:12]} holds no .parquet file; give one that does")
    return Source(dataset=repo, revision=commit, files=files, headers=build_hf_headers(token=token))


def _url_source(urls: Sequence[str]) -> Source:
    files = tuple(url_file(url) for url in urls)
    names = [f.name for f in files]
    twice = next((n for n in names if names.count(n) > 1), None)
    if twice:
        raise ConfigError(f"two addresses end in {twice!r}, and files lie side by side in one folder; download them apart")
    return Source(dataset=" ".join(urls), revision="", files=files)


def download(
    source: Source,
    folder: Path,
    *,
    num_files: int = 0,
    workers: int = WORKERS,
    check: bool = False,
    check_file: Callable[[Path], None] | None = None,
    patience: Patience | None = None,
    progress: Callable[[State], None] | None = None,
) -> Downloaded:
    """The first `num_files` of `source` (0: all) in `folder`, verified. `check` reads and hashes also what is there already;
    `check_file` (default `check_parquet`) raises ConfigError on a verified file that is of no use.

    Other files go on when one fails. Raises ConfigError naming the files that could not be had, twice corrupt ones among
    them; KeyboardInterrupt leaves partial files that the next call continues.
    """
    wanted = source.files[: num_files or None]
    known = _known(folder, source)
    present = {f.name: k for f in wanted if (k := _present(f, folder, known.get(f.name), check)) is not None}
    missing = [f for f in wanted if f.name not in present]
    _check_space(folder, sum(max(0, (f.size or 0) - part_bytes(f.name, folder)) for f in missing))
    before = sum(k["size"] for k in present.values()) + sum(part_bytes(f.name, folder) for f in missing)
    line = Line(headers=source.headers, patience=patience or Patience())
    run = _Run(source, folder, wanted, present, before, line, progress, check_file or check_parquet)
    failures = run.fetch_all(missing, workers)
    if failures:
        more = f" (and {len(failures) - 3} more)" if len(failures) > 3 else ""
        good = len(wanted) - len(failures)
        raise ConfigError(
            f"{len(failures)} of {len(wanted)} files could not be had: {'; '.join(failures[:3])}{more}; {good} are verified "
            "and kept, start this again for the rest"
        )
    return run.result()


class _Run:
    """One call of `download`: its threads, its counts and download.json."""

    def __init__(
        self,
        source: Source,
        folder: Path,
        wanted: Sequence[RemoteFile],
        present: dict[str, dict[str, Any]],
        before: int,
        line: Line,
        progress: Callable[[State], None] | None,
        check_file: Callable[[Path], None],
    ) -> None:
        self.check_file = check_file
        self.source, self.folder, self.wanted, self.present = source, folder, wanted, present
        self.line, self.progress = line, progress
        self.before = before  # bytes that were here
        self.total = sum(f.size or 0 for f in wanted)
        self.received = 0
        self.fetched = 0
        self._lock = threading.Lock()

    def report(self, num_bytes: int) -> None:
        with self._lock:
            self.received += num_bytes
        self.show()

    def show(self, note: str = "") -> None:
        if self.progress is not None:
            state = State(
                done_bytes=self.before + self.received,
                total_bytes=max(self.total, self.before + self.received),
                done_files=len(self.present),
                total_files=len(self.wanted),
                note=note,
            )
            self.progress(state)

    def fetch_all(self, missing: Sequence[RemoteFile], workers: int) -> list[str]:
        """Fetch in threads; returns one line for each file that failed. A ConfigError stops everything: it hits every file."""
        failures: list[str] = []
        self.save()
        pool = ThreadPoolExecutor(max(1, workers), thread_name_prefix="download")
        try:
            jobs: dict[Future[dict[str, Any]], RemoteFile] = {
                pool.submit(fetch, f, self.folder, self.line, self.report): f for f in missing
            }
            left = set(jobs)
            while left:
                done, left = wait(left, timeout=1.0, return_when=FIRST_COMPLETED)
                for job in done:
                    try:
                        self._finished(jobs[job], job.result())
                    except TransferFailed as e:
                        failures.append(str(e))
                self.show("the server asked to wait" if self.line.not_before > self.line.clock() else "")
        finally:
            self.line.stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
        return failures

    def _finished(self, file: RemoteFile, facts: dict[str, Any]) -> None:
        self.check_file(self.folder / file.name)
        stat = (self.folder / file.name).stat()
        self.fetched += facts["size"]
        self.present[file.name] = {**facts, "mtime_ns": stat.st_mtime_ns}
        self.save()

    def save(self) -> None:
        files = [self.present[f.name] for f in self.wanted if f.name in self.present]
        others = [k for n, k in _known(self.folder, self.source).items() if n not in {f["name"] for f in files}]
        facts = {"dataset": self.source.dataset, "revision": self.source.revision, "files": files + others}
        write_atomic(self.folder / DOWNLOAD_FILE, json.dumps(facts, indent=1))

    def result(self) -> Downloaded:
        files = tuple({k: v for k, v in self.present[f.name].items() if k != "mtime_ns"} for f in self.wanted)
        return Downloaded(
            folder=str(self.folder),
            dataset=self.source.dataset,
            revision=self.source.revision,
            files=files,
            hash=content_hash([[f["name"], f["sha256"]] for f in files]),
            fetched_bytes=self.fetched,
            refetched=self.line.cuts + self.line.waits,
            num_offered=len(self.source.files),
        )


def stored_revision(folder: Path) -> str:
    """Revision that an earlier download into `folder` is of; "" without one. Going on with it keeps versions apart."""
    return str(_read(folder).get("revision", ""))


def _read(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / DOWNLOAD_FILE).read_text(encoding="utf8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
    return found if isinstance(found, dict) else {}


def _known(folder: Path, source: Source) -> dict[str, dict[str, Any]]:
    """Verified files of an earlier call. ConfigError when the folder belongs to another data set."""
    found = _read(folder)
    if found and found.get("dataset") != source.dataset:
        raise ConfigError(f"{folder} holds {found.get('dataset')!r}, not {source.dataset!r}; choose another folder")
    return {f["name"]: f for f in found.get("files", [])}


def _present(file: RemoteFile, folder: Path, known: dict[str, Any] | None, check: bool) -> dict[str, Any] | None:
    """Facts of a file that is there, whole and of this version; read and hashed where that is not known, or wanted."""
    path = folder / file.name
    if not path.is_file():
        return None
    stat = path.stat()
    if known is not None and not check:
        untouched = (stat.st_size, stat.st_mtime_ns) == (known["size"], known.get("mtime_ns"))
        same = file.sha256 in (None, known["sha256"]) and file.size in (None, known["size"])
        if untouched and same:
            return known
    try:
        facts = verify(file, path)
        if known is not None and file.sha256 is None and facts["sha256"] != known["sha256"]:
            raise Corrupt("has changed")
    except Corrupt:
        path.unlink()
        return None
    return {**facts, "mtime_ns": stat.st_mtime_ns}


def _check_space(folder: Path, num_bytes: int) -> None:
    import shutil

    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if num_bytes > free:
        raise ConfigError(
            f"{num_bytes / 1e9:.1f} GB are to be fetched and {folder} has {free / 1e9:.1f} GB free; take fewer shards, or "
            "another --storage"
        )


def check_parquet(path: Path) -> None:
    """ConfigError when a file is no parquet with a column of text: its documents could not be read."""
    from nanochat_model.sources import list_source

    if path.suffix == ".parquet":
        list_source(str(path))


def text_bytes(path: Path) -> int:
    """UTF-8 bytes in the text column of a parquet file."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    total = 0
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(columns=["text"]):
            total += pc.sum(pc.binary_length(batch.column(0))).as_py() or 0  # type: ignore[attr-defined]
    return total
