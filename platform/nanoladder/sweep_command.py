"""What `python sweeps/wd_d20.py` (or `nanoladder sweep FILE`) does with its arguments."""

from __future__ import annotations

import argparse
import importlib.util
import os
import shlex
import shutil
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from analysis.words import plural
from nanochat_model.errors import ConfigError
from nanochat_model.hardware import require_device
from nanochat_model.overrides import parse_overrides
from nanochat_model.record import RunRecord
from nanochat_model.sft_recipe import SFTRecipe
from nanoladder.job_context import STORAGE_ENV, check_lasting, default_storage
from nanoladder.ladder import Ladder, execute_ladder
from nanoladder.settings import apply_settings
from nanoladder.sft_sweep import SFTSweep
from nanoladder.space import Grid
from nanoladder.stopping import SweepStopped
from nanoladder.storage import mirrored
from nanoladder.sweep import Sweep
from nanoladder.workspace import Workspace

EXAMPLES = """
examples:
  %(prog)s --dry-run                         every trial's N, D, batch, steps, FLOPs, memory and time
  %(prog)s --dry-run --device mi300x --json  the same for that card, for a machine
  %(prog)s --storage runs                    run it here; what is recorded under runs/ is skipped
  %(prog)s --set num_trials=8 --set eval.every_steps=100
  %(prog)s --address auto --storage /shared/runs   on the Ray cluster of this machine's head node

Interrupted, it goes on where it was when the same command is given again.
"""
INTERRUPTED = 130
STOPPED = 3  # by `nanoladder stop`: what is recorded stays, and there is more to do


def run_sweep(sweep: Sweep | Ladder | SFTSweep, argv: Sequence[str] | None = None) -> int:
    """Run a sweep or a ladder as its command line says; returns 0, or exits with 1 (failed runs), 2 (bad input), 3 (ended by
    `nanoladder stop`), 130 (Ctrl-C).

    Called with `argv` it returns the exit status instead of exiting.
    """
    try:
        status = _run(sweep, list(sys.argv[1:] if argv is None else argv))
    except ValueError as e:
        from nanoladder.cli import is_user_error

        if not is_user_error(e):
            raise
        print(f"error: {e}", file=sys.stderr)
        status = 2
    except SweepStopped as e:
        print(e, file=sys.stderr)
        status = STOPPED
    except BrokenPipeError:
        if "--dry-run" not in (sys.argv if argv is None else argv):
            raise
        from nanoladder.cli import leave_pipe

        leave_pipe()
        status = 0
    except KeyboardInterrupt:
        print("\ninterrupted; what is recorded stays, the same command goes on from there", file=sys.stderr)
        status = INTERRUPTED
    if argv is None and status:
        sys.stdout.flush()
        sys.exit(status)
    return status


def load_sweep(path: str | Path) -> Sweep | Ladder | SFTSweep:
    """The Sweep or Ladder that a file defines (as SWEEP or LADDER, or the only one it defines). Importing runs nothing."""
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"no sweep file at {path}; give a Python file that defines SWEEP = Sweep(...)")
    spec = importlib.util.spec_from_file_location(f"sweep_file_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{path} is not a Python file; give one that defines SWEEP = Sweep(...)")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    except ConfigError:
        raise
    except Exception as e:
        raise ConfigError(f"{path} cannot be imported ({type(e).__name__}: {e}); mend it, or give another file") from e
    finally:
        sys.path.remove(str(path.parent))
    found = [v for v in vars(module).values() if isinstance(v, Sweep | Ladder | SFTSweep)]
    for name in ("SWEEP", "LADDER"):
        named = getattr(module, name, None)
        if isinstance(named, Sweep | Ladder | SFTSweep):
            return named
    if len(found) == 1:
        return found[0]
    raise ConfigError(f"{path} defines {len(found)} sweeps and none is named SWEEP; name the one to run SWEEP")


def check_arguments(target: Sweep | Ladder | SFTSweep, argv: list[str]) -> str:
    """Whether `argv` would be taken; nothing runs. Returns the storage given ("": none). Raises ConfigError; exits on an
    unknown option as the sweep itself would."""
    if isinstance(target, SFTSweep):  # its settings are checked where its base and conversations lie
        return str(_parser(target).parse_args(target.parser().parse_known_args(argv)[1]).storage)
    args = _parser(target).parse_args(argv)
    apply_settings(target, parse_overrides(args.set))
    return str(args.storage) if any(a.split("=")[0] == "--storage" for a in argv) else ""


def _run(target: Sweep | Ladder | SFTSweep, argv: list[str]) -> int:
    if isinstance(target, SFTSweep):
        target, argv = target.resolve(argv)
    args = _parser(target).parse_args(argv)
    with mirrored(args.storage):
        return _run_here(target, args)


