"""The picture is an extra: a run without it is complete, and says so at its start."""

import sys

import pytest

from opsdc.cli import main
from opsdc.eval import plots
from opsdc.train import OPSDCTrainer


def test_without_matplotlib_a_run_is_complete(make_config, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    summary = OPSDCTrainer(None, make_config(**{"train.steps": 2})).train()
    shown = capsys.readouterr()
    (line,) = [x for x in shown.out.splitlines() if x.startswith("plot.png:")]
    assert line.endswith('not installed: pip install "opsdc[plot]"')
    # Before the first step, not after the last.
    assert shown.out.index(line) < shown.out.index("step 1/2")
    assert summary["steps"] == 2
    assert (tmp_path / "run" / "summary.json").is_file()
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
    assert not (tmp_path / "run" / "plot.png").exists()
    assert main(["plot", str(tmp_path / "run")]) == 2
    assert 'pip install "opsdc[plot]"' in capsys.readouterr().err


@pytest.mark.parametrize("error", [OSError("no font"), ValueError("log scale"), MemoryError()])
def test_a_picture_that_fails_is_a_line(make_config, tmp_path, monkeypatch, capsys, error):
    def broken(*arguments, **keywords):
        raise error

    monkeypatch.setattr("matplotlib.figure.Figure.subplots", broken)
    settings = {"train.steps": 1, "eval.problems": 0}
    assert OPSDCTrainer(None, make_config(**settings)).train()["steps"] == 1
    assert f"later: opsdc plot {tmp_path / 'run'}" in capsys.readouterr().err
    assert plots.no_picture() is None
