"""One file over HTTP onto this disk, whatever the line does: partial files go on, sizes and checksums are verified.

Plain HTTP with byte ranges, through the client that huggingface_hub configures (proxies, certificates). Several threads share
one `Line`: when the server asks one of them to wait (429), all of them wait.
"""

from __future__ import annotations

import contextlib
import email.utils
import errno
import hashlib
import json
import os
import random
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from nanochat_model.artifacts import sha256_file
from nanochat_model.errors import ConfigError
from nanochat_model.identity import write_atomic

PART, PART_FACTS = ".part", ".part.json"
CHUNK_BYTES = 1 << 20
ASK_TRIES = 5
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
RETRY_STATUS = (408, 425, 429, 500, 502, 503, 504)
Report = Callable[[int], None]  # bytes that arrived; negative: bytes that are thrown away


@dataclass(frozen=True, kw_only=True)
class RemoteFile:
    """A file to fetch and what is known of it. `name`: its path below the folder it goes to; ConfigError for one that leaves it."""

    name: str
    url: str
    size: int | None = None
    sha256: str | None = None
    git_sha1: str | None = None  # of git's blob, where a file is small enough to lie in git itself
    etag: str | None = None

    def __post_init__(self) -> None:
        path = PurePosixPath(self.name)  # a server names it
        if path.is_absolute() or ".." in path.parts:
            raise ConfigError(f"{self.url}: file name {self.name!r} leaves the folder of the download; use another server")


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long to try. Failures count only while nothing arrives between them."""

    max_failures: int = 8
    backoff_seconds: float = 1.0  # doubled each time
    max_backoff_seconds: float = 60.0
    max_retry_after_seconds: float = 900.0
    timeout_seconds: float = 60.0  # without a byte


class Stopped(Exception):
    """The download was told to stop; what arrived is kept."""


class TransferFailed(Exception):
    """This file could not be had; the message says why."""


class Corrupt(Exception):
    """All bytes arrived and are not the right ones."""


@dataclass
class Line:
    """What the transfers of one download share: headers, patience, and when the server may be asked again."""

    headers: Mapping[str, str] = field(default_factory=dict)
    patience: Patience = field(default_factory=Patience)
    stop: threading.Event = field(default_factory=threading.Event)
    clock: Callable[[], float] = time.monotonic
    not_before: float = 0.0
    waits: int = 0  # times the server asked to wait
    cuts: int = 0  # connections that broke
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def hold(self, seconds: float) -> None:
        with self._lock:
            self.not_before = max(self.not_before, self.clock() + seconds)
            self.waits += 1

    def cut(self) -> None:
        with self._lock:
            self.cuts += 1

    def wait_turn(self) -> None:
        while (left := self.not_before - self.clock()) > 0:
            self.sleep(min(left, 1.0))
        self.check()

    def sleep(self, seconds: float) -> None:
        self.stop.wait(seconds)
        self.check()

    def check(self) -> None:
        if self.stop.is_set():
            raise Stopped


def fetch(file: RemoteFile, folder: Path, line: Line, report: Report) -> dict[str, Any]:
    """Bring `file` under `folder`, telling `report` of bytes beyond `part_bytes`; returns {"name", "size", "sha256", "verified"}.

    A `.part` file of the same version is continued. Content that arrives whole and wrong is thrown away and fetched once more.
    Raises TransferFailed (no answer, refused, wrong twice), Stopped, and ConfigError where a token or address is wrong.
    """
    target = folder / file.name
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + PART)
    _drop_other_version(file, part, report)
    for attempt in (1, 2):
        _receive(file, part, line, report)
        try:
            facts = verify(file, part)
        except Corrupt as e:
            report(-part.stat().st_size)
            part.unlink()
            if attempt == 2:
                raise TransferFailed(f"{file.name}: {e}, twice; the copy on the server is damaged") from None
            continue
        os.replace(part, target)
        part.with_name(target.name + PART_FACTS).unlink(missing_ok=True)
        return facts
    raise AssertionError("unreachable")


def verify(file: RemoteFile, path: Path) -> dict[str, Any]:
    """Size and checksum of what lies at `path` against what was announced. Raises Corrupt."""
    size = path.stat().st_size
    if file.size is not None and size != file.size:
        raise Corrupt(f"has {size:,} bytes, announced were {file.size:,}")
    sha256 = sha256_file(path)
    verified = "size" if file.size is not None else "end of the transfer"
    if file.sha256 is not None:
        if sha256 != file.sha256:
            raise Corrupt(f"SHA-256 is {sha256[:16]}…, announced was {file.sha256[:16]}…")
        verified = "sha256"
    elif file.git_sha1 is not None:
        if git_blob_sha1(path) != file.git_sha1:
            raise Corrupt(f"is not git's blob {file.git_sha1[:12]}…")
        verified = "git sha1"
    return {"name": file.name, "size": size, "sha256": sha256, "verified": verified}


def git_blob_sha1(path: Path) -> str:
    """Name that git gives a file's content: SHA-1 over "blob <size>", a zero byte, and the bytes."""
    digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as f:
        while chunk := f.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def part_bytes(name: str, folder: Path) -> int:
    """Bytes of a file that an earlier call left; they count as arrived from the beginning."""
    part = folder / (name + PART)
    return part.stat().st_size if part.exists() else 0


