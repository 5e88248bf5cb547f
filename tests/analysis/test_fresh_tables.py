"""Tables as people keep them: other units, other notations, other separators; and the laws do not care."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from allocation_tables import HOFFMANN, ladder

from analysis.errors import DataError
from analysis.laws import fit_laws
from analysis.numbers import to_numbers
from analysis.report import report_facts
from analysis.table import load_csv
from nanoladder.cli.laws import TableOptions


def runs() -> pd.DataFrame:
    r = ladder(HOFFMANN, 10.0 ** np.linspace(18, 19, 4), sizes=6, span=3, noise=0.004)
    return pd.DataFrame({"N": r.N, "D": r.D, "L": r.L, "budget": r.budget})


def fitted(frame: pd.DataFrame, path: Path) -> dict:
    frame.to_csv(path, index=False)
    return fit_laws(load_csv(path), n_boot=200).as_dict()["allocation"]


@pytest.mark.parametrize("scale", [(1e-6, 1e-9, 1.0), (1.0, 1.0, 1 / math.log(2)), (1e12, 1e-12, 1e-5)])
def test_units_change_nothing_but_constants(tmp_path, scale):
    n, d, l = scale
    plain = fitted(runs(), tmp_path / "a.csv")
    scaled = fitted(runs() * [n, d, l, n * d], tmp_path / "b.csv")
    one, two = plain["parametric"], scaled["parametric"]
    same = ("alpha", "beta", "a", "objective_log", "residual_sd")
    assert [two[k] for k in same] == pytest.approx([one[k] for k in same], rel=1e-6)
    assert two["E"] / l == pytest.approx(one["E"], rel=1e-6)
    assert two["A"] / l / n ** two["alpha"] == pytest.approx(one["A"], rel=1e-5)
    assert two["B"] / l / d ** two["beta"] == pytest.approx(one["B"], rel=1e-5)
    assert two["status"] == one["status"] and two["intervals"]["alpha"] == pytest.approx(one["intervals"]["alpha"], rel=1e-5)
    for key in ("N_exponent", "D_exponent"):
        assert scaled["isoflop"][key] == pytest.approx(plain["isoflop"][key], rel=1e-6)
    assert scaled["frontier"]["gamma"] == pytest.approx(plain["frontier"]["gamma"], rel=1e-5)
    before, after = plain["prediction"], scaled["prediction"]
    assert [after[k] / l for k in ("value", "low", "high")] == pytest.approx(
        [before[k] for k in ("value", "low", "high")], rel=1e-5
    )
    assert after["verdict"] == before["verdict"] and after["N"] / n == pytest.approx(before["N"], rel=1e-5)


def test_notations_of_numbers():
    text = pd.Series(["1,234,567", "26.9M", "1.4B", "1_000_000", "70 m", "3e8", "2T", "12 345", "big", "1,23", None])
    numbers, read = to_numbers(text, counts=True)
    assert numbers[:8].tolist() == pytest.approx([1234567, 26.9e6, 1.4e9, 1e6, 70e6, 3e8, 2e12, 12345])
    assert numbers[8:].isna().all() and read == 7
    losses, _ = to_numbers(pd.Series(["3,142", "2,9", "2.5B"]), decimal_comma=True)
    assert losses[:2].tolist() == [3.142, 2.9] and math.isnan(losses[2])


def test_separators_headers_and_notations_of_a_file(tmp_path):
    frame = runs()
    odd = pd.DataFrame(
        {
            " Params ": [f"{v:,.0f}" for v in frame["N"]], "Train Tokens": [f"{v / 1e9:.4f}B" for v in frame["D"]],
            "Val Loss": [f"{v:.4f}".replace(".", ",") for v in frame["L"]], "Budget": frame["budget"],
        }
    )  # fmt: skip
    odd.to_csv(tmp_path / "odd.csv", index=False, sep=";", encoding="utf-8-sig")
    table = load_csv(tmp_path / "odd.csv")
    assert len(table) == 24 and len(table.left_out) == 0
    np.testing.assert_allclose(table.frame[["N", "D", "L"]], frame[["N", "D", "L"]], rtol=1e-4)
    assert sum("written with" in note for note in table.notes) == 3


def test_words_powers_and_labels_of_counts():
    text = pd.Series(["30.4 million", "1.2 bn", "2.15x10^18", "10**19", "C=1e18", "4.64e18 FLOPs", "3 apples", "x^2", "10^400"])
    numbers, _ = to_numbers(text, counts=True)
    assert numbers[:6].tolist() == pytest.approx([30.4e6, 1.2e9, 2.15e18, 1e19, 1e18, 4.64e18])
    assert numbers[6:].isna().all() and to_numbers(text)[0].isna().all()  # a loss is no count


def csv(frame: pd.DataFrame, **options: Any) -> bytes:
    return frame.to_csv(index=False, **options).encode()


PLAIN = csv(runs())
FILES = {
    "utf-16": PLAIN.decode().encode("utf-16"),
    "gzip": gzip.compress(PLAIN),
    "comments and blank lines": b"# a ladder\n\n" + PLAIN.replace(b"\n", b"\n\n", 3),
    "windows line ends": PLAIN.replace(b"\n", b"\r\n"),
    "separated by spaces": PLAIN.replace(b",", b"  "),
    "separator at the end": PLAIN.replace(b"\n", b",\n").replace(b",\n", b"\n", 1),
    "names of rows in front": runs().to_csv().encode()[1:],
    "index column": runs().to_csv().encode(),
    "units in the header": csv(
        (runs() / [1e6, 1e9, 1, 1]).rename(columns={"N": "Params (M)", "D": "tokens_in_billions", "L": "Eval/Loss"})
    ),
    "budgets by name": csv(runs().assign(budget=np.repeat(["tiny", "small", "middle", "large"], 6))),
    "budgets in powers": csv(runs().assign(budget=[f"{b / 1e18:.4f} x 10^18 FLOPs" for b in runs()["budget"]])),
}


@pytest.mark.parametrize("kind", FILES)
def test_files_as_people_keep_them(tmp_path, kind):
    path = tmp_path / ("t.csv.gz" if kind == "gzip" else "t.csv")
    path.write_bytes(FILES[kind])
    frame = load_csv(path).frame
    np.testing.assert_allclose(frame[["N", "D", "L"]], runs()[["N", "D", "L"]], rtol=1e-9)
    np.testing.assert_allclose(frame["budget"], runs()["budget"], rtol=1e-4)


def test_a_row_left_out_is_named_by_its_line(tmp_path):
    (tmp_path / "t.csv").write_bytes(b"# note\n\n" + PLAIN + b"1e8,nothing,3,1e18\n")
    table = load_csv(tmp_path / "t.csv")
    assert [x.row for x in table.left_out] == ["row 28"] and "D is not a number: nothing" in table.left_out[0].reason


def test_columns_named_in_another_spelling_and_units_that_do_not_fit(tmp_path):
    (runs() * [1e-6, 1, 1, 1]).to_csv(tmp_path / "t.csv", index=False)
    table = load_csv(tmp_path / "t.csv", {"params": "n", "tokens": "D", "loss": " L"})
    assert any("column 'N' for 'n'" in note for note in table.notes)
    assert any("another unit" in note for note in table.notes)


@pytest.mark.parametrize(
    ("content", "suffix", "says"),
    [
        (b"", ".csv", "the file is empty"),
        (b"N,D,L\n", ".csv", "no rows"),
        (bytes(range(256)), ".csv", "not a text in UTF-8"),
        (b"{}", ".json", "save the table as CSV or parquet"),
        (b"hello", ".parquet", "cannot be read as a table"),
        (gzip.compress(PLAIN)[:10] + b"\xff" * 20, ".gz", "cannot be read as a table"),
        (b"N,D,L\n1,2,3\n1,2,3,4,5,6\n", ".csv", "cannot be read as a table"),
        (b"N,tokns,L\n1,2,3\n", ".csv", "no column for the training tokens D"),
    ],
)
def test_files_that_are_no_table_are_named_with_the_remedy(tmp_path, content, suffix, says):
    path = tmp_path / f"t{suffix}"
    path.write_bytes(content)
    with pytest.raises(DataError, match=says) as error:
        load_csv(path)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)


def test_a_mapping_that_cannot_be_right(tmp_path):
    runs().rename(columns={"D": "tokens"}).to_csv(tmp_path / "t.csv", index=False)
    with pytest.raises(DataError, match="did you mean 'tokens'"):
        load_csv(tmp_path / "t.csv", {"tokens": "tokenz"})
    with pytest.raises(DataError, match="params and tokens both name column 'N'"):
        load_csv(tmp_path / "t.csv", {"params": "N", "tokens": "N"})


def test_the_count_of_parameters_is_chosen_by_name(tmp_path):
    path = tmp_path / "counts.csv"
    runs().assign(everything=lambda f: f["N"] + 3e7).to_csv(path, index=False)
    columns = {"params_matrices": "N", "params_all": "everything"}
    body, everything = (TableOptions(table=str(path), convention=c, **columns).read() for c in ("matrices", "all"))
    assert (body.convention, everything.convention) == ("matrices", "all")
    assert (everything.frame["N"] - body.frame["N"]).to_numpy() == pytest.approx(3e7)


@pytest.mark.parametrize("case", ["five runs", "loss rises with compute", "one budget", "one size", "one loss"])
def test_tables_that_tell_little_are_described_not_feared(tmp_path, case):
    frame = runs()
    frame = {
        "five runs": frame.iloc[:5],
        "loss rises with compute": frame.assign(L=frame["L"] * (frame["budget"] / 1e18) ** 0.2),
        "one budget": frame[frame["budget"] == frame["budget"].max()],
        "one size": frame.assign(N=1e8),
        "one loss": frame.assign(L=3.0),
    }[case]
    frame.to_csv(tmp_path / "t.csv", index=False)
    table = load_csv(tmp_path / "t.csv")
    laws = fit_laws(table, n_boot=200)
    facts = report_facts(laws, table)
    json.dumps(facts, allow_nan=False)
    assert facts["verdict"]["status"] != "ok" and len(facts["verdict"]["sentences"]) == 5
    shown = [w for w in facts["warnings"] if not w["lesser"]]
    assert 1 <= len(shown) <= 4 + sum(w["level"] == "bad" for w in shown)
