"""The record on disk: what a reader finds after a crash, and what is synced before what."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from opsdc.errors import CheckpointError
from opsdc.eval.answers import Answer, read_answers, write_answers
from opsdc.ranks.talk import ALONE
from opsdc.record.lines import Lines, RunRecord, read_lines, write_json, write_text

ROWS = [{"step": n, "text": f"t{n}"} for n in range(1, 5)]
ENCODED = [json.dumps(row).encode() + b"\n" for row in ROWS]

DAMAGE = [
    b'{"step": 2, "te\n',
    b"\n",
    b"\0\0\0\0\n",
    '{"step": 2, "text": "café'.encode()[:-1],
    b'{"step": 2, "text": "caf\xc3"}\n',
    b'{"step": 2}{"step": 3}\n',
]


@pytest.mark.parametrize("damaged", DAMAGE)
def test_a_damaged_line_ends_the_record(tmp_path, damaged):
    """Nothing after it is trusted: its rows may be of another attempt at the same steps."""
    path = tmp_path / "m.jsonl"
    path.write_bytes(ENCODED[0] + damaged + ENCODED[2] + ENCODED[3])
    assert read_lines(path) == ROWS[:1]
    # Opened to go on, the file itself ends there.
    Lines(path, after_step=4).write(ROWS[1])
    assert path.read_bytes() == ENCODED[0] + ENCODED[1]


@pytest.mark.parametrize("end", ["\u2028", "\u2029", "\x85", "\r", "\x0b", "\x0c", "\x1c", "\r\n"])
def test_a_text_may_hold_any_end_of_line(tmp_path, end):
    path = tmp_path / "r.jsonl"
    rows = [{"step": 1, "text": f"a{end}b"}, {"step": 2, "text": end}]
    lines = Lines(path, after_step=0)
    lines.write(*rows)
    assert read_lines(path) == rows
    Lines(path, after_step=1)
    assert read_lines(path) == rows[:1]
    given = [
        Answer(
            problem_id=f"p{i}", sample=0, question=end, gold=None, text=f"x{end}", tokens=1,
            truncated=False, correct=None, extracted=None,
        )
        for i in range(3)
    ]  # fmt: skip
    write_answers(tmp_path / "a.jsonl", given)
    assert read_answers(tmp_path / "a.jsonl") == given


def test_later_steps_are_dropped_and_no_file_is_no_row(tmp_path):
    path = tmp_path / "new" / "m.jsonl"
    assert read_lines(path) == []
    Lines(path, after_step=0).write(*ROWS)
    for last in (3, 2, 0):
        Lines(path, after_step=last)
        assert read_lines(path) == ROWS[:last]
    Lines(path, after_step=0, writes=False).write(*ROWS)
    assert read_lines(path) == []
    with pytest.raises(ValueError, match="JSON compliant"):
        Lines(path, after_step=0).write({"step": 1, "loss": float("nan")})


@pytest.fixture
def synced(monkeypatch):
    """(name, contents) of each file at the moment it is synced to disk."""
    seen: list[tuple[str, bytes]] = []
    sync = os.fsync

    def record(fd):
        path = Path(os.readlink(f"/proc/self/fd/{fd}"))
        seen.append((path.name, b"" if path.is_dir() else path.read_bytes()))
        sync(fd)

    monkeypatch.setattr(os, "fsync", record)
    return seen


def test_rows_are_synced_when_write_returns(tmp_path, synced):
    lines = Lines(tmp_path / "m.jsonl", after_step=0)
    synced.clear()
    lines.write(*ROWS[:2])
    assert synced == [("m.jsonl", ENCODED[0] + ENCODED[1])]
    lines.write(ROWS[2])
    assert synced[1:] == [("m.jsonl", b"".join(ENCODED[:3]))]


def test_a_file_is_synced_before_it_takes_its_name(tmp_path, synced, monkeypatch):
    path = tmp_path / "summary.json"
    write_text(path, "old")
    replaced = []
    replace = Path.replace

    def note(self, target):
        replaced.append((list(synced), target.read_text()))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", note)
    synced.clear()
    write_json(path, {"a": "é"})
    text = '{\n "a": "é"\n}'
    assert replaced == [([(".summary.json.tmp", text.encode())], "old")]
    assert path.read_text("utf-8") == text
    assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]


def test_a_commit_has_its_responses_on_disk_before_its_row(make_config, tmp_path, synced):
    record = RunRecord(make_config(**{"log.every": 9}), after_step=0, ranks=ALONE)
    synced.clear()
    assert record.commit({"step": 1, "loss_nats": 0.5}, [{"step": 1, "text": "a"}])["step"] == 1
    assert [name for name, _ in synced] == ["rollouts.jsonl", "metrics.jsonl"]
    assert all(b'"step": 1' in contents for _, contents in synced)
    assert record.history == read_lines(tmp_path / "run" / "metrics.jsonl")
    record.cut(0)
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        assert read_lines(tmp_path / "run" / name) == []


def test_what_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for write in (
        lambda path: Lines(path, after_step=0),
        lambda path: write_text(path, "x"),
    ):
        with pytest.raises(CheckpointError, match=r"cannot write .*m\.jsonl.*make room there"):
            write(tmp_path / "file" / "m.jsonl")


def test_an_evaluation_stands_in_the_row_of_its_step(make_config, tmp_path):
    record, path = (
        RunRecord(make_config(**{"log.every": 9}), after_step=0, ranks=ALONE),
        tmp_path / "run",
    )
    rows = [{"step": step, "loss_nats": 0.5} for step in (1, 2, 3)]
    assert record.evaluated(0, {"accuracy": 0.5, "tokens_mean": 9.0})
    for row in rows[:2]:
        # A step's own values are what callbacks are sent.
        assert record.commit(row, []) == row
    # A gate decides before its step is complete.
    assert record.evaluated(3, {"accuracy": 0.2})
    record.commit(rows[2], [])
    assert record.evaluated(2, {"accuracy": 0.4})
    assert not record.evaluated(2, {"accuracy": 0.4})
    base, second = {"base/accuracy": 0.5, "base/tokens_mean": 9.0}, {"eval/accuracy": 0.4}
    whole = [rows[0] | base, rows[1] | second, rows[2] | {"eval/accuracy": 0.2}]
    assert read_lines(path / "metrics.jsonl") == record.history == whole
    # A resumed run has them once, and what comes later is written after the cut.
    record = RunRecord(make_config(**{"log.every": 9}), after_step=2, ranks=ALONE)
    assert not record.evaluated(2, {"accuracy": 0.4})
    record.commit(rows[2], [])
    record.cut(1)
    assert record.evaluated(1, {"accuracy": 0.3})
    assert read_lines(path / "metrics.jsonl") == [whole[0] | {"eval/accuracy": 0.3}]
