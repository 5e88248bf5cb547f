"""One process at a time trains in a run's folder. The kernel drops the lock when its holder dies, however it dies."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import socket
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from nanochat_model.errors import ConfigError

LOCK_FILE = ".lock"
POLL_SECONDS = 0.2
ORPHAN_SECONDS = 120.0  # by which a process whose driver was killed is gone: a node waits a minute before it gives its head up
DATABASES = ".databases"
DATABASES_WAIT_SECONDS = 300.0
START_SECONDS = 3600.0  # from a scratch folder to its lock at the most


def making_databases(folder: Path) -> contextlib.AbstractContextManager[None]:
    """Hold while a database in `folder` is opened: it may be new, and two processes that make its tables at once both fail."""
    return exclusive(folder / DATABASES, f"opening the databases in {folder}", wait_seconds=DATABASES_WAIT_SECONDS)


@contextlib.contextmanager
def exclusive(folder: Path, what: str, *, wait_seconds: float = 0.0) -> Iterator[None]:
    """Hold `folder`/.lock. Waits up to `wait_seconds` for another holder, then raises a ConfigError that names it.

    (A lock of the operating system: it also works between the nodes of an NFSv4 mount, not on object stores.)
    """
    folder.mkdir(parents=True, exist_ok=True)
    fd = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
    deadline = time.monotonic() + wait_seconds
    try:
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    holder = os.pread(fd, 200, 0).decode(errors="replace").strip() or "another process"
                    raise ConfigError(f"{what} is being worked on by {holder}; wait for it or stop it ({folder})") from None
                time.sleep(POLL_SECONDS)
            except OSError as e:
                raise ConfigError(
                    f"{folder}: its file system has no locks ({e.strerror}); choose a folder on one that has"
                ) from None
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        yield
    finally:
        os.close(fd)


def remove_abandoned(folders: Iterable[Path]) -> None:
    """Remove the scratch folders of this machine whose holder (by `exclusive`) is dead, and those that never had one for an hour.

    Process ids would not tell: in another container the same number is another process. What other machines left in a shared
    folder is theirs to remove.
    """
    for folder in folders:
        if not folder.is_symlink() and _is_abandoned(folder):
            shutil.rmtree(folder, ignore_errors=True)


def _is_abandoned(folder: Path) -> bool:
    try:
        fd = os.open(folder / LOCK_FILE, os.O_RDWR)
    except FileNotFoundError:  # begun just now, or its process died in the start
        return folder.is_dir() and time.time() - folder.stat().st_mtime > START_SECONDS
    except OSError:
        return False  # another user's
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.pread(fd, 200, 0).decode(errors="replace").endswith(f" on {socket.gethostname()}")
    except OSError:
        return False  # held, or a file system that cannot tell
    finally:
        os.close(fd)
