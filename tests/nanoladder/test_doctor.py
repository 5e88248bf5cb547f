"""The doctor on this machine: what is measured is measured, and what is wrong is said with what helps."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nanoladder import doctor_device, doctor_system
from nanoladder.cli import run
from nanoladder.collective_probe import NUM_FLOATS, collect, measure_here
from nanoladder.doctor import Examination, examine, ok, warning, worst
from nanoladder.doctor_cluster import _clocks, _same, outside


def test_this_machine_is_examined_and_json_says_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = run(["doctor", "--storage", str(tmp_path), "--quick", "--json"])
    facts = json.loads(capsys.readouterr().out)
    (here,) = facts["examinations"]
    checks = {f["check"] for f in here["findings"]}
    assert {"python", "memory", "disk", "shared memory", "open files", "ports", "token", "clock", "devices"} < checks
    assert {"attention", "bf16", "fp8"} < checks and "collectives" not in checks
    assert not [f for f in here["findings"] if "itself broke" in f["text"]]
    assert all(bool(f["remedy"]) == (f["severity"] != "ok") for f in here["findings"])
    assert status == (1 if facts["worst"] == "error" else 0)


def test_two_ranks_measure_their_bandwidth() -> None:
    result = measure_here("gloo", 2)
    assert result["num_bytes"] == 4 * NUM_FLOATS and result["bytes_per_second"] > 1e6 and 0 < result["seconds_small"] < 10


def test_ranks_that_cannot_start_say_why() -> None:
    rank = subprocess.Popen([sys.executable, "-c", "import sys; sys.exit('no route')"], stdout=-1, stderr=-1, text=True)
    with pytest.raises(RuntimeError, match="no route"):
        collect([rank])


def test_a_token_for_everybody_is_an_error_and_a_missing_one_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    path = tmp_path / "token"
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(path))
    assert [f.severity for f in doctor_system.token()] == ["warning"]
    path.write_text("x" * 64)
    path.chmod(0o644)
    (found,) = doctor_system.token()
    assert (found.severity, found.remedy) == ("error", f"chmod 600 {path}")
    path.chmod(0o600)
    assert [f.severity for f in doctor_system.token()] == ["warning"], "private, but Ray was not told to ask for it"
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    assert [f.severity for f in doctor_system.token()] == ["ok"]


def test_ports_open_to_the_outside_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as inside, socket.socket() as outside_:
        for s, host in ((inside, "127.0.0.1"), (outside_, "0.0.0.0")):
            s.bind((host, 0))
            s.listen()
        numbers = {s: s.getsockname()[1] for s in (inside, outside_)}
        found = doctor_system.listening_ports()
        assert (numbers[inside], False) in found and (numbers[outside_], True) in found
    monkeypatch.setattr(doctor_system, "listening_ports", lambda: {(8265, True), (6379, True), (10001, False)})
    assert [f.severity for f in doctor_system.ports()] == ["error", "warning"]


def test_a_full_disk_and_a_foreign_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_system, "DISK_WARNING_BYTES", 1e18)
    monkeypatch.setattr(doctor_system, "DISK_ERROR_BYTES", 1e18)
    assert {f.severity for f in doctor_system.disk(str(tmp_path / "not" / "yet"))} == {"error"}
    monkeypatch.setenv("PATH", str(tmp_path))
    assert [f.severity for f in doctor_system.python()] == ["ok", "warning"]


def test_a_build_of_torch_that_does_not_fit_the_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has what the test takes away")
    for vendor, index in (("nvidia", "cu130"), ("amd", "rocm")):
        monkeypatch.setattr(doctor_device, "vendors", lambda vendor=vendor: {vendor: "1.2"})
        (found,) = doctor_device.devices()
        assert found.severity == "error" and "sees no GPU" in found.text and index in found.remedy


def test_a_kernel_that_differs_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from nanochat_model import attention_backends

    kernels = attention_backends.KERNELS | {"sdpa": lambda kind, dtype: lambda q, k, v, window: q * 1.5}
    monkeypatch.setattr(attention_backends, "KERNELS", kernels)
    (found,) = doctor_device.attention()
    assert found.severity == "error" and "do not use sdpa" in found.remedy and found.facts["agree"] == ["blocked"]
    assert doctor_device.relative_error(torch.tensor([1.0, 2.2]), torch.tensor([1.0, 2.0])) == pytest.approx(0.1)


def test_a_check_that_breaks_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_system, "memory", lambda: 1 / 0)
    monkeypatch.setattr(doctor_device, "attention", lambda: [])
    found = examine(measure=False)
    assert any(f.severity == "error" and "ZeroDivisionError" in f.text for f in found.findings) and worst([found]) == "error"
    assert Examination.from_dict(json.loads(json.dumps(found.as_dict()))) == found


def test_nodes_are_compared() -> None:
    nodes = [Examination(node=n, findings=(ok("python", "", python="3.11", ray=r, torch="2.13.0+x"),)) for n, r in ("a1", "b2")]
    (found,) = _same(nodes)
    assert found.severity == "error" and "ray is 1 and 2" in found.text and "torch" not in found.text
    assert _same(nodes[:1])[0].severity == "ok"
    assert outside(100.0, 101.0, asked=103.0, answered=105.0) == 3.0 and outside(104.0, 104.5, asked=103.0, answered=105.0) == 0.0
    assert outside(109.0, 110.0, asked=103.0, answered=105.0) == 5.0
    assert [f.severity for f in _clocks({"a": 0.0, "b": 3.0})] == ["warning"] and [f.severity for f in _clocks({"a": 0.1})] == [
        "ok"
    ]
    assert worst([Examination(node="x", findings=(ok("a", "b"), warning("c", "d", "e")))]) == "warning"