def _run_here(target: Sweep | Ladder, args: argparse.Namespace) -> int:
    target = apply_settings(target, parse_overrides(args.set))
    workspace = Workspace(args.storage)
    if args.dry_run:
        return _dry_run(target, workspace, args)
    if args.json or args.device:
        given = "--json" if args.json else f"--device {args.device}"
        raise ConfigError(f"{given} goes with --dry-run; what a sweep runs on is set with --set device=…")
    check_lasting(args.storage)
    _end_on_sigterm()
    options: dict[str, Any] = {
        "address": args.address,
        "max_concurrent": args.max_concurrent,
        "num_cpus": args.num_cpus,
        "mlflow_uri": args.mlflow,
    }
    from nanoladder.ray_init import shutdown_ray

    try:
        return _run_ladder(target, workspace, options) if isinstance(target, Ladder) else _run_one(target, workspace, options)
    finally:
        shutdown_ray()


def _parser(target: Sweep | Ladder | SFTSweep) -> argparse.ArgumentParser:
    source = f"\nSource: {target.source}" if target.source else ""
    parser = argparse.ArgumentParser(
        description=f"{target.name}: {target.question}{source}",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would be run and what it costs, and run nothing")
    parser.add_argument("--json", action="store_true", help="with --dry-run: JSON instead of a table")
    parser.add_argument("--device", default="", help="with --dry-run: the device to reckon with, for example h100 or cpu")
    parser.add_argument(
        "--storage", default=default_storage(), metavar="DIR", help=f"root of data, runs and results ({STORAGE_ENV}, else runs)"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change a field of the sweep, or override one of its runs"
    )
    parser.add_argument("--max-concurrent", type=int, metavar="N", help="trials at a time (default: as many as fit)")
    parser.add_argument("--num-cpus", type=int, metavar="N", help="CPUs of the local Ray (default: those of this machine)")
    parser.add_argument("--address", help="Ray cluster to join (default: RAY_ADDRESS, else a Ray of its own)")
    parser.add_argument("--mlflow", metavar="URI", help="tracking server or database; '' for none (default: in the storage root)")
    return parser


def _end_on_sigterm() -> None:
    """A job that is told to end stops as on Ctrl-C: its trials end with it."""

    def stop(signum: int, frame: Any) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)


def _dry_run(target: Sweep | Ladder, workspace: Workspace, args: argparse.Namespace) -> int:
    from nanoladder.cells import check_sweep
    from nanoladder.cli.common import print_json
    from nanoladder.dry_run import plan_sweep, print_plan
    from nanoladder.execute import data_command, recent_records, shards_of

    sweeps = [target] if isinstance(target, Sweep) else [target.stage_sweep(s, target.variants) for s in target.stages]
    built = (workspace.shards_dir / "manifest.json").is_file() or isinstance(sweeps[0].recipe, SFTRecipe)
    recorded = frozenset(p.parent.name for p in workspace.record_paths())
    plans = []
    for sweep in sweeps:
        data = shards_of(sweep, workspace) if built else None
        check_sweep(sweep, data)
        device = args.device or sweep.device or "cpu"
        if device != "cpu":
            require_device(device)
        plans.append(plan_sweep(sweep, device=device, data=data, records=recent_records(workspace), recorded=recorded))
    if args.json:
        print_json([p.as_dict() for p in plans] if isinstance(target, Ladder) else plans[0].as_dict())
        return 0
    for plan in plans:
        print_plan(plan)
    if isinstance(target, Sweep) and target.adaptive is not None:
        a = target.adaptive
        print(f"Then rounds of cells chosen for the {a.quantity} at {a.target_flops:.3g} FLOPs, {a.total_flops:.3g} FLOPs in all.")
    if len(plans) > 1:
        print("Stages after the first get only the candidates that won before: what is shown for them is the most it can be.")
    if not built:
        print(f"No token shards under {workspace.root} yet; build them with: {data_command(sweeps[0], workspace)}")
    return 0


def _run_one(sweep: Sweep, workspace: Workspace, options: dict[str, Any]) -> int:
    from rich.console import Console

    from nanoladder.execute import execute_sweep
    from nanoladder.terminal import TerminalLines, progress_bar

    console = Console(highlight=False)
    with progress_bar(console, sweep.name) as (lines, bar):
        options = {**options, "listeners": [TerminalLines(lines)], "progress": bar}
        if sweep.adaptive is not None:
            from nanoladder.adaptive import execute_adaptive

            records = execute_adaptive(
                sweep, workspace, say=lambda text: lines.print(text, soft_wrap=True, markup=False), **options
            )
        else:
            records = execute_sweep(sweep, workspace, **options)
    return _summary(sweep, workspace, records, options["mlflow_uri"])


