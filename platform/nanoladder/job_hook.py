"""Lets `ray job submit sweeps/wd_d20.py`, typed as it is, ship the code of the current folder.

Ray calls what RAY_JOB_SUBMIT_HOOK names before it submits. With

    export RAY_JOB_SUBMIT_HOOK=nanoladder.job_hook.ship_this_folder

a submission from a folder with a runtime_env.yaml, and without a runtime environment of its own, gets that file.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RUNTIME_ENV_FILE = "runtime_env.yaml"


def ship_this_folder(
    *,
    entrypoint: Sequence[str],
    runtime_env: str | None = None,
    runtime_env_json: str | None = None,
    working_dir: str | None = None,
    metadata_json: Any = None,
    **_: Any,
) -> None:
    """Run the same `ray job submit` again with the runtime environment of this folder; returns where there is nothing to add."""
    if runtime_env or runtime_env_json or working_dir or not Path(RUNTIME_ENV_FILE).is_file():
        return
    check_runs_alone(entrypoint[0])
    added = ["--runtime-env", RUNTIME_ENV_FILE]
    if metadata_json is None:
        file = next((part for part in entrypoint if part.endswith(".py")), entrypoint[0])
        added += ["--metadata-json", json.dumps({"job_name": Path(file).stem, "sweep_file": file})]
    os.execv(sys.executable, [sys.executable, *with_options(sys.argv, added)])


def check_runs_alone(file: str) -> None:
    """End with one line where a sweep file is the entry point and a shell, which Ray hands it to, could not run it."""
    path = Path(file)
    if path.suffix != ".py" or not path.is_file():
        return
    missing = [] if os.access(path, os.X_OK) else [f"its run bit (chmod +x {file})"]
    if not path.read_bytes().startswith(b"#!"):
        missing.append("the first line #!/usr/bin/env python3")
    if missing:
        sys.exit(f"error: {file} lacks {' and '.join(missing)}, and Ray hands it to a shell; add that, or submit: -- python {file}")


def with_options(argv: Sequence[str], options: Sequence[str]) -> list[str]:
    """`ray … job submit …` with `options` right after `submit`."""
    at = list(argv).index("submit") + 1
    return [*argv[:at], *options, *argv[at:]]
