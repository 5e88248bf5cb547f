"""A hub that cuts connections, corrupts what it sends, asks to wait, and goes away: our mirror with faults."""

from __future__ import annotations

import threading
from collections import Counter
from http import HTTPStatus
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from nanoladder.mirror import Mirror, MirrorHandler

DATASET = "local/text"


class FaultyHub(Mirror):
    """Faults by file name (its stem): how often they still happen."""

    page_files = 3  # several pages of even a short list

    def __init__(self, root: Path) -> None:
        super().__init__(root, handler=FaultyHandler)
        self.cut_after: dict[str, list[int]] = {}  # bytes after which to close, one a request
        self.corrupt: Counter[str] = Counter()
        self.busy: Counter[str] = Counter()  # answers of 429
        self.retry_after = "0.05"
        self.ranges: dict[str, list[int]] = {}  # first bytes asked for
        self.sent: Counter[str] = Counter()  # bytes
        self.tokens: set[str] = set()
        self.ignore_ranges = False
        self.thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    def __enter__(self) -> FaultyHub:
        self.thread.start()
        return self

    def __exit__(self, *args: object) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that hang up are part of the tests."""


class FaultyHandler(MirrorHandler):
    server: FaultyHub

    def allowed(self, path: str) -> bool:
        name = Path(path).stem
        self.server.tokens.add(self.headers.get("Authorization", ""))
        if self.server.busy[name] > 0:
            self.server.busy[name] -= 1
            self.refuse(HTTPStatus.TOO_MANY_REQUESTS, {"Retry-After": self.server.retry_after})
            return False
        return True

    def range_start(self, size: int, etag: str) -> int | None:
        return 0 if self.server.ignore_ranges else super().range_start(size, etag)

    def send_file(self, path: Path, start: int) -> None:
        name = path.stem
        self.server.ranges.setdefault(name, []).append(start)
        data = path.read_bytes()[start:]
        if self.server.corrupt[name] > 0:
            self.server.corrupt[name] -= 1
            data = bytes([data[0] ^ 1]) + data[1:]
        cuts = self.server.cut_after.get(name)
        if cuts:
            data = data[: cuts.pop(0)]
            self.close_connection = True
        self.server.sent[name] += len(data)
        self.wfile.write(data)


def write_dataset(root: Path, count: int = 5, docs: int = 900) -> list[Path]:
    """`count` parquet files of different sizes at root/local/text, and a file that is none of them."""
    folder = root / DATASET
    folder.mkdir(parents=True)
    (folder / "README.md").write_text("about\n")
    paths = []
    for i in range(count):
        path = folder / f"shard_{i:05d}.parquet"
        texts = [f"shard {i} document {j} " + f"{(i * 7919 + j * 104729) ** 5:x} " * (5 + i + j % 7) for j in range(docs)]
        pq.write_table(pa.table({"text": texts}), path)
        paths.append(path)
    return paths
