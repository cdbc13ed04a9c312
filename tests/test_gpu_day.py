"""The GPU day, rehearsed: it runs, stops, goes on, and its seconds add up."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from benchmarks import gpu_day, tables
from benchmarks.contenders import Contender, materialized
from benchmarks.gpu import contest, report, tiles
from benchmarks.gpu.stages import CANDIDATES, Cell, Stage, stages
from benchmarks.gpu.worker import Answer, Worker
from opsdc_kernels import auto

H200_CORES = 16
ENVIRONMENT = {"source": "x", "versions": {}, "device": "none", "rehearsal": True, "missing": []}


def test_the_day_is_forecast_to_fit():
    planned = stages(small=False, cores=H200_CORES)
    assert [stage.key for stage in planned] == ["a", "b", "c", "d"]
    for stage in planned:
        assert stage.seconds <= stage.limit, stage.title
    assert sum(stage.limit for stage in planned) <= gpu_day.LIMIT
    assert planned[0].limit <= 90
    names = [f"{stage.key}: {cell.name}" for stage in planned for cell in stage.cells]
    assert len(names) == len(set(names))


def test_every_part_of_a_forecast_counts():
    cells = [Cell("x", "check", {}, {"compiling": 3.0, "calls": 2.0})] * 4
    assert Stage("a", "a", 90, cells, workers=2).seconds == pytest.approx(12 + 4 * 5 / 2)
    said = Stage("a", "a", 90, cells).arithmetic()
    assert said == "12 s start + (12 s compiling + 8 s calls)"


def test_the_forecast_is_printed_without_a_gpu(capsys):
    assert gpu_day.main(["--forecast", "--cores", str(H200_CORES)]) == 0
    said = capsys.readouterr().out
    total = sum(stage.seconds for stage in stages(small=False, cores=H200_CORES))
    assert f"= {total:.0f} s of 480" in said


def test_the_shipped_tiles_are_tried_first():
    from opsdc_kernels.fused.configs import config_for

    for (kernel, shared), configs in CANDIDATES.items():
        assert configs[0] == config_for(kernel, "sm_90", "bf16", shared=shared, extras=False)
        assert len(set(configs)) == len(configs)


def day(tmp_path, limit=100.0, **environment):
    return gpu_day.Day(tmp_path, {**ENVIRONMENT, **environment}, limit)


def test_results_count_for_the_same_code_and_device_only(tmp_path):
    cell, stage = Cell("x", "check", {}, {}), Stage("a", "a", 90, [])
    first = day(tmp_path)
    first.write("a: x", stage, cell, Answer([], "it broke", 1.0))
    # Killed within a line: that line is lost, the others are not.
    with (tmp_path / "cells.jsonl").open("a") as file:
        file.write('\n{"key": "a: y", "ident')
    again = day(tmp_path)
    assert set(again.results) == {"a: x"}
    again.write("a: z", stage, cell, Answer([], None, 1.0))
    assert set(day(tmp_path).results) == {"a: x", "a: z"}
    for other in ({"source": "y"}, {"device": "another"}, {"versions": {"torch": "3"}},
                  {"rehearsal": False}):  # fmt: skip
        assert not day(tmp_path, **other).results


def test_cells_that_no_longer_fit_are_cut_and_said(tmp_path, capsys):
    cells = [Cell("long", "nothing", {}, {"calls": 50.0}), Cell("also", "nothing", {}, {"x": 60.0})]
    late = day(tmp_path, limit=40.0)
    late.run(Stage("a", "a", 90, cells), 90, "cpu")
    assert late.cut == ["long", "also"]
    assert "long: cut, 50 s no longer fit" in capsys.readouterr().out
    # Within the day, but not within the stage.
    early = day(tmp_path)
    early.run(Stage("a", "a", 30, cells[:1]), 30, "cpu")
    assert early.cut == ["long"]


def test_cells_without_their_package_are_skipped(tmp_path, capsys):
    lacking = day(tmp_path, missing=["trl==1.16.0"])
    cell = Cell("TRL", "contest", {}, {}, "trl")
    lacking.run(Stage("b", "b", 90, [cell]), 90, "cpu")
    assert lacking.skipped == ["TRL"]
    assert not lacking.results
    assert "1 skipped for want of a package" in capsys.readouterr().out


def test_missing_packages_are_named_with_their_versions(monkeypatch):
    def version(name):
        raise gpu_day.PackageNotFoundError(name)

    monkeypatch.setattr(gpu_day, "version", version)
    found = gpu_day.missing_wheels()
    assert [name.split("==")[0] for name in found] == list(gpu_day.CARRIED)
    assert found[0].startswith("liger-kernel==")


def test_the_fastest_tiles_come_in_the_format_of_the_configurations():
    rows = [
        {"kernel": kernel, "shared": False, "config": [128, size, 64, 1, 16, 8, 4],
         "seconds": 1 / size, "teraflops": 1.0}
        for kernel in ("statistics", "gradient") for size in (64, 128, 32)
    ]  # fmt: skip
    text = tiles.winners(rows, "sm_90")
    assert text.count("Config(128, 128, 64, 1, 16, 8, 4)") == 2
    assert text.startswith('WIDE_STATISTICS = {\n    "sm_90": Config(')
    assert "GRADIENT = {" in text
    assert "SHARED" not in text


def test_times_of_a_wrong_loss_are_not_kept(monkeypatch):
    def measure(share, family):
        made = Contender("made up", lambda *tensors: share * materialized(*tensors), "torch")
        monkeypatch.setitem(contest.FAMILIES, family, lambda: iter([made]))
        return contest.measure(
            torch.device("cpu"), contender="made up", family=family, mode="trainable head",
            shape={"tokens": 6, "dim": 16, "vocab_size": 64}, repeats=1,
        )  # fmt: skip

    (row,) = measure(1.0, "ours")
    assert max(row["errors"].values()) < 1e-3
    assert row["of_roofline"] == pytest.approx(row["units"] / 4)
    with pytest.raises(ArithmeticError, match="no time counts"):
        measure(1.1, "ours")
    (peer,) = measure(1.1, "naive")  # whose errors stand in the table
    assert peer["errors"]["loss"] == pytest.approx(0.1, rel=1e-2)


@pytest.mark.whole
def test_a_cell_that_fails_hangs_or_dies_costs_itself_alone(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    good = {"backend": "chunked, rows in torch", "dtype": "float32", "divergence": "reverse_kl",
            "variant": "two heads", "small": True}  # fmt: skip
    worker = Worker("cpu")
    try:
        failed = worker.run("check", {**good, "divergence": "nonsense"}, 60)
        assert "divergence" in failed.error
        (row,) = worker.run("check", good, 60).rows
        assert row["over_budget"] == []
        hung = worker.run("check", good, 0.0)
        assert hung.error.startswith("not done after 0 s")
        assert worker.run("check", good, 60).rows
        worker._process.kill()
        worker._process.join()
        assert "died with status -9" in worker.run("check", good, 60).error
        assert worker.run("check", good, 60).rows
    finally:
        worker.close()


@pytest.mark.whole
def test_a_rehearsal_that_is_killed_goes_on(tmp_path, monkeypatch):
    out = tmp_path / "day"
    command = [sys.executable, "-m", "benchmarks.gpu_day", "--rehearse", "--out", str(out)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    file = out / "cells.jsonl"

    def done():
        lines = file.read_text().split("\n") if file.exists() else []
        return [json.loads(line) for line in lines[:-1] if line]

    first = subprocess.Popen(
        command, env=environment, cwd=gpu_day.ROOT, stdout=subprocess.PIPE, text=True
    )
    until = time.monotonic() + 300
    while len(done()) < 4 and first.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert first.returncode == -signal.SIGKILL, "it was over before it could be killed"
    kept = done()
    assert len(kept) >= 4
    again = subprocess.run(command, env=environment, cwd=gpu_day.ROOT, capture_output=True,
                           text=True, timeout=900)  # fmt: skip
    assert again.returncode == 0, again.stdout + again.stderr
    found = json.loads((out / f"{report.NAME}.json").read_text())
    planned = [cell.name for stage in stages(small=True, cores=2) for cell in stage.cells]
    skipped = found["skipped"]
    assert sorted([cell["cell"] for cell in found["cells"]] + skipped) == sorted(planned)
    assert found["cut"] == []
    for cell in kept:
        assert f"  {cell['cell']}: " not in again.stdout, "measured twice"
        assert {k: cell[k] for k in cell if k not in ("key", "identity")} in found["cells"]
    assert not any(map(report.is_wrong, found["cells"]))
    # What there is to see: errors, contenders, tiles, phases beside their plan, and what it is.
    text = (out / f"{report.NAME}.md").read_text()
    assert text.rstrip() == tables.render(found)
    for words in ("| fused | float32 | 2 of 2 |", "| ours, fused | frozen head |", "| backward |",
                  "No cell failed.", "A REHEARSAL on a CPU"):  # fmt: skip
        assert words in text
    assert "Config(16, " in (out / "configs.txt").read_text()
    # What `auto` would go by, if it were a GPU's.
    rows = auto.measurements(out / "measured.json")
    assert {row["mode"] for row in rows} == {"trainable head", "frozen head", "forward only"}
    call = auto.Call(
        tokens=20, vocab_size=96, dims=(32, 32), dtype=torch.float32, device=torch.device("cuda"),
        trainable=False, gradient=True, divergence="reverse_kl", shared_head=False,
        recomputes=False, extras=False, rows=20, workspace_bytes=1 << 20,
    )  # fmt: skip
    monkeypatch.setattr(auto, "MEASURED", out / "measured.json")
    chunked, fused = auto._measured(call, "interpreter")
    assert 0 < chunked < fused
    assert (out / f"{report.NAME}.png").stat().st_size > 1000


def test_what_is_wrong_is_listed():
    row = {"backend": "fused", "over_budget": ["dH is off by 1e+00"]}
    environment = {"command": "x", "versions": {"torch": "2"}, "device": "none", "threads": 1,
                   "commit": "0", "date": "today", "source": "0", "rehearsal": False}  # fmt: skip
    found = {
        "kind": report.KIND, "environment": environment, "seconds": {"b": 1.0}, "missing": [],
        "skipped": [], "cut": ["TRL, frozen head"],
        "cells": [
            {"stage": "b", "cell": "one", "error": None, "rows": [row]},
            {"stage": "b", "cell": "two", "error": "RuntimeError: no\nmemory", "rows": []},
            {"stage": "b", "cell": "three", "error": None, "rows": []},
        ],
    }  # fmt: skip
    text = tables.render(found)
    assert (
        "* one: dH is off by 1e+00\n* two: RuntimeError: no memory\n* TRL, frozen head: cut" in text
    )
    assert "three" not in text
