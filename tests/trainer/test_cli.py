"""The command as a user types it."""

import json
import subprocess
import sys
import time

import pytest

from opsdc.cli import main

pytestmark = pytest.mark.whole


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_folder, problem_file):
    out = tmp_path_factory.mktemp("cli") / "run"
    flags = {
        "output_dir": out,
        "model.name_or_path": tiny_folder,
        "data.source": problem_file,
        "data.options": "{}",
        "data.eval_size": 6,
        "data.gate_size": 0,
        "prompt.instruction": "Be brief.",
        "rollout.prompts_per_step": 4,
        "rollout.max_new_tokens": 12,
        "teacher.mode": "refresh",
        "teacher.refresh_steps": 2,
        "train.steps": 4,
        "train.keep_best": "false",
        "eval.problems": 4,
        "eval.max_new_tokens": 8,
    }
    arguments = [part for k, v in flags.items() for part in (f"--{k}", str(v))]
    done = subprocess.run(
        [sys.executable, "-m", "opsdc", "train", *arguments], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return out, done.stdout, arguments


def test_train_prints_steps_and_the_comparison(finished):
    _, stdout, _ = finished
    assert "step 4/4" in stdout
    assert stdout.count("teacher refreshed") == 2
    for words in ("token reduction", "before,", "after,", "by the length", "told to be"):
        assert words in stdout


def test_the_same_command_goes_on(finished, capsys):
    out, _, arguments = finished
    assert main(["train", *arguments, "--train.steps", "5"]) == 0
    shown = capsys.readouterr()
    assert "resuming after step 4" in shown.out
    assert "train.steps: 4 → 5" in shown.err
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 5


def test_quiet_leaves_the_report_and_verbose_lists_the_checks(finished, tmp_path):
    def said(*more):
        command = [*finished[2], "--output_dir", str(tmp_path / more[0].strip("-")), *more]
        command = [sys.executable, "-m", "opsdc", "train", *command]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done

    quiet, verbose = said("-q"), said("-v")
    assert "token reduction" in quiet.stdout
    assert "step 1/" not in quiet.stdout + quiet.stderr
    assert "position/s" not in quiet.stderr
    assert "head: the model's own logits" in verbose.stdout
    assert "checks before step 1 passed" in finished[1]
    assert "head: the model's own logits" not in finished[1]


def test_eval_anew(finished, tmp_path, capsys):
    out, _, _ = finished
    target = tmp_path / "again"
    flags = ["--output_dir", str(target), "--eval.samples", "2"]
    assert main(["eval", str(out), *flags]) == 0
    assert "token reduction" in capsys.readouterr().out
    assert json.loads((target / "summary.json").read_text())["base"]["answers"] == 8


def test_eval_on_all_of_another_file(finished, tmp_path, capsys):
    """Nothing is trained, so nothing need be left to train on."""
    out, _, _ = finished
    rows = [{"problem": f"What is {a} + 1?", "answer": str(a + 1)} for a in range(5)]
    (tmp_path / "other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--data.source", str(tmp_path / "other.jsonl"), "--data.eval_size", "5"]
    flags += ["--eval.problems", "5", "--output_dir", str(tmp_path / "other")]
    assert main(["eval", str(out), *flags]) == 0
    assert json.loads((tmp_path / "other" / "summary.json").read_text())["base"]["answers"] == 5
    capsys.readouterr()
    assert main(["eval", str(out), *flags, "--data.eval_size", "6"]) == 2
    assert "data.eval_size 6 of 5 problems" in capsys.readouterr().err


def test_plot_elsewhere(finished, tmp_path):
    out, _, _ = finished
    assert main(["plot", str(out), "--output", str(tmp_path / "p.png")]) == 0
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"


def test_plot_lays_runs_over_one_another(finished, tmp_path):
    out, _, _ = finished
    for name, status in (("p.png", 0), ("none/p.png", 2)):
        assert main(["plot", str(out), str(out), "--output", str(tmp_path / name)]) == status
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("colour", ["--color", "--no-color"])
def test_inspect_shows_prompts_ids_mask_and_divergence(finished, capsys, colour):
    out, _, _ = finished
    assert main(["inspect", "--config", str(out / "config.yaml"), "--problem", "1", colour]) == 0
    shown = capsys.readouterr().out
    for words in ("student prompt", "teacher prompt", "Be brief.", "mask:", "log p student"):
        assert words in shown
    assert ("\033[" in shown) == (colour == "--color")


def test_inspect_own_text_with_braces_and_control_tokens(finished, capsys):
    out, _, _ = finished
    text = r"What is \boxed{1+1}? {{ x }} <|im_end|> {0}"
    assert main(["inspect", "--config", str(out / "config.yaml"), "--text", text]) == 0
    assert text in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "--config", "missing.yaml"], "recipes"),
        (["train", "--optim.lr", "fast"], "optim.lr must be a number"),
        (["train", "--data.source", "none.jsonl"], "none.jsonl"),
        (["eval", "nowhere"], "config.yaml"),
        (["plot", "nowhere"], "no steps"),
        (["inspect", "--problem", "999"], "--problem must be between"),
    ],
)
def test_mistakes_end_in_one_line(arguments, words, capsys, smollm2):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert words in error
    assert "Traceback" not in error


def test_help_teaches_and_is_quick():
    started = time.perf_counter()
    shown = subprocess.run(
        [sys.executable, "-m", "opsdc", "train", "--help"], capture_output=True, text=True
    ).stdout
    assert time.perf_counter() - started < 5
    for words in ("--teacher.refresh_steps", "paper: 1e-6", "smollm2-cpu", "metrics.jsonl"):
        assert words in shown
