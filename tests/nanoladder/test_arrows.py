"""Who may import whom. Each import runs in a fresh interpreter, and sys.modules tells what it brought along."""

from __future__ import annotations

import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import analysis
import nanochat_model

ROOT = Path(__file__).parents[2]
HEAVY = {"ray", "optuna", "mlflow"}


def modules_after(code: str) -> set[str]:
    """Top-level modules loaded in a fresh interpreter after `code`."""
    script = f"{code}\nimport sys\nprint('\\n'.join(sorted({{m.split('.')[0] for m in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def all_modules(package) -> list[str]:
    names = [package.__name__]
    names += [m.name for m in pkgutil.walk_packages(package.__path__, package.__name__ + ".") if not m.name.endswith("__main__")]
    return names


def import_all(package) -> str:
    return "\n".join(f"import {name}" for name in all_modules(package))


def test_nanochat_model_needs_no_platform_and_no_analysis() -> None:
    loaded = modules_after(import_all(nanochat_model))
    assert "torch" in loaded, "the whole package was imported"
    assert not loaded & (HEAVY | {"analysis", "nanoladder"})


def test_analysis_needs_no_torch_and_no_model() -> None:
    loaded = modules_after(import_all(analysis))
    assert "scipy" in loaded, "the whole package was imported"
    assert not loaded & (HEAVY | {"torch", "nanochat_model", "nanoladder"})


@pytest.mark.parametrize(
    "code",
    [
        "import nanoladder",
        "from nanoladder import Cell, GPTConfig, Grid, Horizon, LogUniform, Recipe, Sweep",
        "import nanoladder.plan, nanoladder.plan_backwards, nanoladder.laws_to_recipe, nanoladder.workspace",
        "import nanoladder.cli, nanoladder.cli.count, nanoladder.cli.plan, nanoladder.cli.runs, nanoladder.cli.laws",
        "import nanochat_model",
    ],
)
def test_describing_and_planning_is_light(code: str) -> None:
    assert not modules_after(code) & (HEAVY | {"torch", "scipy", "pandas"})


def test_platform_is_the_standard_librarys() -> None:
    """A package named platform would shadow it, and torch and Ray with it."""
    assert not (ROOT / "platform" / "__init__.py").exists()
    code = "import nanoladder, platform, sysconfig; assert platform.__file__.startswith(sysconfig.get_path('stdlib')), platform"
    assert "nanoladder" in modules_after(code)


def test_sweep_files_import_without_effect(tmp_path: Path) -> None:
    files = sorted((ROOT / "sweeps").glob("*.py"))
    assert len(files) >= 7
    code = f"import runpy, os\nos.chdir({str(tmp_path)!r})\n"
    code += "\n".join(f"assert 'SWEEP' in runpy.run_path({str(f)!r}, run_name='imported')" for f in files)
    code += "\nassert os.listdir('.') == []"
    assert not modules_after(code) & {"ray", "mlflow", "torch"}
