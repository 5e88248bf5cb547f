"""Files of runs as people keep them: CSV in any separator, encoding and notation, or parquet.

The frame read has the file's line of each row as its index, so that a row left out can be found again.
"""

from __future__ import annotations

import codecs
import gzip
import io
import re
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.errors import DataError

SEPARATORS = (",", ";", "\t", "|")
PARQUET = (".parquet", ".pq")
OTHER_KINDS = (".json", ".jsonl", ".xlsx", ".xls", ".ods", ".pkl", ".pickle", ".feather")
BOMS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
WORDS = {"thousand": 1e3, "million": 1e6, "billion": 1e9, "trillion": 1e12}
LETTERS = {"K": 1e3, "M": 1e6, "B": 1e9, "G": 1e9, "T": 1e12}
# "Params (M)", "tokens [billions]", "tokens_in_billions", "params (in millions)": the unit stands in the column's name.
UNIT = re.compile(
    r"(?:[\s_]+in)?[\s_]*(?:[(\[](?:in\s+)?(?P<short>[KMBGT])[)\]]|[(\[\s_]+(?:in\s+)?(?P<word>[a-z]+?)s?[)\]]?)$", re.I
)


def read_table(path: Path) -> pd.DataFrame:
    """The table at `path`; `.attrs` has `sep` and `repeated`, the column names that stand in the header more than once.

    Leading lines that start with # and blank lines are no rows. DataError on a file that is missing, empty or no table.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file; give a CSV or parquet table of runs")
    if path.suffix.lower() in OTHER_KINDS:
        raise DataError(f"{path}: a {path.suffix} file is not read; save the table as CSV or parquet")
    try:
        frame = _parquet(path) if path.suffix.lower() in PARQUET else _text(path)
    except DataError:
        raise
    except UnicodeDecodeError as e:
        raise DataError(f"{path}: not a text in UTF-8 (byte {e.start}); save the table as CSV in UTF-8, or as parquet") from None
    except (ValueError, OSError, EOFError, zlib.error) as e:  # pandas and pyarrow parse errors are ValueErrors
        reason = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise DataError(f"{path}: cannot be read as a table ({reason}); give a CSV with a header line, or parquet") from None
    if frame.empty:
        raise DataError(f"{path}: the table has no rows")
    return frame


def _parquet(path: Path) -> pd.DataFrame:
    frame = pd.read_parquet(path)
    if any(name is not None for name in frame.index.names):  # a column that pandas keeps as its index
        frame = frame.reset_index()
    frame.index = pd.RangeIndex(2, len(frame) + 2)  # as in a CSV of the same table
    frame.attrs = {"sep": "", "repeated": ()}
    return frame


def _text(path: Path) -> pd.DataFrame:
    raw = path.read_bytes()
    if raw[:2] == b"\x1f\x8b":
        raw = gzip.decompress(raw)
    encoding = next((name for mark, name in BOMS if raw.startswith(mark)), "utf-8")
    lines = raw.decode(encoding).splitlines()
    top = next((i for i, line in enumerate(lines) if line.strip() and not line.lstrip().startswith("#")), None)
    if top is None:
        raise DataError(f"{path}: the file is empty; give a table with a header line")
    separator = _separator(lines[top])
    options: dict[str, Any] = {
        "sep": separator,
        "encoding": encoding,
        "skiprows": top,
        "skip_blank_lines": False,
        "skipinitialspace": True,
    }
    frame = pd.read_csv(io.BytesIO(raw), **options)
    if not isinstance(frame.index, pd.RangeIndex) and frame.iloc[:, -1].isna().all():
        # Rows one field longer than the header: names of rows in front (R), or here only a separator at the end.
        frame = pd.read_csv(io.BytesIO(raw), index_col=False, **options)
    cells = lines[top].split(None if separator == r"\s+" else separator)
    header = Counter(cell.strip().strip('"') for cell in cells)
    frame.columns = pd.Index([str(c).strip() for c in frame.columns])
    frame.index = pd.RangeIndex(top + 2, top + 2 + len(frame))
    frame = frame.dropna(how="all")
    frame.attrs = {"sep": separator, "repeated": tuple(name for name, times in header.items() if times > 1 and name)}
    return frame


def _separator(header: str) -> str:
    """Comma unless semicolons, tabs or bars are more; white space where there is none of them."""
    best = max(SEPARATORS, key=header.count)
    return best if header.count(best) or len(header.split()) < 3 else r"\s+"


def header_unit(column: str) -> tuple[str, float]:
    """The name without its unit, and the unit as a factor: ("Params", 1e6) for "Params (M)"; factor 1 where it names none."""
    found = UNIT.search(column)
    if found is None:
        return column, 1.0
    factor = LETTERS[found["short"].upper()] if found["short"] else WORDS.get(found["word"].lower(), 1.0)
    return (column[: found.start()], factor) if factor != 1.0 and found.start() else (column, 1.0)
