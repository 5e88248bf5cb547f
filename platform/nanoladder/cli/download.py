"""nanoladder data download and nanoladder data mirror."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from nanochat_model.errors import ConfigError
from nanoladder.cli.common import Json, Storage, duration, human, print_json
from nanoladder.workspace import Workspace

if TYPE_CHECKING:
    from nanoladder.download import State

RATE_WINDOW_SECONDS = 30.0
LOG_EVERY_SECONDS = 15.0


@dataclass(frozen=True, kw_only=True)
class DataDownload:
    """Fetch parquet shards of a data set: in parallel, going on with partial files, every size and checksum verified.

    Example: nanoladder data download --dataset climbmix --shards 170 --storage runs

    As many as a plan needs: nanoladder plan --depth 24 --json > plan.json; nanoladder data download --for-plan plan.json

    Then: nanoladder data --source runs/download/karpathy--climbmix-400b-shuffle --storage runs --vocab-size 32768

    Conversations and questions for `sft` and `chat-eval`: nanoladder data download --dataset chat --tasks-dir tasks
    """

    dataset: str = "climbmix"
    """climbmix, fineweb-edu, any owner/name on the hub with parquet of a `text` column, or addresses separated by blanks; or
    smoltalk, mmlu, gsm8k, arc, humaneval, or chat for these five, which come whole and as they are."""
    tasks_dir: str = "tasks"
    """Folder of smoltalk, mmlu, gsm8k, arc and humaneval, as `sft` and `chat-eval` take it."""
    storage: Storage = "runs"
    shards: int | None = None
    """Files to fetch, in the order of their names; 0: all. Left out: computed from one of the next three."""
    for_plan: str = ""
    """Output of `nanoladder plan --json`."""
    depth: int | None = None
    """As many as nanochat's recipe needs at this depth."""
    tokens: float | None = None
    """Training tokens, at 4.8 bytes each."""
    out: str = ""
    """Folder; left out: one named by the data set under the storage root's download/."""
    revision: str = ""
    """Branch, tag or commit; left out: that of an earlier download into the folder, else main as it is now."""
    endpoint: Annotated[str, tyro.conf.arg(metavar="URL")] = ""
    """Of a mirror of the hub; left out: HF_ENDPOINT, else huggingface.co."""
    workers: int = 8
    """Connections at once."""
    check: bool = False
    """Read and hash also what is there already."""
    json: Json = False

    def run(self) -> None:
        from nanoladder.download import dataset_folder, download, find_source, stored_revision
        from nanoladder.shards_needed import fetch_needed
        from nanoladder.task_data import chat_datasets

        if repositories := chat_datasets(self.dataset):
            self.fetch_chat(repositories)
            return
        folder = Path(self.out) if self.out else dataset_folder(Workspace(self.storage).root, self.dataset)
        revision = self.revision or stored_revision(folder)
        wanted = self.wanted_bytes()
        source = find_source(self.dataset, revision=revision, endpoint=self.endpoint)
        with transfer_bar(quiet=self.json) as progress:
            if wanted is None:
                done = download(
                    source, folder, num_files=self.shards or 0, workers=self.workers, check=self.check, progress=progress
                )
                note = ""
            else:
                done, note = fetch_needed(source, folder, wanted, workers=self.workers, check=self.check, progress=progress)
        if self.json:
            print_json({**asdict(done), "num_bytes": done.num_bytes, "note": note})
            return
        if note:
            print(note)
        checked = {f["verified"] for f in done.files}
        print(
            f"{len(done.files)} of {done.num_offered} files, {human(done.num_bytes)}B, verified by {', '.join(sorted(checked))}; "
            f"{human(done.fetched_bytes)}B of them fetched now"
        )
        print(f"next: nanoladder data --source {done.folder} --storage {self.storage} --vocab-size 32768")

    def fetch_chat(self, repositories: tuple[str, ...]) -> None:
        """Chat and evaluation sets, each whole."""
        from nanoladder.task_data import fetch_chat_dataset

        of_text = [n for n in ("for_plan", "depth", "tokens", "out") if getattr(self, n) not in (None, "")]
        of_text += ["shards"] if self.shards else []
        if of_text:
            flag = f"--{of_text[0].replace('_', '-')}"
            raise ConfigError(f"{flag} is for data sets of text, {self.dataset} comes whole into --tasks-dir; leave it out")
        if self.revision and len(repositories) > 1:
            number = len(repositories)
            raise ConfigError(f"revision {self.revision!r} is of one data set, {self.dataset} is {number}; fetch that one alone")
        found = []
        for repository in repositories:
            with transfer_bar(quiet=self.json) as progress:
                done = fetch_chat_dataset(
                    repository,
                    Path(self.tasks_dir),
                    revision=self.revision,
                    endpoint=self.endpoint,
                    workers=self.workers,
                    check=self.check,
                    progress=progress,
                )
            found.append({**asdict(done), "num_bytes": done.num_bytes})
            if not self.json:
                fetched, number = human(done.fetched_bytes), len(done.files)
                files = "1 file" if number == 1 else f"{number} files"
                print(f"{done.folder}: {files}, {human(done.num_bytes)}B, verified; {fetched}B of them fetched now")
        if self.json:
            print_json({"tasks_dir": self.tasks_dir, "datasets": found})
        else:
            print(f"next: nanoladder sft --checkpoint RUN --tasks-dir {self.tasks_dir} --conversations nanochat")

    def wanted_bytes(self) -> float | None:
        """Bytes of training text that are needed; None where a number of files was given."""
        from nanoladder.shards_needed import bytes_for_depth, bytes_for_plan, bytes_for_tokens

        given = [n for n in ("shards", "for_plan", "depth", "tokens") if getattr(self, n) not in (None, "")]
        if len(given) != 1:
            raise ConfigError(
                f"{len(given)} of --shards, --for-plan, --depth, --tokens are given; give exactly one, for example --shards 170"
            )
        if self.for_plan:
            return bytes_for_plan(Path(self.for_plan))
        if self.depth is not None:
            return bytes_for_depth(self.depth)
        if self.tokens is not None:
            return bytes_for_tokens(self.tokens)
        if self.shards is not None and self.shards < 0:
            raise ConfigError(f"shards {self.shards} must be 0 (all) or more")
        return None


