"""What generated code cannot do, with the audit hook and by the kernel alone."""

import os
import tempfile
import time
from functools import partial
from pathlib import Path

import psutil
import pytest

from nanochat_model import sandbox
from nanochat_model.calculator import calculate
from nanochat_model.sandbox import SandboxResult

run_program = partial(sandbox.run_program, timeout_seconds=60)  # on a busy machine Python itself may take its seconds to start
PROBE = run_program("print('hello')")
KERNEL = {"landlock", "seccomp"} <= set(PROBE.guards)


def bare(source: str) -> SandboxResult:
    """Without the audit hook."""
    return run_program(source, audit_hook=False)


def test_a_program_that_ends_well_has_passed() -> None:
    assert PROBE.passed and PROBE.output == "hello\n" and {"rlimits", "audit hook"} <= set(PROBE.guards)
    inside = "import os\nopen('a', 'w').write('x')\nassert open('a').read() == 'x'\nos.remove('a')"
    assert run_program(inside).passed and bare(inside).passed
    threads = "import threading\nt = threading.Thread(target=print, args=(1,))\nt.start()\nt.join()"
    assert run_program(threads).passed


def test_only_the_end_counts_as_passed() -> None:
    assert run_program("assert 1 == 2").outcome == "error"
    assert run_program("import sys; sys.exit(0)").outcome == "ended early"
    assert run_program("import os; os._exit(0)").outcome == "ended early"
    assert "SyntaxError" in run_program("def").detail
    assert "RecursionError" in run_program("def f(): f()\nf()").detail
    says_so = "import os\nfor fd in range(3, 64):\n  try: os.write(fd, b'\\nfinished\\n')\n  except OSError: pass\nos._exit(0)"
    assert run_program(says_so).outcome == "ended early"


ENDLESS = {
    "work": "while True: pass",
    "sleep": "import time; time.sleep(60)",
    "calls": "import os\nwhile True: os.getpid()",
    "output": "while True:\n  try: print('x' * 1000, flush=True)\n  except OSError: pass",
    "threads": "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(60,)).start()",
}


@pytest.mark.parametrize("source", ENDLESS.values(), ids=ENDLESS.keys())
def test_time_is_up(source: str) -> None:
    started = time.monotonic()
    assert run_program(source, timeout_seconds=0.5).outcome == "timeout"
    assert time.monotonic() - started < 55, "not the end that it would have come to by itself"


def test_memory_and_files_are_bounded() -> None:
    assert run_program("x = bytearray(10**10)").outcome == "memory"
    assert run_program("x = []\nwhile True: x.append(bytearray(10**7))").outcome == "memory"
    assert "too large" in run_program("f = open('big', 'wb')\nwhile True: f.write(bytes(10**6)); f.flush()").detail
    assert "too large" in run_program("while True: print('x' * 10**6)").detail
    many = "n = 0\ntry:\n  files = [open(str(i), 'w') for i in range(1000)]\nexcept OSError:\n  n = 1\nassert n"
    assert run_program(many).passed


