"""Where the MLflow page of a storage root will be, so that a report's runs can link to it before any server runs."""

from __future__ import annotations

import contextlib
import sqlite3
from typing import TypedDict

from nanoladder.tracking import EXPERIMENT
from nanoladder.workspace import Workspace

LOCAL_SERVER = "http://127.0.0.1:5000"  # where `mlflow ui` listens unless told otherwise


class MlflowPage(TypedDict, total=False):
    """Arguments of analysis.report.write_report."""

    mlflow_uri: str
    mlflow_store: str


def local_page(workspace: Workspace) -> MlflowPage:
    """The experiment's page on `mlflow ui` and the store to serve it from; empty where the root has no MLflow database, or one
    that holds no experiment of ours.

    Read with sqlite3: importing MLflow takes seconds.
    """
    path = workspace.root / "mlflow.db"
    if not path.exists():
        return {}
    with contextlib.closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as db:  # the URI quotes what a path may hold
        try:
            found = db.execute("select experiment_id from experiments where name = ?", (EXPERIMENT,)).fetchone()
        except sqlite3.DatabaseError:  # MLflow was ended before its tables were made
            return {}
    if found is None:
        return {}
    return {"mlflow_uri": f"{LOCAL_SERVER}/#/experiments/{found[0]}", "mlflow_store": workspace.mlflow_uri}
