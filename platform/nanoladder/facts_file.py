"""Read a JSON file that carries its schema's version: strictly, and with one line that says what to do where it cannot be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nanochat_model.errors import ConfigError

SCHEMA_VERSION = 1  # of the files written beside a sweep


def read_facts(path: Path, what: str, remedy: str) -> dict[str, Any]:
    """The object in `path`. ConfigError where it is missing ("no `what` at …"), broken or of another schema, with `remedy`."""
    try:
        facts = json.loads(path.read_text(encoding="utf8"))
    except FileNotFoundError:
        raise ConfigError(f"no {what} at {path}; {remedy}") from None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise ConfigError(f"{path} is not valid JSON (cut short?); {remedy} to rebuild it") from None
    if not isinstance(facts, dict) or facts.get("schema_version") != SCHEMA_VERSION:
        raise ConfigError(f"{path} is of another schema than {SCHEMA_VERSION}; {remedy} to rebuild it")
    return facts