@pytest.mark.parametrize(
    "source",
    [
        "i = 0\nwhile True:\n  i += 1\n  open(str(i), 'wb').write(bytes(4_000_000))",
        "import os\ni = 0\nwhile True:\n  i += 1\n  os.mkdir(str(i))",
        "import os\nwhile True:\n  os.mkdir('d' * 250)\n  os.chdir('d' * 250)",
    ],
    ids=["large", "many", "deep"],
)
def test_a_full_folder_ends_a_program_and_is_removed(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert run_program(source, timeout_seconds=60, audit_hook=False).outcome == "files"
    assert list(tmp_path.iterdir()) == []


def test_what_a_program_leaves_is_removed_however_deep(tmp_path: Path) -> None:
    """Deeper than Python's stack, and closed."""
    root = tmp_path / "root"
    root.mkdir()
    (root / "1.d").mkdir()
    folder = os.open(root / "1.d", os.O_RDONLY)
    for _ in range(1100):
        os.mkdir("d", dir_fd=folder)
        inner = os.open("d", os.O_RDONLY, dir_fd=folder)
        os.close(folder)
        folder = inner
    os.mkdir("closed", 0o000, dir_fd=folder)
    os.close(folder)
    sandbox._remove(root)
    assert not root.exists()


REFUSED = {
    "a socket": "import socket; socket.socket()",
    "a connection": "import urllib.request; urllib.request.urlopen('http://127.0.0.1:1')",
    "a fork": "import os; os.fork()",
    "a fork bomb": "import os\nwhile True:\n  os.fork()",
    "a program": "import subprocess; subprocess.run(['/bin/true'])",
    "a shell": "import os; assert os.system('true') == 0",
    "a process pool": "import multiprocessing as m; m.Process(target=print).start()",
    "a signal to the parent": "import os; os.kill(os.getppid(), 9)",
    "the whole group": "import os; os.kill(0, 9)",
    "a stop": "import signal; signal.raise_signal(signal.SIGSTOP)",
    "a pair of sockets": "import socket; socket.socketpair()",
    "a terminal": "import pty; pty.fork()",
    "limits": "import resource as r; r.setrlimit(r.RLIMIT_CPU, (9999, 9999))",
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused_by_the_hook_and_by_the_kernel(what: str) -> None:
    assert not run_program(REFUSED[what]).passed
    if KERNEL:
        assert bare(REFUSED[what]).outcome in ("error", "killed")


@pytest.mark.skipif("seccomp" not in PROBE.guards, reason="without seccomp nothing keeps these")
def test_the_parent_stays_as_it_is() -> None:
    before = os.sched_getaffinity(0), os.getpriority(os.PRIO_PROCESS, 0)
    assert run_program("import os; os.sched_setaffinity(os.getppid(), {0})").outcome == "error"
    assert run_program("import os; os.setpriority(os.PRIO_PROCESS, os.getppid(), 5)").outcome == "error"
    assert before == (os.sched_getaffinity(0), os.getpriority(os.PRIO_PROCESS, 0))


def test_no_file_outside_is_written_or_read(tmp_path: Path) -> None:
    secret, target = tmp_path / "secret", tmp_path / "new"
    secret.write_text("x")
    for run in [run_program, *([bare] if KERNEL else [])]:
        for source in (
            f"open({str(target)!r}, 'w')",
            f"import os; os.remove({str(secret)!r})",
            f"import os; os.mkdir({str(target)!r})",
        ):
            assert run(source).outcome == "error", source
        if KERNEL:
            for path in (str(secret), "/etc/passwd", f"/proc/{os.getpid()}/environ"):
                assert "Permission denied" in run(f"open({path!r}).read()").detail
    assert secret.read_text() == "x" and not target.exists()


def test_ctypes_is_no_way_around() -> None:
    assert "refuses" in run_program("import ctypes; ctypes.CDLL(None)").detail
    if KERNEL:
        call = "import ctypes; libc = ctypes.CDLL(None, use_errno=True)\nassert libc.{}\n"
        for what in ("socket(2, 1, 0) == -1 and ctypes.get_errno() == 1", "fork() == -1 and ctypes.get_errno() == 1"):
            assert bare(call.format(what)).passed


def test_nothing_is_left_behind() -> None:
    run_program("import time\ntime.sleep(60)", timeout_seconds=0.3)
    living = [c for c in psutil.Process().children() if c.status() != psutil.STATUS_ZOMBIE]
    assert not [c for c in living if any("sandbox_child" in word for word in c.cmdline())]


@pytest.mark.parametrize(
    ("expression", "result"),
    [
        ("12/60", "0.2"), ("10/2", "5"), ("0.1+0.2", "0.3"), ("1,000*2", "2000"), ("$3.50*2", "7"), ("2*(3+4)-1", "13"),
        ("-7//2", "-4"), ("7%4", "3"), ("'strawberry'.count('r')", "3"), ('"a,b".count(",")', "1"), ("2/3", "0.6666666667"),
        ("99999*99999", "9999800001"),
        ("1/0", None), ("2**10", None), ("__import__('os')", None), ("open('x')", None), ("a+1", None), ("", None), ("(1", None),
        ("1;2", None), ("'a'*9", None), ("True+1", None), ("9" * 300, None), ("(" * 100 + "1" + ")" * 100, "1"), ("1e400", None),
        ("'a'.upper()", None), ("lambda: 1", None), ("-" * 200 + "1", None),
    ],
)  # fmt: skip
def test_calculator(expression: str, result: str | None) -> None:
    assert calculate(expression) == result
