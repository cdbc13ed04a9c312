"""The ablations of docs/effect.md: cells go on, a cell of other settings is not taken for one."""

import json
from pathlib import Path

import pytest

from benchmarks import effect, effect_tables, record
from opsdc.eval.answers import Answer, write_answers


def answers(right, tokens, n=40):
    return [
        Answer(
            problem_id=f"p{i}",
            sample=0,
            question="?",
            gold="1",
            text="",
            tokens=tokens + i % 5,
            truncated=False,
            correct=i < right,
            extracted="1",
        )
        for i in range(n)
    ]


@pytest.fixture
def folder(tmp_path):
    """One seed of the base, the demo and an arm whose name holds a dot and a comma."""
    for name, right, tokens in (
        ("base-0", 10, 50),
        ("told-0", 30, 12),
        ("difficulty-0", 12, 50),
        ("trained-the_demo-0", 28, 12),
        ("trained-refresh_4_anchor_0.1-0", 20, 20),
    ):
        write_answers(tmp_path / f"{name}.jsonl", answers(right, tokens))
    steps = [
        {"tokens": t, "entropy": 1.5, "seconds": 30.0, "dial": 1.0, "relative_length": t / 50}
        for t in (50, 40, 20, 15)
    ]
    cell = {"kept": 4, "steps": steps, "evaluated": {"0": {"tokens_mean": 50, "accuracy": 0.2}}}
    (tmp_path / "cells").mkdir()
    for arm in (effect.BASE, effect.DEMO, "refresh 4, anchor 0.1"):
        path = tmp_path / "cells" / f"{effect._file(arm, 0)}.json"
        path.write_text(json.dumps({"settings": effect._settings(arm, 8, 132), **cell}))
    return tmp_path


def test_what_there_is_is_summed_up(folder):
    found = effect.summary(8, 132, folder)
    assert list(found) == ["told", "the demo", "refresh 4, anchor 0.1"]
    demo = found["the demo"]
    assert demo["against_base"]["accuracy_difference"] == pytest.approx(18 / 40)
    assert demo["by_seed"][0]["against_told"]["accuracy_difference"] == pytest.approx(-2 / 40)
    # Rollouts show the updates before them: the third is the first below half.
    assert demo["steps_to_half"] == [2]
    assert demo["minutes_to_half"] == [1.0]


def test_a_cell_of_other_settings_is_measured_anew(folder):
    assert effect.stored("the demo", 0, 8, 132, folder)
    assert effect.stored("refresh 4, anchor 0.1", 0, 12, 132, folder) is None
    assert effect.stored("refresh 4, anchor 0.1", 1, 8, 132, folder) is None


def test_every_arm_is_a_run_that_can_be_made(tmp_path):
    names = {effect._file(arm, 0) for arm in effect.EVERY_ARM}
    assert len(names) == len(effect.EVERY_ARM)
    for arm in effect.EVERY_ARM:
        config = effect.config_of(arm, 1, 8, tmp_path)
        assert config.seed == 1
        long = arm == effect.DEMO or arm in effect.TARGETS
        assert config.train.steps == (24 if long else 8)


def test_tables_say_what_is_not_measured(folder):
    found = {
        "steps": 8,
        "arms": effect.summary(8, 132, folder),
        "environment": {
            "command": "python -m benchmarks --save",
            "device": "a CPU",
            "threads": 1,
            "versions": {"torch": "2.13.0"},
            "commit": "0" * 40,
            "date": "2026-11-30",
        },
    }
    made = effect_tables.tables(found)
    assert "Not measured yet: frozen" in made["arms"]
    assert "| refresh 4, anchor 0.1 | 1 | 22.0 | 50.0% |" in made["arms"]
    assert "| 0 | 52.0, 25.0% |" in made["demo"]
    page = "a\n<!-- effect: demo -->\nold\n<!-- end: demo -->\nb\n"
    assert effect_tables.filled(page, found) == page.replace("old", made["demo"])


@pytest.mark.skipif(not effect.RECORD.is_file(), reason="no record of benchmarks.effect yet")
@pytest.mark.parametrize("page", effect_tables.PAGES, ids=lambda page: Path(page).name)
def test_pages_show_the_record(page):
    text = page.read_text("utf-8")
    assert "<!-- effect: demo -->" in text
    assert effect_tables.filled(text, record.load(effect.RECORD)) == text
