"""Text files that are replaced whole."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from analysis.errors import DataError


def write_atomic(path: Path, text: str) -> None:
    """A reader, or a crash, sees the old file or the new, never a part. DataError for a path that cannot be written."""
    temporary = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fd, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(fd, "w", encoding="utf8") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException as e:
        if temporary:
            Path(temporary).unlink(missing_ok=True)
        if isinstance(e, OSError):
            raise DataError(f"{path}: cannot be written ({e.strerror or e}); give another path") from None
        raise