def _drop_other_version(file: RemoteFile, part: Path, report: Report) -> None:
    """A partial file is continued only when it belongs to the same content; otherwise it would be glued to another."""
    facts = {"sha256": file.sha256, "git_sha1": file.git_sha1, "etag": file.etag, "size": file.size}
    path = part.with_name(part.name.removesuffix(PART) + PART_FACTS)
    try:
        same = json.loads(path.read_text(encoding="utf8")) == facts
    except (FileNotFoundError, json.JSONDecodeError):
        same = False
    if not same:
        if part.exists():
            report(-part.stat().st_size)
            part.unlink()
        write_atomic(path, json.dumps(facts))


def _receive(file: RemoteFile, part: Path, line: Line, report: Report) -> None:
    """Append to `part` until it has every byte. Each round that brings something starts the count of failures anew."""
    failures, reason = 0, ""
    while True:
        before = part.stat().st_size if part.exists() else 0
        if file.size is not None and before > file.size:  # longer than announced: it cannot be right
            report(-before)
            part.unlink()
            before = 0
        if before and before == file.size:
            return
        line.wait_turn()
        done, reason, wait = _one_request(file, part, before, line, report)
        if done:
            return
        after = part.stat().st_size if part.exists() else 0
        failures = 0 if after > before else failures + 1
        if failures >= line.patience.max_failures:
            raise TransferFailed(f"{file.name}: {reason}; {failures} attempts brought nothing")
        if wait is not None:
            line.hold(wait)
        elif failures:
            pause = min(line.patience.max_backoff_seconds, line.patience.backoff_seconds * 2 ** (failures - 1))
            line.sleep(pause * random.uniform(0.5, 1.0))


