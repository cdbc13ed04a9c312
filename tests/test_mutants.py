"""The list of wrong edits behind `make mutants`; a run of it tells killed from survived."""

import ast
import json
from pathlib import Path

import mutants
import pytest
from helpers import edits

ROOT = Path(__file__).parents[1]


def planted(root, files):
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, "utf-8")
    return root


def test_the_choice_is_large_fixed_and_of_both_packages():
    chosen = edits.fixed_choice(ROOT, mutants.COUNT)
    assert chosen == edits.fixed_choice(ROOT, mutants.COUNT)
    assert len({edit.id for edit in chosen}) == len(chosen) >= 300
    for package in edits.PACKAGES:
        assert sum(edit.file.startswith(f"{package}/") for edit in chosen) >= 100
    for edit in chosen[::20]:
        source = (ROOT / edit.file).read_bytes()
        before, after = (ast.dump(ast.parse(x)) for x in (source, edit.applied(source)))
        assert before != after


def test_every_kind_of_edit(tmp_path):
    source = '''"""Text: 1 + 1."""
def f(x: int = 3) -> bool:
    if x < 4 and not g(x, 2.5):
        log(x)
    return max(-x, "é" in h)
'''
    planted(tmp_path, {"opsdc/a.py": source})
    found = edits.edits_of(tmp_path, tmp_path / "opsdc/a.py")
    assert {(x.kind, x.before, x.after) for x in found} == {
        ("constant", "3", "4"),
        ("condition negated", "x < 4 and not g(x, 2.5)", "(not (x < 4 and (not g(x, 2.5))))"),
        ("and for or", "x < 4 and not g(x, 2.5)", "(x < 4 or not g(x, 2.5))"),
        ("comparison", "x < 4", "(x <= 4)"), ("constant", "4", "5"),
        ("operator dropped", "not g(x, 2.5)", "(g(x, 2.5))"),
        ("arguments swapped", "g(x, 2.5)", "g(2.5, x)"), ("constant", "2.5", "5.0"),
        ("call dropped", "log(x)", "pass"),
        ("counterpart", 'max(-x, "é" in h)', "min(-x, 'é' in h)"),
        ("operator dropped", "-x", "(x)"), ("comparison", '"é" in h', "('é' not in h)"),
    }  # fmt: skip


def test_an_edit_keeps_its_name_when_others_come_and_go(tmp_path):
    function = "def f(x):\n    return x + 1\n"
    sources = (function, f"LIMIT = 7\n\n{function}")
    (first, second) = (
        {
            x.id
            for x in edits.edits_of(tmp_path, planted(tmp_path, {"opsdc/a.py": y}) / "opsdc/a.py")
        }
        for y in sources
    )
    assert first < second


@pytest.fixture
def small_tree(tmp_path, monkeypatch):
    tree = {
        "opsdc/a.py": "def double(x):\n    return x + x\n",
        "opsdc/b.py": "def unseen(x):\n    return x * 3\n",
        "tests/trainer/test_a.py": (
            "from opsdc import a, b\n\n\ndef test_double():\n    assert a.double(2) == 4\n"
            "    assert callable(b.unseen)\n"
        ),
    }
    planted(tmp_path, {**tree, "opsdc/__init__.py": "", "opsdc_kernels/__init__.py": ""})
    monkeypatch.setattr(mutants, "ROOT", tmp_path)
    monkeypatch.setattr(mutants, "RECORD", tmp_path / "record.jsonl")
    monkeypatch.setattr(
        mutants.subprocess, "check_output", lambda *_, **__: "\0".join(tree).encode()
    )
    monkeypatch.setattr("sys.argv", ["mutants.py", "--workers", "1"])
    return tmp_path


@pytest.mark.whole
def test_a_run_kills_survives_and_goes_on(small_tree, capsys):
    mutants.main()
    shown = capsys.readouterr().out
    rows = [json.loads(x) for x in (small_tree / "record.jsonl").read_text().splitlines()]
    outcomes = {row["before"]: (row["outcome"], row["by"]) for row in rows if "id" in row}
    assert outcomes["x + x"] == ("killed", "tests/trainer/test_a.py")
    assert outcomes["x * 3"] == ("survived", None)
    assert "survived: opsdc/b.py:2 operator: x * 3 → (x / 3)" in shown
    assert (small_tree / "opsdc/a.py").read_text() == "def double(x):\n    return x + x\n"
    mutants.main()
    assert "0 to come" in capsys.readouterr().out
    assert len((small_tree / "record.jsonl").read_text().splitlines()) == len(rows)