def _summary(sweep: Sweep, workspace: Workspace, records: Sequence[RunRecord], mlflow_uri: str | None) -> int:
    from nanoladder.cli.common import print_table
    from nanoladder.front import best_candidates
    from nanoladder.space import format_values
    from nanoladder.sweep_index import INDEX_FILE, read_index

    index = read_index(workspace.sweep_dir(sweep.name))
    rows, winners = [], best_candidates(index)
    for cell, best in winners.items():
        ids = best["run_ids"]
        which = ids[0] if len(ids) == 1 else f"mean of {len(ids)} seeds, {ids[0]} …"
        rows.append((cell, format_values(best["values"]) or "–", f"{best[sweep.metric]:.4f}", which))
    if rows:
        print_table(("cell", "best", sweep.metric, "run"), rows, right=(sweep.metric,))
    edges = [cell for cell, best in winners.items() if _at_edge(sweep, cell, best["values"])]
    if edges and not sweep.extend_edges:
        print(f"best at the end of a grid in {plural(len(edges), 'cell')}: widen it, or let it grow with extend_edges=True")
    if sweep.objectives:
        _print_fronts(sweep, index, workspace.sweep_dir(sweep.name))
    failed = [r for r in records if r.status == "failed"]
    print(f"{len(records)} runs, {len(failed)} failed; index: {workspace.sweep_dir(sweep.name) / INDEX_FILE}")
    print(f"look further: {'   '.join(_where_to_look(workspace, mlflow_uri))}")
    return 1 if failed else 0


def _at_edge(sweep: Sweep, label: str, values: Mapping[str, Any]) -> bool:
    """Whether a value is the first or last of its grid, so that a better one may lie beyond."""
    space = next((sweep.space_of(c) for c in sweep.cells if c.label == label), {})
    grids = {k: d.values for k, d in space.items() if isinstance(d, Grid) and len(d.values) > 1 and k in values}
    return any(values[k] in (min(grid), max(grid)) for k, grid in grids.items())


def _where_to_look(workspace: Workspace, mlflow_uri: str | None) -> list[str]:
    """Commands, ready to paste, that show what was tracked; the address of a tracking server."""
    uri = workspace.mlflow_uri if mlflow_uri is None else mlflow_uri
    is_server = uri.startswith(("http://", "https://"))
    shown = uri if is_server else f"{_tool('mlflow')} ui --backend-store-uri {shlex.quote(uri)}"
    dashboard = _tool("optuna-dashboard")
    missing = "" if shutil.which(dashboard) else "   (first: pip install optuna-dashboard)"
    return [*([shown] if uri else []), f"{dashboard} {shlex.quote(workspace.optuna_uri)}{missing}"]


def _tool(name: str) -> str:
    """The command `name`, with its folder where that is not on the PATH but beside this Python."""
    beside = Path(sys.executable).with_name(name)
    return shlex.quote(str(beside)) if not shutil.which(name) and beside.exists() else name


def _print_fronts(sweep: Sweep, index: dict[str, Any], folder: Path) -> None:
    from nanoladder.cli.common import print_table
    from nanoladder.front import FRONT_FILE, fronts
    from nanoladder.space import format_values

    rows = [
        (cell, format_values(p["values"]), *(f"{p[m]:.4g}" for m in sweep.metrics))
        for cell, points in fronts(index).items()
        for p in points
        if p["on_front"]
    ]
    print_table(("cell", "on the front", *sweep.metrics), rows, right=sweep.metrics)
    print(f"figure of all candidates: {folder / FRONT_FILE}")


def _run_ladder(ladder: Ladder, workspace: Workspace, options: dict[str, Any]) -> int:
    from rich.console import Console
    from rich.markup import escape

    from nanoladder.promote import PROMOTIONS_FILE, rank_correlations
    from nanoladder.terminal import TerminalLines, progress_bar

    console = Console(highlight=False)
    with progress_bar(console, ladder.name) as (lines, bar):
        shown = TerminalLines(lines)
        promotions = execute_ladder(ladder, workspace, listeners=[shown], progress=bar, **options)
    for p in promotions:
        console.print(f"[bold]{escape(p.stage)}[/] {escape(p.change)}: {escape(p.reason)}", soft_wrap=True)
        console.print(f"  [dim]{escape(p.summary)}[/]", soft_wrap=True)
    for row in (r for r in rank_correlations(promotions) if r["spearman"] is not None):
        console.print(
            f"gains of {row['n']} candidates, {escape(' → '.join(row['stages']))}: rank correlation {row['spearman']:+.2f}"
        )
    reached, verdicts = {p.stage for p in promotions}, workspace.sweep_dir(ladder.name) / PROMOTIONS_FILE
    for stage in ladder.stages:
        if stage.name not in reached:
            console.print(f"[bold]{escape(stage.name)}[/] not reached: no candidate won the stage before", soft_wrap=True)
    print(f"{plural(len(shown.failed), 'run')} failed; verdicts: {verdicts}")
    return 1 if shown.failed else 0


__all__ = ["load_sweep", "run_sweep"]

if __name__ == "__main__":
    sys.exit(f"{os.path.basename(__file__)} is run by sweep files; try: python sweeps/wd_d12.py --help")
