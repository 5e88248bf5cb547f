"""`python -m nanoladder.doctor_job`: the doctor as a Ray job. Its result is one line of the job's log."""

from __future__ import annotations

import argparse
import json

from nanoladder.doctor_cluster import MARK, examine_cluster
from nanoladder.job_context import default_storage


def main() -> None:
    parser = argparse.ArgumentParser(prog="nanoladder.doctor_job", allow_abbrev=False)
    parser.add_argument("--storage", default=default_storage())
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    examinations = examine_cluster("auto", args.storage, measure=not args.quick)
    print(MARK + json.dumps([e.as_dict() for e in examinations]), flush=True)


if __name__ == "__main__":
    main()
