"""Kernels are compiled once, however many processes want them."""

import os
import subprocess
import sys
from pathlib import Path

COMPILER = """#!/bin/sh
[ "$1" = --version ] && exec echo "cc 1"
echo compiled >> "$COMPILED"
sleep 0.5
while [ "$1" != -o ]; do shift; done
echo library > "$2"
"""
CODE = "import sys; from nanochat_model.native.build import _library; print(_library(sys.argv[1]))"


def test_processes_that_start_at_once_compile_once(tmp_path: Path) -> None:
    compiler, compiled = tmp_path / "cc", tmp_path / "compiled"
    compiler.write_text(COMPILER)
    compiler.chmod(0o755)
    env = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache"), "COMPILED": str(compiled)}
    command = [sys.executable, "-c", CODE, str(compiler)]
    processes = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    paths = {p.communicate(timeout=300)[0].strip() for p in processes}
    assert compiled.read_text() == "compiled\n"
    assert len(paths) == 1 and Path(paths.pop()).read_text() == "library\n"