@dataclass(frozen=True, kw_only=True)
class DataMirror:
    """Serve a folder of owner/name/*.parquet with the hub's API, for machines that cannot reach the hub. Ctrl-C ends it.

    Example: nanoladder data mirror --root /data/hub --port 8808

    To try things without a network: nanoladder data mirror --root /tmp/hub --make local/stdlib --source stdlib --num-shards 8
    """

    root: str
    """Folder with owner/name/*.parquet below it."""
    host: str = "127.0.0.1"
    port: int = 8808
    """0 takes a free one."""
    make: str = ""
    """owner/name of a data set to make first, from --source."""
    source: str = "stdlib"
    """With --make: stdlib, site-packages, or a file or folder of parquet or jsonl with a `text` column."""
    num_shards: int = 8
    """With --make: files to deal its documents into."""
    json: Annotated[bool, tyro.conf.arg(help="Print address and data sets as one JSON object once it answers.")] = False

    def run(self) -> None:
        from nanoladder.mirror import Mirror, write_parquet_shards

        tell = partial(print, file=sys.stderr if self.json else sys.stdout, flush=True)
        if self.make:
            if self.make.count("/") != 1:
                raise ConfigError(f"make {self.make!r} must be owner/name, for example local/stdlib")
            paths = write_parquet_shards(self.source, Path(self.root) / self.make, self.num_shards)
            tell(f"{self.make}: {len(paths)} files, {human(sum(p.stat().st_size for p in paths))}B")
        with Mirror(self.root, host=self.host, port=self.port) as server:
            names = server.datasets()
            if not names:
                raise ConfigError(f"{self.root} holds no owner/name/*.parquet; put some there, or give --make owner/name")
            if self.json:
                print_json({"endpoint": server.endpoint, "datasets": names})
                sys.stdout.flush()  # whoever started it waits for this
            tell(f"mirror of {', '.join(names)} at {server.endpoint}; Ctrl-C ends it")
            tell(f"try: nanoladder data download --dataset {names[0]} --shards 0 --endpoint {server.endpoint}")
            try:
                server.serve_forever()
            except KeyboardInterrupt:
                tell("")


class Rate:
    """Bytes a second over the last half minute."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen: deque[tuple[float, int]] = deque()

    def add(self, done: int) -> None:
        now = self._clock()
        self._seen.append((now, done))
        while len(self._seen) > 2 and now - self._seen[0][0] > RATE_WINDOW_SECONDS:
            self._seen.popleft()

    @property
    def per_second(self) -> float | None:
        if len(self._seen) < 2:
            return None
        (t0, b0), (t1, b1) = self._seen[0], self._seen[-1]
        return (b1 - b0) / (t1 - t0) if t1 > t0 and b1 > b0 else None


def state_text(state: State, rate: float | None) -> str:
    """ "12 of 170 files, 1.2GB of 17GB, 85MB/s, 3 min left"."""
    parts = [f"{state.done_files} of {state.total_files} files", f"{human(state.done_bytes)}B of {human(state.total_bytes)}B"]
    if rate:
        parts += [f"{human(rate)}B/s", f"{duration((state.total_bytes - state.done_bytes) / rate)} left"]
    return ", ".join([*parts, *([state.note] if state.note else [])])


@contextmanager
def transfer_bar(*, quiet: bool = False) -> Iterator[Callable[[State], None] | None]:
    """A bar with rate and time left on a terminal, a line every 15 s in a log."""
    if quiet:
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    rate, console = Rate(), Console(highlight=False)
    if not console.is_terminal:
        yield log_lines(rate)
        return
    with Progress(BarColumn(bar_width=24), TextColumn("{task.description}"), TimeElapsedColumn(), console=console) as bar:
        task = bar.add_task("asking for the list of files", total=None)

        def show(state: State) -> None:
            rate.add(state.done_bytes)
            text = state_text(state, rate.per_second)
            bar.update(task, completed=state.done_bytes, total=state.total_bytes, description=text)

        yield show


def log_lines(rate: Rate, say: Callable[[str], None] = print) -> Callable[[State], None]:
    last = [time.monotonic()]

    def show(state: State) -> None:
        rate.add(state.done_bytes)
        if time.monotonic() - last[0] >= LOG_EVERY_SECONDS:
            last[0] = time.monotonic()
            say(state_text(state, rate.per_second))

    return show
