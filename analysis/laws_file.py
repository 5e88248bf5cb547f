"""Laws: everything that was fitted, as the versioned file laws.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema

from analysis.allocation.tools import jsonable
from analysis.errors import DataError
from analysis.files import write_atomic
from analysis.law import Law
from analysis.weight_decay import WeightDecayLaw

SCHEMA_VERSION = 1
SCHEMA_FILE = Path(__file__).with_name("laws.schema.json")


@dataclass(frozen=True, kw_only=True)
class Laws:
    """The file laws.json. A law is null when no run varies what it is about; then it says nothing and blocks nothing."""

    source_hash: str
    source: str = ""
    n_runs: int = 0
    convention: str = ""
    target_flops: float | None = None
    allocation: dict[str, Any] | None = None
    batch_size: Law | None = None
    learning_rate: Law | None = None
    weight_decay: WeightDecayLaw | None = None
    noise: dict[str, Any] | None = None
    runs_used: dict[str, int] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    left_out: tuple[dict[str, str], ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """The content of laws.json, plain data."""
        plain = {k: v for k, v in vars(self).items() if k not in ("batch_size", "learning_rate", "weight_decay")}
        out = {"schema_version": SCHEMA_VERSION, **jsonable(plain)}
        for name in ("batch_size", "learning_rate", "weight_decay"):
            law = getattr(self, name)
            out[name] = None if law is None else law.as_dict()
        return out

    def save(self, path: str | Path) -> Path:
        """Write laws.json atomically, after checking it against the schema. DataError for a path that cannot be written."""
        path = Path(path)
        data = self.as_dict()
        problem = schema_problem(data)
        assert problem is None, f"laws do not fit their own schema: {problem}"
        write_atomic(path, json.dumps(data, indent=1, allow_nan=False))
        return path

    @classmethod
    def load(cls, path: str | Path) -> Laws:
        """Read laws.json. DataError names the file and what is wrong: missing, cut short, another schema, a broken field."""
        path = Path(path)
        try:
            text = path.read_text(encoding="utf8")
            data = json.loads(text)
        except FileNotFoundError:
            raise DataError(f"no laws at {path}; fit them first") from None
        except (OSError, UnicodeDecodeError) as e:
            raise DataError(f"{path}: cannot be read ({e.__class__.__name__}); fit the laws again") from None
        except json.JSONDecodeError as e:
            raise DataError(
                f"{path}: not valid JSON at character {e.pos} of {len(text)} (cut short?); fit the laws again"
            ) from None
        return cls.from_dict(data, str(path))

    @classmethod
    def from_dict(cls, data: Any, where: str = "laws") -> Laws:
        """Laws from the content of a laws.json; DataError when it has another schema version or does not fit the schema."""
        found = data.get("schema_version") if isinstance(data, Mapping) else type(data).__name__
        if found != SCHEMA_VERSION:
            raise DataError(f"{where}: laws schema {found!r}, this version reads {SCHEMA_VERSION}; fit the laws again")
        problem = schema_problem(data)
        if problem is not None:
            raise DataError(f"{where}: {problem}; fit the laws again")
        values = {k: v for k, v in data.items() if k != "schema_version"}
        for name in ("batch_size", "learning_rate"):
            values[name] = None if values[name] is None else Law.from_dict(values[name])
        if values["weight_decay"] is not None:
            values["weight_decay"] = WeightDecayLaw.from_dict(values["weight_decay"])
        for name in ("warnings", "notes", "left_out"):
            values[name] = tuple(values[name])
        return cls(**values)


def schema_problem(data: Any) -> str | None:
    """The first way in which `data` does not fit laws.schema.json, in words; None when it does."""
    error = jsonschema.exceptions.best_match(_validator().iter_errors(data))
    if error is None:
        return None
    place = "/".join(map(str, error.absolute_path)) or "the whole"
    return f"field {place}: {error.message[:200]}"


@cache
def _validator() -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(json.loads(SCHEMA_FILE.read_text(encoding="utf8")))
