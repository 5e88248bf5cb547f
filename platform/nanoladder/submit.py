"""Submit a sweep file as a Ray job: ship the code, handle the token, stream the log, end with the sweep's exit status."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import shlex
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanochat_model.errors import ConfigError
from nanochat_model.version import git_commit

RUNTIME_ENV_FILE = "runtime_env.yaml"
ADDRESS_ENVS = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")  # in the order of Ray's own client
DEFAULT_ADDRESS = "http://127.0.0.1:8265"
CHATTY = ("ray", "ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk", "ray._private.runtime_env")
DETACHED = 130  # the log was left with Ctrl-C; the job goes on


@dataclass(frozen=True, kw_only=True)
class Submission:
    """A job as it was handed to Ray."""

    job_id: str
    address: str
    entrypoint: str
    metadata: dict[str, str]


def submit_sweep(
    file: str | Path, arguments: Sequence[str] = (), *, address: str = "", runtime_env: str | Path = "", token_file: str = ""
) -> tuple[Submission, Any]:
    """Submit `python FILE ARGUMENTS`; returns what was submitted and Ray's client, connected.

    `runtime_env`: the YAML that ships the code (default: the nearest runtime_env.yaml above the file); its paths, and the
    file's, count from its folder. The sweep and its arguments are checked here first. Raises ConfigError for a sweep that
    would not start, a cluster that does not answer, and a token that it does not take.
    """
    path = Path(file).absolute()
    metadata = describe(path, arguments)
    yaml_path = Path(runtime_env).absolute() if runtime_env else find_runtime_env(path)
    env = load_runtime_env(yaml_path)
    try:
        inside = path.relative_to(Path(env["working_dir"]))
    except ValueError:
        raise ConfigError(f"{path} is not under {env['working_dir']}, which {yaml_path} ships; give a file from there") from None
    entrypoint = shlex.join(["python", str(inside), *arguments])
    where = choose_address(address)
    use_token(token_file)
    with refusals(where):
        client = connect(where)
        job_id = client.submit_job(
            entrypoint=entrypoint, runtime_env=env, metadata=metadata, submission_id=new_job_id(metadata["sweep"])
        )
    return Submission(job_id=job_id, address=where, entrypoint=entrypoint, metadata=metadata), client


def describe(path: Path, arguments: Sequence[str]) -> dict[str, str]:
    """What the dashboard shows of a job. Loads the sweep and parses its arguments, so that mistakes are told before shipping."""
    from nanoladder.sweep_command import check_arguments, load_sweep

    sweep = load_sweep(path)
    storage = check_arguments(sweep, list(arguments))
    facts = {
        "job_name": sweep.name,
        "sweep": sweep.name,
        "question": sweep.question,
        "arguments": shlex.join(arguments),
        "storage": storage,
        "git_commit": git_commit(),
    }
    return {k: v for k, v in facts.items() if v}


def find_runtime_env(path: Path) -> Path:
    for folder in path.parents:
        if (folder / RUNTIME_ENV_FILE).is_file():
            return folder / RUNTIME_ENV_FILE
    raise ConfigError(f"no {RUNTIME_ENV_FILE} above {path}; give one with --runtime-env, or submit from the repository")


def load_runtime_env(path: Path) -> dict[str, Any]:
    """A runtime environment with its local paths made absolute from the file's own folder, and storage roots that lie in what it
    ships left out: shards and runs never travel."""
    import yaml

    try:
        env = yaml.safe_load(path.read_text(encoding="utf8"))
    except FileNotFoundError:
        raise ConfigError(f"no runtime environment at {path}; give a YAML file with working_dir and py_modules") from None
    except yaml.YAMLError as e:
        raise ConfigError(f"{path} is not valid YAML ({str(e).splitlines()[0]}); mend it") from None
    if not isinstance(env, dict) or "working_dir" not in env:
        raise ConfigError(f"{path} names no working_dir; add one, for example working_dir: .")
    env["working_dir"] = str((path.parent / env["working_dir"]).resolve())
    roots = [p.parent.parent for p in sorted(Path(env["working_dir"]).glob("*/shards/manifest.json"))]
    if roots:
        env["excludes"] = [*env.get("excludes", []), *(f"/{root.name}/" for root in roots)]
    if "py_modules" in env:
        env["py_modules"] = [str((path.parent / module).resolve()) for module in env["py_modules"]]
    return env


def choose_address(address: str = "") -> str:
    """`address`, else RAY_API_SERVER_ADDRESS or RAY_ADDRESS, else the dashboard of this machine; http:// where no scheme is."""
    found = address or next((os.environ[name] for name in ADDRESS_ENVS if os.environ.get(name)), DEFAULT_ADDRESS)
    return found if "://" in found or found == "auto" else f"http://{found}"


