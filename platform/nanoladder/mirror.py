"""A small mirror of data sets for machines without a way to the hub: a folder of parquet served with the hub's own API.

`root/<owner>/<name>/*.parquet`. It answers what `huggingface_hub` asks about data sets: information, the list of files with
size and SHA-256, and the files themselves with byte ranges. Read-only, no accounts: keep it on a private network.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from nanochat_model.artifacts import sha256_file
from nanochat_model.errors import ConfigError
from nanochat_model.identity import content_hash

PAGE_FILES = 1000  # files in one page of the list, as on the hub
ROW_GROUP_DOCS = 1000
_INFO = re.compile(r"^/api/datasets/([^/]+/[^/]+?)(?:/revision/([^/]+))?$")
_TREE = re.compile(r"^/api/datasets/([^/]+/[^/]+)/tree/([^/]+)/?$")
_FILE = re.compile(r"^/datasets/([^/]+/[^/]+)/resolve/([^/]+)/(.+)$")


class Mirror(ThreadingHTTPServer):
    """Serves `root`. Port 0 takes a free one; `endpoint` is what --endpoint or HF_ENDPOINT wants."""

    daemon_threads = True
    page_files = PAGE_FILES

    def __init__(self, root: str | Path, *, host: str = "127.0.0.1", port: int = 0, handler: type | None = None) -> None:
        self.root = Path(root).resolve()
        if not self.root.is_dir():
            raise ConfigError(f"mirror folder {root} does not exist; give one with owner/name/*.parquet below it")
        super().__init__((host, port), handler or MirrorHandler)
        self._hashes: dict[tuple[str, int, int], str] = {}
        self._lock = threading.Lock()

    @property
    def endpoint(self) -> str:
        host, port = self.server_address[:2]
        return f"http://{host!s}:{port}"

    def datasets(self) -> list[str]:
        return sorted({"/".join(p.relative_to(self.root).parts[:2]) for p in self.root.glob("*/*/**/*.parquet")})

    def files(self, dataset: str) -> list[dict[str, Any]]:
        """Path, size and SHA-256 of a data set's files; ConfigError when there is none of that name."""
        folder = self.folder(dataset)
        found = []
        for path in sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".")):
            found.append({"path": path.relative_to(folder).as_posix(), "size": path.stat().st_size, "sha256": self.sha256(path)})
        return found

    def folder(self, dataset: str) -> Path:
        folder = (self.root / dataset).resolve()
        if not folder.is_relative_to(self.root) or not folder.is_dir():
            raise ConfigError(f"no data set {dataset}")
        return folder

    def sha256(self, path: Path) -> str:
        stat = path.stat()
        key = (str(path), stat.st_size, stat.st_mtime_ns)
        with self._lock:
            if key not in self._hashes:
                self._hashes[key] = sha256_file(path)
            return self._hashes[key]

    def commit(self, dataset: str) -> str:
        """A name for the present content, as long as git's."""
        digest = content_hash([[f["path"], f["sha256"]] for f in self.files(dataset)])
        return (digest * 3)[:40]


