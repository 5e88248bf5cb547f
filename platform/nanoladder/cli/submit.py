"""nanoladder submit: a sweep file as a job on a Ray cluster."""

from __future__ import annotations

import argparse
import inspect
import json
import sys
from collections.abc import Sequence


class Submit:
    """usage: nanoladder submit FILE [--address URL] [--no-wait] [--token-file FILE] [--runtime-env FILE] [--json] [ARGUMENTS]

    Submit a sweep file as a Ray job: ships the code as runtime_env.yaml says, streams the log, and ends with the sweep's own exit
    status. Ctrl-C leaves the job running. All other arguments (or those after --) go to the sweep.

      --address URL       the cluster's dashboard (RAY_API_SERVER_ADDRESS or RAY_ADDRESS, else http://127.0.0.1:8265)
      --no-wait           print the job's id and leave
      --token-file FILE   of the cluster's token (RAY_AUTH_TOKEN_PATH, else ~/.ray/auth_token)
      --runtime-env FILE  what to ship (default: the nearest runtime_env.yaml above FILE)
      --json              print the submission as JSON, and no log

    Example: nanoladder submit sweeps/wd_d20.py --address http://127.0.0.1:8265 --storage /shared/runs --set num_trials=8
    """

    @classmethod
    def run_file(cls, argv: Sequence[str]) -> int:
        mine = argv[: list(argv).index("--")] if "--" in argv else argv
        if not argv or "-h" in mine or "--help" in mine:
            print(inspect.cleandoc(cls.__doc__ or ""))
            return 0 if argv else 2
        from nanoladder.submit import submit_sweep

        args, rest = parse(argv)
        submission, client = submit_sweep(
            args.file, rest, address=args.address, runtime_env=args.runtime_env, token_file=args.token_file
        )
        if args.json:
            print(json.dumps(vars(submission), indent=2))
        else:
            print(f"job {submission.job_id} at {submission.address}: {submission.entrypoint}")
        return 0 if args.no_wait else wait(client, submission.job_id, quiet=args.json)


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Our options, and what is the sweep's."""
    parser = argparse.ArgumentParser(prog="nanoladder submit", add_help=False, allow_abbrev=False)
    parser.add_argument("file")
    parser.add_argument("--address", default="")
    parser.add_argument("--no-wait", action="store_true")
    parser.add_argument("--token-file", default="")
    parser.add_argument("--runtime-env", default="")
    parser.add_argument("--json", action="store_true")
    mine, theirs = list(argv), []
    if "--" in mine:
        cut = mine.index("--")
        mine, theirs = mine[:cut], mine[cut + 1 :]
    args, unknown = parser.parse_known_args(mine)
    return args, unknown + theirs


def wait(client: object, job_id: str, *, quiet: bool) -> int:
    from nanoladder.submit import DETACHED, follow

    def write(text: str) -> None:
        if not quiet:
            sys.stdout.write(text)
            sys.stdout.flush()

    try:
        status = follow(client, job_id, write)
    except KeyboardInterrupt:
        print(f"\nthe job goes on; end it with: nanoladder stop (or ray job stop {job_id})", file=sys.stderr)
        return DETACHED
    if status:
        print(f"job {job_id} ended with status {status}", file=sys.stderr)
    return status
