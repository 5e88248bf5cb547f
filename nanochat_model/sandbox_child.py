"""Runs one program under guards. Started by sandbox.py in a process of its own, by path: it may import the standard library only.

Standard input is a JSON object {"word", "memory_bytes", "cpu_seconds", "file_bytes", "audit_hook", "status_fd"}. The program is
read from program.py in the working folder, which is the only one it may write to. The status descriptor gets one JSON line with the
guards in force, and the word as a line when the program came to its end.

Guards, each applied where the system has it: resource limits; Landlock (Linux 5.13), which confines reading to the interpreter
and writing to the working folder; a seccomp filter (Linux on x86_64 and aarch64), which refuses sockets, new processes, signals
to others and administration; and on request an audit hook, which refuses the same from within Python.
"""

from __future__ import annotations

import json
import os
import platform
import struct
import sys
from typing import Any

# Landlock (include/uapi/linux/landlock.h): access rights to files known to each version of the interface
_FS_RIGHTS = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 5: (1 << 16) - 1}
_FS_READ = 0b1101  # execute, read a file, read a folder
_CREATE, _ADD_RULE, _RESTRICT = 444, 445, 446
_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _SECCOMP_FILTER = 38, 22, 2

# System calls refused with EPERM, by number (arch/x86/entry/syscalls/syscall_64.tbl, include/uapi/asm-generic/unistd.h):
# sockets; processes and signals; mounts, modules, keys, limits and other administration; priorities and processors of others;
# System V memory, semaphores and messages, which outlive a process; io_uring, which goes round filters.
_COMMON = (424, 425, 434, 438)  # pidfd_send_signal, io_uring_setup, pidfd_open, pidfd_getfd
_X86_64 = (
    41, 42, 43, 44, 46, 49, 50, 53, 288,  # socket connect accept sendto sendmsg bind listen socketpair accept4
    57, 58, 59, 62, 101, 109, 112, 200, 234, 310, 311, 322,  # fork vfork execve kill ptrace setpgid setsid tkill tgkill vm execveat
    105, 106, 113, 114, 117, 119, 133, 155, 160, 161, 165, 166, 167, 169, 175, 246, 248, 249, 250, 259, 272, 298, 304, 308, 313,
    320, 321, 323,
    141, 142, 144, 203, 251, 256, 279, 314,  # setpriority sched_setparam -scheduler -affinity ioprio_set migrate_ move_pages -attr
    29, 64, 68, 240,  # shmget semget msgget mq_open
)  # fmt: skip
_AARCH64 = (
    198, 199, 200, 201, 202, 203, 206, 211, 242,
    117, 129, 130, 131, 154, 157, 221, 270, 271, 281,
    33, 39, 40, 41, 51, 97, 104, 105, 142, 144, 145, 146, 147, 149, 164, 217, 218, 219, 224, 241, 265, 268, 273, 280, 282, 294,
    140, 118, 119, 122, 30, 238, 239, 274,
    194, 190, 186, 180,
)  # fmt: skip
_ARCHITECTURES = {  # audit number, clone, prlimit64, refused
    "x86_64": (0xC000003E, 56, 302, _X86_64),
    "aarch64": (0xC00000B7, 220, 261, _AARCH64),
}
_CLONE3, _CLONE_THREAD = 435, 0x00010000
_ALLOW, _EPERM, _ENOSYS, _KILL = 0x7FFF0000, 0x00050001, 0x00050026, 0x80000000

_REFUSED_EVENTS = ("socket.", "subprocess.", "ctypes.", "os.exec", "os.fork", "os.kill", "os.posix_spawn", "os.spawn", "os.system",
                   "os.startfile", "pty.", "signal.pthread_kill", "syslog.", "urllib.", "http.", "ftplib.", "smtplib.",
                   "telnetlib.", "webbrowser.", "resource.setrlimit", "resource.prlimit", "os.setxattr", "os.removexattr",
                   "winreg.", "sys.addaudithook")  # fmt: skip
_PATH_EVENTS = ("os.chmod", "os.chown", "os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink", "os.truncate",
                "os.utime", "shutil.", "tempfile.")  # fmt: skip


def limit_resources(limits: dict[str, Any]) -> None:
    import resource

    def lower(kind: int, value: int) -> None:
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))

    lower(resource.RLIMIT_CPU, int(limits["cpu_seconds"]))
    lower(resource.RLIMIT_FSIZE, int(limits["file_bytes"]))
    lower(resource.RLIMIT_NOFILE, 64)
    lower(resource.RLIMIT_CORE, 0)
    if sys.platform != "darwin":  # macOS refuses it
        lower(resource.RLIMIT_AS, int(limits["memory_bytes"]))