class MirrorHandler(BaseHTTPRequestHandler):
    """One request. Subclasses may override `send_file` or `allowed`."""

    protocol_version = "HTTP/1.1"
    server: Mirror

    def do_GET(self) -> None:
        self.answer(body=True)

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def answer(self, *, body: bool) -> None:
        url = urlsplit(self.path)
        path = unquote(url.path)
        if not self.allowed(path):
            return
        try:
            if match := _FILE.match(path):
                self.file(match[1], match[3], body=body)
            elif match := _TREE.match(path):
                self.tree(match[1], parse_qs(url.query))
            elif match := _INFO.match(path):
                self.json({"id": match[1], "sha": self.server.commit(match[1]), "private": False, "tags": [], "downloads": 0})
            else:
                self.refuse(HTTPStatus.NOT_FOUND)
        except ConfigError:
            self.refuse(HTTPStatus.NOT_FOUND)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def allowed(self, path: str) -> bool:
        return True

    def tree(self, dataset: str, query: dict[str, list[str]]) -> None:
        files, size, cursor = self.server.files(dataset), self.server.page_files, query.get("cursor", ["0"])[0]
        if not cursor.isdecimal():
            self.refuse(HTTPStatus.BAD_REQUEST)
            return
        start = int(cursor)
        page = [
            {
                "type": "file", "path": f["path"], "size": f["size"], "oid": f["sha256"][:40],
                "lfs": {"oid": f["sha256"], "size": f["size"], "pointerSize": 134},
            } for f in files[start : start + size]
        ]  # fmt: skip
        more = {}
        if start + size < len(files):
            address = f"{self.server.endpoint}{urlsplit(self.path).path}?recursive=true&cursor={start + size}"
            more = {"Link": f'<{address}>; rel="next"'}
        self.json(page, more)

    def file(self, dataset: str, name: str, *, body: bool) -> None:
        folder = self.server.folder(dataset)
        path = (folder / name).resolve()
        if not path.is_relative_to(folder) or not path.is_file():
            self.refuse(HTTPStatus.NOT_FOUND)
            return
        size, etag = path.stat().st_size, f'"{self.server.sha256(path)}"'
        start = self.range_start(size, etag)
        if start is None:
            self.refuse(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE)
            return
        self.send_response(HTTPStatus.PARTIAL_CONTENT if start else HTTPStatus.OK)
        headers = {
            "Content-Type": "application/octet-stream", "Content-Length": str(size - start), "Accept-Ranges": "bytes",
            "ETag": etag, "X-Linked-Etag": etag, "X-Linked-Size": str(size), "X-Repo-Commit": self.server.commit(dataset),
        }  # fmt: skip
        if start:
            headers["Content-Range"] = f"bytes {start}-{size - 1}/{size}"
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.send_file(path, start)

    def range_start(self, size: int, etag: str) -> int | None:
        """First byte wanted; None where the range is none of this file's."""
        match = re.match(r"^bytes=(\d+)-$", self.headers.get("Range", ""))
        if not match or self.headers.get("If-Range", etag) != etag:
            return 0
        return int(match[1]) if int(match[1]) < size else None

    def send_file(self, path: Path, start: int) -> None:
        with path.open("rb") as f:
            f.seek(start)
            while chunk := f.read(1 << 20):
                self.wfile.write(chunk)

    def json(self, value: Any, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(value).encode()
        self.send_response(HTTPStatus.OK)
        for key, text in {"Content-Type": "application/json", "Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def refuse(self, status: HTTPStatus, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, text in {"Content-Length": "0", **(headers or {})}.items():
            self.send_header(key, text)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Silent: a log line a request helps nobody here."""


def write_parquet_shards(source: str, folder: Path, num_shards: int) -> list[Path]:
    """The documents of a source (stdlib, site-packages, or files) dealt into `num_shards` parquet files of one column `text`.

    Files that are there already stay. Raises ConfigError on a source that is missing or smaller than that.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    paths = [folder / f"shard_{i:05d}.parquet" for i in range(num_shards)]
    if all(p.is_file() for p in paths):
        return paths
    folder.mkdir(parents=True, exist_ok=True)
    texts = [t for t in _texts(source) if t]
    if len(texts) < num_shards:
        raise ConfigError(f"source {source!r} holds {len(texts)} documents, fewer than {num_shards} shards; ask for fewer")
    for i, path in enumerate(paths):
        partial = path.with_name(f".{path.name}")
        pq.write_table(pa.table({"text": texts[i::num_shards]}), partial, compression="zstd", row_group_size=ROW_GROUP_DOCS)
        partial.rename(path)
    return paths


def _texts(source: str) -> Iterator[str | None]:
    from nanochat_model.sources import list_source, read_texts

    for file in list_source(source):
        yield from read_texts(source, file)
