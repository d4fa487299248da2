"""Files in, rows out; and one sentence for each way a file can be wrong."""

import csv
import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest

from rljax.data.rows import DataError, load_rows

pytestmark = pytest.mark.fast

ROWS = [{"question": "1+1?", "answer": "2"}, {"question": "2+2?", "answer": "4"}]


def write(path, kind):
    lines = "\n".join(map(json.dumps, ROWS)) + "\n\n"
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    elif kind == "csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["question", "answer"])
            writer.writeheader()
            writer.writerows(ROWS)
    elif kind.endswith(".gz"):
        path.write_bytes(gzip.compress((json.dumps(ROWS, indent=1) if kind == "json.gz" else lines).encode()))
    else:
        path.write_text(json.dumps(ROWS, indent=1) if kind == "json" else lines)


@pytest.mark.parametrize("kind", ["jsonl", "json", "jsonl.gz", "json.gz", "parquet", "csv"])
def test_every_kind_gives_the_same_rows(tmp_path, kind):
    write(tmp_path / f"train.{kind}", kind)
    assert load_rows(str(tmp_path / f"train.{kind}")) == ROWS
    assert load_rows(str(tmp_path), "train") == ROWS


def test_text_file_is_a_row_a_line(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    assert load_rows(str(tmp_path / "a.txt")) == [{"text": "one"}, {"text": "two"}]


def test_folder_takes_the_files_of_the_split(tmp_path):
    (tmp_path / "data").mkdir()
    for name, value in [("test-00000-of-00002", 1), ("test-00001-of-00002", 2), ("testing", 3), ("train", 4)]:
        (tmp_path / "data" / f"{name}.jsonl").write_text(json.dumps({"x": value}))
    assert load_rows(str(tmp_path), "test") == [{"x": 1}, {"x": 2}]
    with pytest.raises(DataError, match=r"no file for split 'dev', such as dev.jsonl; it has .*train.jsonl"):
        load_rows(str(tmp_path), "dev")


def test_columns_are_renamed_and_the_others_stay():
    rows = load_rows("arithmetic", options={"count": 3}, columns={"completion": "solution"})
    assert all("completion" in row and "solution" not in row and "answer" in row for row in rows)


def test_swapped_columns(tmp_path):
    write(tmp_path / "a.jsonl", "jsonl")
    rows = load_rows(str(tmp_path / "a.jsonl"), columns={"answer": "question", "question": "answer"})
    assert rows[0] == {"answer": "1+1?", "question": "2"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", r"a.jsonl is empty$"),
        ("a.jsonl", b" \n\n", r"a.jsonl is empty$"),
        ("a.jsonl", b'{"x": 1}\n\n{"x": 2\n', r"a.jsonl is malformed at line 3: "),
        ("a.json", b'[\n{"x": 1},\n{"x" 2}\n]', r"a.json is malformed at line 3: "),
        ("a.jsonl", b'{"x": 1}\n7\n', r"a.jsonl has a int at line 2 where a row must be an object"),
        ("a.json", b'[{"x": 1}, "y"]', r"a.json has a str at entry 1 where a row must be an object"),
        ("a.json", b"[]", r"has no rows in split 'train'"),
        ("a.csv", b"x,y\n1,2\n3\n", r"a.csv is malformed at line 3: .*2 columns"),
        ("a.jsonl", b'{"x": 1}\n{"x": "\xff"}\n', r"a.jsonl is not UTF-8 at line 2"),
        ("a.jsonl.gz", b"plain", r"a.jsonl.gz is not readable gzip"),
        ("a.parquet", b"PAR1", r"a.parquet is not readable parquet"),
        ("a.xml", b"<x/>", r"a.xml is of no known kind; known are .jsonl"),
    ],
)
def test_bad_files_are_named_in_one_sentence(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        load_rows(str(tmp_path / name))
    assert "\n" not in str(error.value)


def test_missing_file_and_missing_column(tmp_path):
    with pytest.raises(DataError, match=r"data file .*nope.jsonl does not exist"):
        load_rows(str(tmp_path / "nope.jsonl"))
    write(tmp_path / "a.jsonl", "jsonl")
    with pytest.raises(DataError, match=r"row 0 of .* has no column 'prompt' for 'prompt'; it has question, answer"):
        load_rows(str(tmp_path / "a.jsonl"), columns={"prompt": "prompt"})


def test_unknown_name_is_said_with_the_known_ones(monkeypatch):
    import datasets

    def offline(*_, **__):
        raise ConnectionError("no network\nsecond line")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(DataError, match=r"nor a generated task \(arithmetic, .*, countdown, stories\), .*no network$"):
        load_rows("arithmetik")


def test_hub_path_reads_through_datasets(tmp_path, monkeypatch):
    import datasets

    write(tmp_path / "train.jsonl", "jsonl")
    load = datasets.load_dataset
    cache = str(tmp_path / "cache")
    monkeypatch.setattr(datasets, "load_dataset", lambda _, split: load(str(tmp_path), split=split, cache_dir=cache))
    assert load_rows("someone/sums", "train") == ROWS


@pytest.mark.parametrize(
    ("path", "split", "count"),
    [
        ("gsm8k", "train", 7473),
        ("gsm8k", "test", 1319),
        ("verl_arith", "train", 800),
        ("prefs/hh_helpful_base_test.jsonl.gz", "test", 2354),
        ("prefs/kto_en_demo.json", "train", 300),
        ("countdown/sudoku_4x4_test.csv", "test", 500),
    ],
)
def test_real_files(data_dir, path, split, count):
    assert len(load_rows(str(data_dir / "datasets" / path), split)) == count
