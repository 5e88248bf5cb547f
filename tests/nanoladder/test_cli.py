"""The command line: quick to start, strict with what it is given, one line and status 2 for a user's mistake."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from nanochat_model.config import TrainConfig
from nanochat_model.counts import count_params
from nanochat_model.identity import run_id
from nanochat_model.overrides import parse_overrides
from nanochat_model.record import RunRecord
from nanoladder.cli import COMMANDS, run
from nanoladder.cli.common import human, together


def call(*args: str, **kwargs) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from nanoladder.cli import main; main()", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **kwargs)


def make_record(seed: int = 0) -> RunRecord:
    config = TrainConfig(seed=seed)
    return RunRecord(
        run_id=run_id(config),
        status="complete",
        sweep="s",
        config=config,
        seed=seed,
        params=count_params(config.model).as_dict(),
        num_tokens=config.num_tokens,
        flops_per_token=1,
        train_flops=1e18,
        val_bpb=0.9 + seed / 100,
    )


def test_help_lists_every_command_and_is_quick(capsys) -> None:
    assert run(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in COMMANDS)
    assert imported("--help") == set()


def imported(*args: str) -> set[str]:
    """The packages a command's process has imported of those that take long."""
    slow = {"torch", "ray", "mlflow", "optuna", "pandas", "scipy", "numpy", "plotly", "pyarrow", "tokenizers", "rich", "tyro"}
    code = f"import sys\nfrom nanoladder.cli import run\nrun(sys.argv[1:])\nprint(*({slow} & set(sys.modules)), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, timeout=300, check=True)
    return set(done.stderr.split())


def test_count_is_quick() -> None:
    assert imported("count", "--depth", "24", "--json") <= {"tyro", "rich"}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example(name: str, capsys) -> None:
    with pytest.raises(SystemExit) as leave:
        sys.exit(run([name, "--help"]))
    assert leave.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert f"Example: nanoladder {name} " in text


def test_the_readme_has_a_row_for_every_command() -> None:
    text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf8")
    rows = text.split("## Commands")[1].split("\n## ")[0].splitlines()
    named = [span for row in rows if row.startswith("| `") for span in re.findall("`(.+?)`", row.split("|")[1])]
    commands = [span.removeprefix("nanoladder ") for span in named]
    missing = [name for name in COMMANDS if not any(f"{c} ".startswith(f"{name} ") for c in commands)]
    assert missing == [], "these have no row in README.md"
    unknown = [c for c in commands if not any(f"{c} ".startswith(f"{name} ") for name in COMMANDS)]
    assert unknown == [], "these rows name no command"


def test_tests_that_the_documents_name_exist() -> None:
    root = Path(__file__).parents[2]
    names = {n for d in (root / "docs").glob("*.md") for n in re.findall(r"`(test_\w+)…?(?:\.py)?`", d.read_text(encoding="utf8"))}
    files = list((root / "tests").rglob("test_*.py"))
    known = [p.stem for p in files] + re.findall(r"^def (test_\w+)", "\n".join(p.read_text() for p in files), re.MULTILINE)
    assert names and [n for n in names if not any(k.startswith(n) for k in known)] == []


