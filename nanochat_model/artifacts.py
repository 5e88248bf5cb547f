"""Folders that appear whole or not at all, whoever builds them and whenever they are interrupted."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from nanochat_model.errors import ConfigError

T = TypeVar("T")
Progress = Callable[[int, int], None]  # (bytes of text done, bytes of text in all)


def sha256_file(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def build_folder(
    out_dir: Path,
    identity: str,
    *,
    existing: Callable[[], T | None],
    build: Callable[[Path], None],
    keep_unfinished: bool = False,
) -> T:
    """What `existing()` finds in `out_dir`, after building it when it finds nothing.

    `build` fills a folder beside `out_dir` that is then renamed, so a reader sees all or nothing. Processes that want the
    same thing wait for the first one. `keep_unfinished`: an interrupted build's folder stays for the next call with the same
    `identity` (a short name-safe text) to go on with; otherwise it starts empty.
    """
    found = existing()
    if found is not None:
        return found
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    work = out_dir.parent / f".{out_dir.name}.building-{identity}"
    lock = _lock_folder(work)
    try:
        found = existing()  # another process may have finished it while this one waited
        if found is None:
            if not keep_unfinished:
                _empty(work)
            build(work)
            os.replace(work, out_dir)
            found = existing()
            assert found is not None, f"{out_dir} was built and is not recognised"
        elif work.exists():
            shutil.rmtree(work)
    except BaseException:
        if not keep_unfinished:
            shutil.rmtree(work, ignore_errors=True)
        raise
    finally:
        os.close(lock)
    return found


def _lock_folder(folder: Path) -> int:
    """An open descriptor of `folder` (made if missing) under an exclusive lock that ends with the descriptor or the process."""
    while True:
        folder.mkdir(exist_ok=True)
        try:
            fd = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
        except OSError as e:
            os.close(fd)
            raise ConfigError(
                f"{folder.parent}: its file system has no locks ({e.strerror}), which builds need; build on a local disk and copy"
            ) from None
        if folder.exists() and folder.stat().st_ino == os.fstat(fd).st_ino:
            return fd
        os.close(fd)  # renamed or removed while waiting: that was another build's folder


def _empty(folder: Path) -> None:
    for child in folder.iterdir():
        if child.is_dir():
            shutil.rmtree(child)
        else:
            child.unlink()