def _one_request(file: RemoteFile, part: Path, have: int, line: Line, report: Report) -> tuple[bool, str, float | None]:
    """One GET from byte `have` on: (everything is here, why not, seconds the server asked to wait)."""
    from huggingface_hub import get_session
    from huggingface_hub.utils import httpx

    headers = {**line.headers, "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
        if file.etag:
            headers["If-Range"] = file.etag
    try:
        with get_session().stream("GET", file.url, headers=headers, timeout=line.patience.timeout_seconds) as response:
            code = response.status_code
            if code in RETRY_STATUS:
                return False, f"HTTP {code}", retry_after(response.headers, line.patience)
            if code == 416:  # nothing from there on: what we have does not fit
                report(-have)
                part.unlink(missing_ok=True)
                return False, "HTTP 416", None
            if code not in (200, 206):
                raise ConfigError(refusal(file.url, code))
            offset = _offset(response, have)
            if offset == 0 and have:
                report(-have)
            _append(response, part, offset, line, report)
            announced = response.headers.get("Content-Length")
            total = offset + int(announced) if announced else None
    except (httpx.TransportError, OSError) as e:
        if isinstance(e, OSError) and e.errno in DISK_ERRORS:
            raise ConfigError(f"{part}: {e.strerror}; make room and start this again, what arrived is kept") from None
        line.cut()
        return False, f"the connection broke ({type(e).__name__})", None
    size = part.stat().st_size
    whole = size >= (file.size if file.size is not None else total or 0)
    return whole, f"{size:,} of {file.size or total or 0:,} bytes arrived", None


def _offset(response: Any, have: int) -> int:
    """Where the bytes of this response begin: 0 when the server ignored the range."""
    if response.status_code == 200:
        return 0
    start = response.headers.get("Content-Range", "").removeprefix("bytes ").partition("-")[0]
    if start != str(have):
        raise ConfigError(f"the server answers a range from byte {have} with one from {start or 'nowhere'}; it cannot resume")
    return have


def _append(response: Any, part: Path, offset: int, line: Line, report: Report) -> None:
    with part.open("r+b" if offset else "wb") as f:
        f.seek(offset)
        f.truncate()
        for chunk in response.iter_bytes():
            f.write(chunk)
            report(len(chunk))
            line.check()


def retry_after(headers: Mapping[str, str], patience: Patience) -> float | None:
    """Seconds of a Retry-After header (a number or a date); None without one. ConfigError where it is beyond all patience."""
    value = headers.get("Retry-After")
    if value is None:
        return None
    seconds = 0.0
    try:
        seconds = float(value)
    except ValueError:
        with contextlib.suppress(ValueError):
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
    if seconds > patience.max_retry_after_seconds:
        raise ConfigError(f"the server asks to come back in {seconds:.0f} s; start this again then, what arrived is kept")
    return max(0.0, seconds)


def refusal(url: str, code: int) -> str:
    """What to do about an answer that no patience mends."""
    remedy = {
        401: "it needs a token: set HF_TOKEN (or log in with `hf auth login`)",
        403: "this token may not read it: accept the data set's terms, or use another token",
        404: "there is no such file; check the name and the revision",
    }.get(code, "look at the address")
    return f"{url}: HTTP {code}; {remedy}"


def ask(question: Callable[[], Any], what: str) -> Any:
    """A short request (of the hub's API), repeated while the server is busy or the line is bad. Raises ConfigError."""
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import httpx

    for attempt in range(ASK_TRIES):
        last = attempt == ASK_TRIES - 1
        try:
            return question()
        except HfHubHTTPError as e:
            code = e.response.status_code
            if code not in RETRY_STATUS or last:
                raise ConfigError(f"{what}: {refusal(str(e.response.url), code)}") from None
            wait = retry_after(e.response.headers, Patience())
            time.sleep(2.0**attempt if wait is None else wait)
        except (httpx.TransportError, OSError) as e:
            if last:
                raise ConfigError(f"{what} does not answer ({type(e).__name__}); check the network, or give a mirror") from None
            time.sleep(0.5 * 2**attempt)
    raise AssertionError("unreachable")


def url_file(url: str) -> RemoteFile:
    """The file at a plain address: size and ETag by HEAD, SHA-256 by the address's own "#sha256=…". Raises ConfigError."""
    from huggingface_hub import get_session

    plain, _, fragment = url.partition("#")
    sha256 = fragment.removeprefix("sha256=") if fragment.startswith("sha256=") else None
    head = ask(lambda: get_session().head(plain, timeout=30), plain)
    known = head.status_code < 400
    if not known and head.status_code not in (405, 501, *RETRY_STATUS):
        raise ConfigError(refusal(plain, head.status_code))
    size = head.headers.get("Content-Length") if known else None
    etag = head.headers.get("ETag") if known and not head.headers.get("ETag", "").startswith("W/") else None
    name = Path(urlsplit(plain).path).name or "file"
    return RemoteFile(name=name, url=plain, size=int(size) if size else None, sha256=sha256, etag=etag)


def fetch_one(url: str, target: Path, *, patience: Patience | None = None) -> Path:
    """One verified file at `target`, or what is there already. Raises ConfigError."""
    if target.is_file():
        return target
    file = replace(url_file(url), name=target.name)
    try:
        fetch(file, target.parent, Line(patience=patience or Patience()), lambda n: None)
    except TransferFailed as e:
        raise ConfigError(f"{url} could not be downloaded ({e}); fetch it elsewhere and give its path") from None
    return target
