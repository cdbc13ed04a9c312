"""Files of problems: their kinds, compressed, by pattern and in lists."""

import csv
import gzip
import json

import pytest
from helpers.problems import load

from opsdc.errors import DataError

ROWS = [{"problem": f"Was ist {i}, „so“?\nUnd?", "answer": str(i)} for i in range(3)]


def write(folder, name, rows=ROWS):
    path = folder / name
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wt", encoding="utf-8", newline="") as file:
        if ".csv" in name:
            writer = csv.DictWriter(file, ["problem", "answer"])
            writer.writeheader()
            writer.writerows(rows)
        elif ".jsonl" in name:
            file.write("".join(json.dumps(row) + "\n" for row in rows))
        else:
            json.dump(rows, file)
    return path


@pytest.mark.parametrize(
    "name", ["p.csv", "p.csv.gz", "p.jsonl", "p.jsonl.gz", "p.json", "p.json.gz"]
)
def test_each_kind_holds_the_same_problems(tmp_path, name):
    problems = load(write(tmp_path, name))
    assert [p.messages[0]["content"] for p in problems] == [row["problem"] for row in ROWS]
    assert [p.answer for p in problems] == ["0", "1", "2"]
    assert [p.id for p in problems] == [f"{name}:{i}" for i in (1, 2, 3)]


def test_an_empty_cell_is_no_answer(tmp_path):
    path = write(tmp_path, "p.csv", [{"problem": "Q", "answer": ""}])
    assert load(path)[0].answer is None


def test_patterns_lists_and_the_home_folder(tmp_path, monkeypatch):
    (tmp_path / "more").mkdir()
    for name in ("a.jsonl", "b.jsonl", "more/a.jsonl"):
        write(tmp_path, name, ROWS[:1])
    monkeypatch.setenv("HOME", str(tmp_path))
    assert [p.id for p in load("~/*.jsonl")] == ["a.jsonl:1", "b.jsonl:1"]
    both = load(["~/b.jsonl", f"{tmp_path}/*/a.jsonl", "~/a.jsonl"])
    # Names that two files share are told apart.
    assert [p.id for p in both] == [
        "b.jsonl:1", f"{tmp_path}/more/a.jsonl:1", f"{tmp_path}/a.jsonl:1"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"problem,answer\nQ,1,2\n", "line 2: the row has more or fewer cells"),
        (b"problem,answer\nQ\n", "line 2: the row has more or fewer cells"),
        (b"problem,problem\nQ,1\n", "must name each column once"),
        (b'problem,answer\n"Q,1\n', "not CSV"),
        (b"problem,answer\n\xff,1\n", "not UTF-8 at byte"),
        (b"", "p.csv holds no problems"),
    ],
)
def test_a_bad_csv_file_is_named(tmp_path, content, sentence):
    (tmp_path / "p.csv").write_bytes(content)
    with pytest.raises(DataError, match=sentence):
        load(tmp_path / "p.csv")


def test_other_bad_files_are_named(tmp_path):
    whole = write(tmp_path, "p.jsonl.gz").read_bytes()
    for bad in (whole[:-20], b"no gzip", whole[:15] + b"x" * 9 + whole[24:]):
        (tmp_path / "bad.jsonl.gz").write_bytes(bad)
        with pytest.raises(DataError, match=r"cannot read .*bad.jsonl.gz"):
            load(tmp_path / "bad.jsonl.gz")
    with pytest.raises(DataError, match="no file matches"):
        load(f"{tmp_path}/*.csv")