def use_token(token_file: str = "") -> None:
    """Let Ray's clients in this process send the token, where there is one: token mode is off by default in them."""
    if token_file:
        if not Path(token_file).is_file():
            raise ConfigError(f"no token file at {token_file}; make one with: ray get-auth-token --generate")
        os.environ["RAY_AUTH_TOKEN_PATH"] = str(Path(token_file).absolute())
        os.environ.pop("RAY_AUTH_TOKEN", None)
    path = token_path()
    if path.is_file() and stat.S_IMODE(path.stat().st_mode) & 0o077:
        with contextlib.suppress(OSError):
            path.chmod(0o600)  # Ray itself writes it readable for everybody
    if path.is_file() or os.environ.get("RAY_AUTH_TOKEN"):
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def token_path() -> Path:
    """Where Ray looks for the token of this user."""
    given = os.environ.get("RAY_AUTH_TOKEN_PATH")
    return Path(given) if given else Path(os.environ.get("HOME") or "/nonexistent") / ".ray" / "auth_token"


def connect(address: str) -> Any:
    """Ray's job client; raises what it raises."""
    if address != "auto":
        os.environ[ADDRESS_ENVS[0]] = address  # Ray takes these variables before the address that it is given
    from ray.job_submission import JobSubmissionClient

    client = JobSubmissionClient(address)
    for name in CHATTY:  # they would name every file that they leave out
        logging.getLogger(name).setLevel(logging.ERROR)
    return client


@contextlib.contextmanager
def refusals(address: str) -> Iterator[None]:
    """Ray's errors about reaching a cluster, as one line with a remedy."""
    try:
        yield
    except (ConnectionError, ValueError) as e:
        if isinstance(e, ConfigError):
            raise
        raise ConfigError(
            f"no Ray dashboard answers at {address} ({' '.join(str(e).split())[:200]}); open its tunnel (ray dashboard "
            "cluster.yaml), or give another --address"
        ) from None
    except Exception as e:
        if type(e).__name__ != "AuthenticationError":
            raise
        reason = "no token was sent" if "Missing" in str(e) else "it refuses the token"
        raise ConfigError(
            f"the cluster at {address} asks for a token and {reason}; copy the head's ~/.ray/auth_token here with mode 0600, or "
            "give --token-file"
        ) from None


def new_job_id(sweep: str) -> str:
    """Readable, and never the same twice: wd_d20-20261121-120501-3fa2."""
    return f"{sweep.replace('/', '-')}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"


def follow(client: Any, job_id: str, write: Callable[[str], object]) -> int:
    """Pass on the job's log until it ends; the exit status of its driver (1 where it has none, 130 when it was stopped)."""

    async def tail() -> None:
        async for text in client.tail_job_logs(job_id):
            write(text)

    asyncio.run(tail())
    info = client.get_job_info(job_id)
    status = str(getattr(info.status, "value", info.status))
    if status == "SUCCEEDED":
        return 0
    if status == "STOPPED":
        return DETACHED
    code = info.driver_exit_code
    if code is None:  # the driver never ran: the cause is in Ray's message, not in the log
        write(f"{info.message or status}\n")
    return code if code is not None and 0 < code < 256 else 1