def test_count_json(capsys) -> None:
    assert run(["count", "--depth", "24", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["total"] == 1_384_122_122
    assert facts["transformer_matrices"] == 679_478_976
    assert facts["scaling"] == 729_810_624
    assert run(["count", "--depth", "12", "--vocab-size", "65536", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["older_total"] == 185_597_952


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["cout"], "unknown command 'cout'; did you mean 'count'?"),
        (["count", "--depth", "0"], "depth 0 must be at least 1"),
        (["plan", "--depth", "12", "--set", "optimizer.matrx_lr=1"], "did you mean 'optimizer.matrix_lr'?"),
        (["plan", "--depth", "12", "--set", "batch_tokens"], "override 'batch_tokens' is not of the form key=value"),
        (["plan", "--depth", "12", "--set", "batch_tokens=500000"], "not a multiple of sequence_len 2048; nearest: 499712"),
        (["plan", "--depth", "12", "--num-devices", "3"], "does not divide over 3 devices"),
        (["plan", "--depth", "12", "--device", "tpu", "--mfu", "0.4"], "is not in the table of peaks"),
        (["plan", "--depth", "12", "--budget-hours", "4"], "both fix the size"),
        (["plan", "--depth", "12", "--network-gbits", "0"], "network of 0 Gb/s must be over 0"),
        (["plan", "--depth", "12", "--devices-per-node", "0"], "devices_per_node 0 must be at least 1"),
        (["plan"], "nothing says how large the run is; give --depth, --flops"),
        (["plan", "--target-bpb", "0.7"], "needs fitted laws"),
        (["plan", "--depth", "12", "--without-law", "gravity"], "law 'gravity' is unknown"),
        (["plan", "--depth", "12", "--laws", "/nowhere/laws.json"], "/nowhere/laws.json"),
        (["tokenizer", "--storage", "/nowhere", "text"], "/nowhere/tokenizer"),
        (["train", "--storage", "/nowhere"], "no token shards at /nowhere/shards"),
        (["data", "--source", "/nowhere", "--storage", "/nowhere/s"], "/nowhere"),
        (["fit", "/nowhere.csv"], "no table or folder at /nowhere.csv"),
        (["fit", "--storage", "/nowhere"], "no run records under /nowhere/runs"),
        (["fit"], "no runs were named"),
        (["fit", "runs.csv", "--n-boot", "-5"], "n_boot -5 must be over 0"),
        (["fit", "runs.csv", "--target-flops", "nan"], "target_flops nan must be over 0"),
        (["runs", "--limit", "-2"], "limit -2 must be 0"),
        (["data", "--storage", "/dev/null"], "/dev/null"),
        (["data", "--storage", "/nowhere", "--vocab-size", "100"], "vocab_size 100 is under 265"),
        (["sync", "--storage", "/nowhere"], "no runs under /nowhere"),
        (["launch", "--depth", "12", "--storage", "/nowhere", "--json"], "no token shards under /nowhere; build them with"),
        (["sweep", "/nowhere.py"], "/nowhere.py"),
        (["chat", "--checkpoint", "/nowhere"], "/nowhere"),
        (["import-nanochat", "/nowhere", "--out", "/nowhere/out"], "/nowhere"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(args: list[str], message: str, capsys) -> None:
    assert run(args) == 2
    out, err = capsys.readouterr()
    assert err.startswith("nanoladder: error: ") and err.count("\n") == 1, err
    assert message in err
    assert not out.strip() or args[0] == "data"


def test_unknown_option_exits_2() -> None:
    done = call("count", "--depth", "4", "--vocab", "12")
    assert done.returncode == 2
    assert "--vocab" in done.stderr


def test_overrides_are_strict() -> None:
    assert parse_overrides(["a.b=1", "c=x=y"]) == {"a.b": "1", "c": "x=y"}
    with pytest.raises(ValueError, match="given twice"):
        parse_overrides(["a=1", "a=2"])


def test_runs_lists_records_and_names_broken_ones(tmp_path: Path, capsys) -> None:
    for seed in (1, 0):
        record = make_record(seed)
        record.save(tmp_path / "runs" / record.run_id)
    torn = tmp_path / "runs" / "torn" / "record.json"
    torn.parent.mkdir()
    torn.write_text('{"schema_version": 1, "run_id"')
    assert run(["runs", "--storage", str(tmp_path), "--json"]) == 1
    out, err = capsys.readouterr()
    facts = json.loads(out)
    assert [r["val_bpb"] for r in facts["runs"]] == [0.9, 0.91]
    assert len(facts["broken"]) == 1 and "torn/record.json: not valid JSON" in err
    assert torn.read_text() == '{"schema_version": 1, "run_id"', "a broken record is left as it is"
    assert run(["runs", "--storage", str(tmp_path), "--limit", "1"]) == 1
    assert "0.9000" in capsys.readouterr().out
    timed = {"step_seconds": {"data": 0.1, "compute": 0.6, "wait": 0.3}, "rank_compute_seconds": (0.5, 0.75)}
    replace(make_record(0), **timed, startup_seconds={"process": 2.0, "build": 0.5}).save(tmp_path / "runs" / make_record(0).run_id)
    assert run(["runs", "--storage", str(tmp_path), "--times", "--limit", "1"]) == 1
    out = capsys.readouterr().out
    assert all(text in out for text in ("10%", "60%", "30%", "1 (+50%)", "2.5 s")), out
    assert run(["runs", "--storage", str(tmp_path), "--sort", "bpb"]) == 2
    assert run(["runs", "--storage", str(tmp_path), "--sort", "step_seconds"]) == 2


def test_runs_of_a_sweep_hold_those_that_it_shares_with_another(tmp_path: Path, capsys) -> None:
    for record in (make_record(0), replace(make_record(1), tags={"sweeps": "s,other"})):
        record.save(tmp_path / "runs" / record.run_id)
    assert run(["runs", "--storage", str(tmp_path), "--sweep", "other", "--json"]) == 0
    assert [r["val_bpb"] for r in json.loads(capsys.readouterr().out)["runs"]] == [0.91]


def test_ctrl_c_is_one_line_and_130(monkeypatch, capsys) -> None:
    from nanoladder.cli import count

    def interrupt(self) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(count.Count, "run", interrupt)
    assert run(["count", "--depth", "4"]) == 130
    assert capsys.readouterr().err == "\nnanoladder count: interrupted; run it again to go on\n"


def test_an_option_of_several_values_may_be_given_several_times(capsys) -> None:
    assert together(["--set", "a=1", "--yes", "--set=b=2", "--set", "c=3", "d=4", "--until", "x"]) == [
        "--set", "a=1", "b=2", "c=3", "d=4", "--yes", "--until", "x",
    ]  # fmt: skip
    assert together(["file", "--json"]) == ["file", "--json"]
    rates = ["--set", "optimizer.matrix_lr=0.03", "--json", "--set", "optimizer.scalar_lr=0.2"]
    assert run(["plan", "--depth", "12", *rates]) == 0
    made = json.loads(capsys.readouterr().out)["config"]["optimizer"]
    assert (made["matrix_lr"], made["scalar_lr"]) == (0.03, 0.2)


def test_a_package_of_an_extra_that_is_not_installed_is_named(monkeypatch, capsys) -> None:
    def absent(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name="torch.nn")

    monkeypatch.setattr("nanoladder.cli.import_module", absent)
    assert run(["chat", "--checkpoint", "x"]) == 2
    assert "nanoladder chat needs torch.nn, which is not installed; pip install 'nanoladder[model]'" in capsys.readouterr().err


def test_closed_pipe_is_no_error() -> None:
    for args, reader, first in (("plan --depth 12 --json", "head -n 1", "{"), ("--help", "true", "")):
        command = f"{sys.executable} -c 'from nanoladder.cli import main; main()' {args} | {reader}"
        done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, timeout=300)
        assert (done.stdout.strip(), done.stderr, done.returncode) == (first, "", 0)


@pytest.mark.parametrize(
    ("value", "text"), [(1234567, "1.23M"), (729_810_624, "730M"), (0.0123, "0.0123"), (None, "–"), (1.6e16, "1.6e+16")]
)
def test_human_numbers(value, text: str) -> None:
    assert human(value) == text
