"""The corpus: what is kept, how it is split, and what bad input says."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import sysconfig
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_text import texts, write_jsonl

from nanochat_model import corpus as corpus_module
from nanochat_model.corpus import _SeenHashes, build_corpus, iter_texts, open_corpus, training_texts
from nanochat_model.errors import ConfigError


def write_parquet(path: Path, column: pa.Array, name: str = "text") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({name: column}), path)
    return path


def expected_split(text: str, fraction: float) -> str:
    return "val" if int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") < fraction * 2**64 else "train"


def test_documents_are_split_by_their_own_hash_and_duplicates_and_empty_ones_dropped(tmp_path: Path) -> None:
    documents = texts(60)
    source = write_jsonl(tmp_path / "in" / "a.jsonl", [*documents, documents[3], "", " \n"])
    info = build_corpus(str(source.parent), tmp_path / "out", val_fraction=0.3)
    for split in ("train", "val"):
        assert list(iter_texts(info, split)) == [t for t in documents if expected_split(t, 0.3) == split]
    assert info.dropped == {"duplicate": 1, "empty": 2, "not_utf8": 0}
    assert (info.num_docs, info.num_bytes) == (60, sum(len(t.encode()) for t in documents))
    assert open_corpus(tmp_path / "out") == info


def test_parquet_and_jsonl_of_the_same_documents_are_the_same_corpus(tmp_path: Path) -> None:
    documents = texts(40)
    write_jsonl(tmp_path / "j" / "a.jsonl", documents)
    for i, kind in enumerate((pa.string(), pa.large_string(), pa.binary())):
        write_parquet(tmp_path / f"p{i}" / "sub" / "b.parquet", pa.array([t.encode() for t in documents]).cast(kind))
    hashes = {build_corpus(str(tmp_path / d), tmp_path / f"out-{d}").hash for d in ("j", "p0", "p1", "p2")}
    assert len(hashes) == 1


def test_an_identical_corpus_is_reused_and_a_touched_source_is_read_again(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", texts(40))
    first = build_corpus(str(source), tmp_path / "out")
    stamp = (tmp_path / "out" / "train" / "00000.parquet").stat().st_mtime_ns
    assert build_corpus(str(source), tmp_path / "out") == first
    os.utime(source, ns=(1, 1))
    again = build_corpus(str(source), tmp_path / "out")
    assert again.fingerprint != first.fingerprint and again.hash == first.hash
    assert (tmp_path / "out" / "train" / "00000.parquet").stat().st_mtime_ns == stamp


def test_another_corpus_is_never_overwritten(tmp_path: Path) -> None:
    a = write_jsonl(tmp_path / "a.jsonl", texts(40))
    b = write_jsonl(tmp_path / "b.jsonl", texts(40, seed=1))
    first = build_corpus(str(a), tmp_path / "out")
    with pytest.raises(ConfigError, match=f"already holds corpus {first.hash}"):
        build_corpus(str(b), tmp_path / "out")
    with pytest.raises(ConfigError, match=r"val_fraction 0\.05"):
        build_corpus(str(a), tmp_path / "out", val_fraction=0.3)
    assert open_corpus(tmp_path / "out") == first
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("x")
    with pytest.raises(ConfigError, match=r"not empty and holds no corpus\.json"):
        build_corpus(str(a), tmp_path / "full")
    assert (tmp_path / "full" / "precious").read_text() == "x"


def test_files_and_row_groups_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus_module, "ROW_GROUP_BYTES", 2000)
    monkeypatch.setattr(corpus_module, "FILE_BYTES", 10_000)
    documents = texts(60)
    source = write_jsonl(tmp_path / "a.jsonl", documents)
    info = build_corpus(str(source), tmp_path / "out", val_fraction=0.1)
    assert len(info.files["train"]) > 3
    assert all(f["num_bytes"] < 10_000 + 2000 + 3100 for f in info.files["train"])
    assert list(iter_texts(info)) == [t for t in documents if expected_split(t, 0.1) == "train"]


def test_training_texts_take_an_even_share(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", texts(400))
    info = build_corpus(str(source), tmp_path / "out")
    everything = list(training_texts(info))
    share = list(training_texts(info, max_bytes=info.train_bytes // 4))
    assert everything == list(iter_texts(info)) and share == list(training_texts(info, max_bytes=info.train_bytes // 4))
    assert set(share) < set(everything) and 0.1 < sum(map(len, share)) / sum(map(len, everything)) < 0.45


def test_seen_hashes_is_a_set() -> None:
    rng = np.random.default_rng(0)
    keys = [int(k) for k in rng.integers(0, 2**64, 3000, np.uint64)] + [0, 2**64 - 1]
    seen, reference = _SeenHashes(recent=100), set[int]()
    for key in [*keys, *keys[::3]]:
        assert seen.add(key) == (key not in reference)
        reference.add(key)


@pytest.mark.slow
def test_the_standard_library_is_a_corpus(tmp_path: Path) -> None:
    info = build_corpus("stdlib", tmp_path / "out")
    root = Path(sysconfig.get_paths()["stdlib"])
    kept = set(iter_texts(info, "train")) | set(iter_texts(info, "val"))
    assert info.num_docs > 500 and (root / "argparse.py").read_text(encoding="utf8") in kept
    assert 0.01 < info.val_docs / info.num_docs < 0.12
    assert info.dropped["not_utf8"] == len(info.left_out)
    for name in info.left_out:
        with pytest.raises(UnicodeDecodeError):
            (root / name.removeprefix("stdlib/")).read_bytes().decode("utf8")
    sources = [p for p in root.rglob("*.py") if "site-packages" not in p.parts and "dist-packages" not in p.parts]
    assert info.num_docs + sum(info.dropped.values()) == len(sources)


BAD_LINES = [
    (b'{"text": "fine"}\n{"text": "\xff"}\n', r"a\.jsonl: line 2: document is not UTF-8 \(byte 10\); convert or remove it"),
    (b'{"text": "\\ud800"}\n', r"line 1: document is not UTF-8 \(lone surrogate at character 0\)"),
    (b'{"text": "fine"}\n{"content": "x"}\n', r"line 2: no string field 'text'"),
    (b'{"text": 3}\n', r"line 1: no string field 'text'"),
    (b"[1]\n", r"line 1: no string field 'text'"),
    (b'{"text": "cut', r"line 1: not valid JSON at character 9 \(cut short\?\); mend or remove the line"),
]


@pytest.mark.parametrize(("data", "message"), BAD_LINES)
def test_bad_jsonl_names_file_line_and_remedy_and_writes_nothing(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_bytes(data)
    with pytest.raises(ConfigError, match=message) as caught:
        build_corpus(str(tmp_path / "in"), tmp_path / "work" / "out")
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "work").iterdir()) == []


def overwrite(path: Path, at: int, data: bytes) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[:at] + data + whole[at + len(data) :])


def test_bad_parquet_names_file_and_remedy(tmp_path: Path) -> None:
    cases = {
        "column": (lambda p: write_parquet(p, pa.array(["x"]), "content"), r"no column 'text', only 'content'; rename"),
        "type": (lambda p: write_parquet(p, pa.array([1])), r"column 'text' is of type int64, not text"),
        "null": (lambda p: write_parquet(p, pa.array(["x", None])), r"row 1: 'text' is null"),
        "bytes": (lambda p: write_parquet(p, pa.array([b"x", b"y", b"\xc3("])), r"row 2: document is not UTF-8 \(byte 0\)"),
        "torn": (lambda p: (write_parquet(p, pa.array(["x"] * 99)), p.write_bytes(p.read_bytes()[:-20])), "not a readable parquet"),
        "page": (lambda p: (write_parquet(p, pa.array(["x"] * 99)), overwrite(p, 4, b"\xff" * 20)), "not a readable parquet"),
        "empty": (lambda p: (p.parent.mkdir(), p.write_bytes(b"")), "not a readable parquet"),
    }
    for name, (write, message) in cases.items():
        path = tmp_path / name / "a.parquet"
        write(path)
        with pytest.raises(ConfigError, match=message) as caught:
            build_corpus(str(path), tmp_path / "work" / "out")
        assert str(path) in str(caught.value)
        assert not (tmp_path / "work").exists() or list((tmp_path / "work").iterdir()) == []


def test_missing_empty_and_too_small_sources(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'stdlbi' does not exist; give 'stdlib' or 'site-packages', or a file or folder"):
        build_corpus("stdlbi", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with gzip.open(tmp_path / "empty" / "a.jsonl.gz", "wb") as f:
        f.write(b"{}")
    with pytest.raises(ConfigError, match=r"holds no \.parquet or \.jsonl file"):
        build_corpus(str(tmp_path / "empty"), tmp_path / "out")
    write_jsonl(tmp_path / "none.jsonl", [])
    with pytest.raises(ConfigError, match="holds 0 documents"):
        build_corpus(str(tmp_path / "none.jsonl"), tmp_path / "out")
    source = write_jsonl(tmp_path / "few.jsonl", [t for t in texts(30) if expected_split(t, 0.05) == "train"])
    with pytest.raises(ConfigError, match=r"none of its \d+ documents falls to validation .* of at least 0\.\d+$") as caught:
        build_corpus(str(source), tmp_path / "out")
    assert build_corpus(str(source), tmp_path / "out", val_fraction=float(str(caught.value).rsplit(" ", 1)[1])).val_docs >= 1
    with pytest.raises(ConfigError, match=r"val_fraction 1\.5 must lie between 0 and 1"):
        build_corpus(str(source), tmp_path / "out2", val_fraction=1.5)


def test_a_broken_corpus_is_named(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", texts(40))
    build_corpus(str(source), tmp_path / "out")
    file = tmp_path / "out" / "train" / "00000.parquet"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    with pytest.raises(ConfigError, match=r"00000\.parquet has \d+ bytes, corpus\.json says \d+"):
        open_corpus(tmp_path / "out")
    file.unlink()
    with pytest.raises(ConfigError, match=r"00000\.parquet is missing"):
        build_corpus(str(source), tmp_path / "out")
    file.write_bytes(whole)
    text = (tmp_path / "out" / "corpus.json").read_text()
    (tmp_path / "out" / "corpus.json").write_text(text[:50])
    with pytest.raises(ConfigError, match=r"corpus\.json: not valid JSON"):
        open_corpus(tmp_path / "out")
    (tmp_path / "out" / "corpus.json").write_text(json.dumps({"schema_version": 99}))
    with pytest.raises(ConfigError, match="another schema"):
        open_corpus(tmp_path / "out")
    with pytest.raises(ConfigError, match="no corpus at"):
        open_corpus(tmp_path / "nowhere")