def confine_files(libc: Any, ctypes: Any, work: str) -> bool:
    """Landlock: writing in `work` alone, reading there and where the interpreter lies."""
    version = libc.syscall(_CREATE, None, ctypes.c_size_t(0), 1)
    if version < 1:
        return False
    rights = _FS_RIGHTS[max(v for v in _FS_RIGHTS if v <= version)]
    attributes = struct.pack("<Q", rights)
    ruleset = libc.syscall(_CREATE, attributes, ctypes.c_size_t(len(attributes)), 0)
    if ruleset < 0:
        return False
    readable = {
        sys.prefix,
        sys.base_prefix,
        sys.exec_prefix,
        os.path.realpath(sys.base_prefix),
        *sys.path,
        "/lib",
        "/lib64",
        "/usr/lib",
    }
    readable |= {os.path.dirname(os.path.dirname(os.path.realpath(sys.executable)))}
    paths = [(p, _FS_READ) for p in sorted(readable) if os.path.isdir(p)]
    for path, access in [*paths, (work, rights & ~1)]:
        parent = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rule = struct.pack("<Qi", access & rights, parent)
        failed = libc.syscall(_ADD_RULE, ruleset, 1, rule, 0)
        os.close(parent)
        if failed:
            return False
    done = libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 and libc.syscall(_RESTRICT, ruleset, 0) == 0
    os.close(ruleset)
    return done


def filter_program(machine: str) -> bytes:
    """The seccomp filter as classic BPF. struct seccomp_data: nr at 0, arch at 4, args (8 bytes each) from 16."""
    audit, clone, prlimit, refused = _ARCHITECTURES[machine]
    load, equal, at_least, has_bits, give = 0x20, 0x15, 0x35, 0x45, 0x06
    code: list[tuple[int, int, int, int]] = [
        (load, 0, 0, 4), (equal, 1, 0, audit), (give, 0, 0, _KILL),
        (load, 0, 0, 0), (at_least, 0, 1, 0x40000000), (give, 0, 0, _EPERM),  # the x32 calls of x86_64
    ]  # fmt: skip
    for number in (*refused, *_COMMON):
        code += [(equal, 0, 1, number), (give, 0, 0, _EPERM)]
    code += [(equal, 0, 1, _CLONE3), (give, 0, 0, _ENOSYS)]  # libc then uses clone, whose flags can be seen
    code += [(equal, 0, 4, clone), (load, 0, 0, 16), (has_bits, 1, 0, _CLONE_THREAD), (give, 0, 0, _EPERM), (give, 0, 0, _ALLOW)]
    code += [(equal, 0, 5, prlimit), (load, 0, 0, 32), (equal, 0, 2, 0), (load, 0, 0, 36), (equal, 1, 0, 0), (give, 0, 0, _EPERM)]
    code += [(give, 0, 0, _ALLOW)]
    return b"".join(struct.pack("<HBBI", *instruction) for instruction in code)


def filter_calls(libc: Any, ctypes: Any) -> bool:
    """Install the seccomp filter; False where this system has none."""
    if sys.platform != "linux" or platform.machine() not in _ARCHITECTURES:
        return False
    code = filter_program(platform.machine())
    buffer = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("@HxxxxxxP", len(code) // 8, ctypes.addressof(buffer))
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        return False
    return bool(libc.prctl(_PR_SET_SECCOMP, _SECCOMP_FILTER, program, 0, 0) == 0)


def audit(work: str) -> None:
    """The hook that refuses from within Python; it cannot be removed."""
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    inside = (work, work + os.sep)

    def is_inside(path: Any) -> bool:
        if isinstance(path, int) or path is None:
            return True
        full = os.path.realpath(os.fsdecode(path))
        return full == inside[0] or full.startswith(inside[1])

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = arguments
            writes = bool(flags & writing) if isinstance(flags, int) else any(c in (mode or "") for c in "wax+")
            if writes and not is_inside(path):
                raise PermissionError(f"the sandbox refuses to write {path!r}")
        elif event.startswith(_PATH_EVENTS):
            if not all(is_inside(a) for a in arguments if isinstance(a, str | bytes)):
                raise PermissionError(f"the sandbox refuses {event} outside its folder")
        elif event.startswith(_REFUSED_EVENTS):
            raise PermissionError(f"the sandbox refuses {event}")

    sys.addaudithook(hook)


def guard(limits: dict[str, Any], work: str) -> list[str]:
    """Apply every guard this system has; returns their names."""
    limit_resources(limits)  # first: the filter refuses to change them
    guards = ["rlimits"]
    if sys.platform == "linux":
        import ctypes

        libc = ctypes.CDLL(None, use_errno=True)
        libc.syscall.restype = ctypes.c_long
        if confine_files(libc, ctypes, work):
            guards.append("landlock")
        if filter_calls(libc, ctypes):
            guards.append("seccomp")
    if limits["audit_hook"]:
        audit(work)
        guards.append("audit hook")
    return guards


def main() -> None:
    limits = json.loads(sys.stdin.buffer.read())
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    status = limits["status_fd"]
    work = os.path.realpath(os.getcwd())
    with open("program.py", encoding="utf8") as f:
        source = f.read()
    guards = guard(limits, work)
    os.write(status, (json.dumps({"guards": guards}) + "\n").encode())
    scope = {"__name__": "__main__", "__builtins__": __builtins__}
    exec(compile(source, "<program>", "exec"), scope)
    sys.stdout.flush()
    os.write(status, f"\n{limits['word']}\n".encode())
    os._exit(0)  # neither exit handlers nor threads of the program may turn a pass into anything else


if __name__ == "__main__":
    main()
