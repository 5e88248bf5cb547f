"""Is this machine fit to train? Checks that say what they found, how grave it is, and what helps.

`examine` runs them all here, without Ray; doctor_cluster.py runs it on every node of a cluster.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Severity = Literal["ok", "warning", "error"]
ORDER: tuple[Severity, ...] = ("ok", "warning", "error")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What one check found. A warning costs speed or safety, an error stops training; both have a remedy."""

    check: str
    severity: Severity
    text: str
    remedy: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert (self.severity == "ok") == (not self.remedy), f"a finding that is {self.severity}: remedy {self.remedy!r}"


def ok(check: str, text: str, **facts: Any) -> Finding:
    return Finding(check=check, severity="ok", text=text, facts=facts)


def warning(check: str, text: str, remedy: str, **facts: Any) -> Finding:
    return Finding(check=check, severity="warning", text=text, remedy=remedy, facts=facts)


def error(check: str, text: str, remedy: str, **facts: Any) -> Finding:
    return Finding(check=check, severity="error", text=text, remedy=remedy, facts=facts)


@dataclass(frozen=True, kw_only=True)
class Examination:
    """All findings of one machine, or of the cluster as a whole (`node` "cluster")."""

    node: str
    findings: tuple[Finding, ...]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Examination:
        return cls(node=plain["node"], findings=tuple(Finding(**f) for f in plain["findings"]))


Check = Callable[[], Iterable[Finding]]


def examine(storage: str = "", *, measure: bool = True) -> Examination:
    """Check this machine: `storage` is the root whose disk is looked at ("": the current folder); `measure` also times matrix
    products and collectives, in some ten seconds. Raises nothing: a check that breaks is an error among the findings."""
    from nanoladder import doctor_device, doctor_system

    checks: list[tuple[str, Check]] = [
        ("python", doctor_system.python),
        ("memory", doctor_system.memory),
        ("disk", lambda: doctor_system.disk(storage)),
        ("shared memory", doctor_system.shared_memory),
        ("open files", doctor_system.open_files),
        ("ports", doctor_system.ports),
        ("token", doctor_system.token),
        ("clock", doctor_system.clock),
        ("devices", doctor_device.devices),
        ("environment", doctor_device.environment),
        ("attention", doctor_device.attention),
        ("bf16", lambda: doctor_device.bf16(measure)),
        ("fp8", doctor_device.fp8),
        *([("collectives", doctor_device.collectives)] if measure else []),
    ]
    findings: list[Finding] = []
    for name, check in checks:
        try:
            findings += check()
        except Exception as e:  # a doctor that falls ill must still say what it saw
            findings.append(error(name, f"the check itself broke: {type(e).__name__}: {e}", "look into it with python -X dev"))
    return Examination(node=socket.gethostname(), findings=tuple(findings))


def worst(examinations: Sequence[Examination]) -> Severity:
    """The gravest severity of all findings."""
    found = [f.severity for e in examinations for f in e.findings]
    return max(found, key=ORDER.index, default="ok")
