"""Which commit of the code made a result, read from .git without starting git."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path


@lru_cache
def git_commit() -> str:
    """Commit hash of the checkout this package lies in; "" when it is installed without one."""
    git = Path(__file__).resolve().parents[1] / ".git"
    try:
        if git.is_file():  # a worktree or a submodule: "gitdir: <folder>", which may be relative to this one
            git = git.parent / git.read_text(encoding="utf8").partition(":")[2].strip()
        head = (git / "HEAD").read_text(encoding="utf8").strip()
        if not head.startswith("ref: "):
            return head
        return _resolve(git, head.removeprefix("ref: "))
    except OSError:
        return ""


def _resolve(git: Path, ref: str) -> str:
    common = git / "commondir"
    shared = (git / common.read_text(encoding="utf8").strip()) if common.is_file() else git
    for folder in (git, shared):
        if (folder / ref).is_file():
            return (folder / ref).read_text(encoding="utf8").strip()
    for line in (shared / "packed-refs").read_text(encoding="utf8").splitlines():
        if line.endswith(f" {ref}"):
            return line.split()[0]
    return ""
