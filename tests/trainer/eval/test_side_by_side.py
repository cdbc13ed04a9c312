"""`opsdc eval` of anything: a run, a plain folder, an adapter, two models, a suite."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import peft
import pytest
from helpers.problems import written
from helpers.tiny import byte_tokenizer, tiny_model
from helpers.vllm_runs import needs_vllm, small_folder
from tokenizers import AddedToken

from opsdc.cli import main
from opsdc.config.settings import OPSDCConfig
from opsdc.data.prompts import build_prompts
from opsdc.data.sources import load_problems
from opsdc.eval.answers import read_answers
from opsdc.models.given import given_model

QUICK = ("--eval.max_new_tokens", "8", "--eval.scorer", "number", "--instruction", "Be brief.")


@pytest.fixture(autouse=True)
def aside(tmp_path, monkeypatch):
    """Names of default folders are relative."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OPSDC_DATA", raising=False)


@pytest.fixture
def data(tmp_path):
    rows = [{"problem": f"What is {a} + 1?", "answer": str(a + 1)} for a in range(12)]
    return str(written(tmp_path, rows, "sums.jsonl"))


@pytest.fixture
def adapter(tmp_path, tiny_folder):
    model = peft.get_peft_model(
        tiny_model(), peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    )
    model.peft_config["default"].base_model_name_or_path = str(tiny_folder)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.fixture
def other(tmp_path):
    """A model of other weights whose tokenizer has a token more."""
    folder = tmp_path / "other"
    tiny_model("qwen3", seed=5, vocab_size=272).save_pretrained(folder)
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken("What is")])
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def run(tmp_path, tiny_folder, make_config):
    """The folder of a run, as training leaves it."""
    config = make_config(**{"output_dir": str(tmp_path / "run")})
    folder = tmp_path / "run"
    tiny_model(seed=7).save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    (folder / "config.yaml").write_text(config.to_yaml())
    return folder


def evaluated(*arguments):
    assert main(["eval", *map(str, arguments), *QUICK]) == 0


def summary_of(folder):
    return json.loads((folder / "summary.json").read_text())


def test_one_plain_folder_answers_plain_and_told(tiny_folder, tmp_path, data, capsys):
    evaluated(tiny_folder, "--data", data, "--eval.samples", "2")
    out = tmp_path / "evals" / tiny_folder.name
    arms = [read_answers(out / "eval" / f"{arm}.jsonl") for arm in ("base", "told")]
    assert [len(answers) for answers in arms] == [24, 24]
    assert [a.problem_id for a in arms[0]] == [a.problem_id for a in arms[1]]
    assert [a.text for a in arms[0]] != [a.text for a in arms[1]]
    shown = capsys.readouterr().out
    for words in ("pass@1 (95 % interval)", "base, told to be concise", "token reduction", "lost"):
        assert words in shown
    found = summary_of(out)
    assert found["settings"]["data"]["source"] == data
    low, high = found["sets"][0]["arms"]["base"]["pass_at_1_ci95"]
    assert 0 <= low <= found["sets"][0]["arms"]["base"]["pass_at_1"] <= high <= 1


def test_the_instruction_is_the_only_difference_between_the_two(tmp_path):
    path = written(tmp_path, [{"problem": "What is 2 + 2?", "answer": "4"}])
    (problem,) = load_problems(
        str(path), split=None, prompt_column=None, answer_column=None, seed=0,
        options={"prompt_template": "{problem}\n\nEnd with Answer: X."},
    )  # fmt: skip
    pair = build_prompts(problem, byte_tokenizer(), instruction="Be brief.")
    assert pair.teacher_text.replace("Be brief.\n\n", "", 1) == pair.student_text
    assert pair.student_text.count("End with Answer: X.") == 1


def test_fewer_problems_and_one_sample(tiny_folder, tmp_path, data, capsys):
    evaluated(tiny_folder, "--data", data, "--eval.problems", 3, "--output_dir", "few")
    assert summary_of(tmp_path / "few")["sets"][0]["problems"] == 3
    shown = capsys.readouterr().out
    assert "share right" in shown
    assert "too few" in shown
    evaluated(tiny_folder, "--data", data, "--data.eval_size", 4, "--output_dir", "four")
    assert summary_of(tmp_path / "four")["sets"][0]["problems"] == 4


def test_an_adapter_answers_as_itself(adapter, tiny_folder, tmp_path, data, capsys):
    evaluated(tiny_folder, adapter, "--data", data, "--eval.temperature", 0)
    out = tmp_path / "evals" / f"{tiny_folder.name}-vs-adapter"
    base, adapted = (read_answers(out / "eval" / f"{arm}.jsonl") for arm in "ab")
    assert [a.text for a in base] != [a.text for a in adapted]
    assert summary_of(out)["same_tokens"]
    assert "── adapter, against" in capsys.readouterr().out
    evaluated(tiny_folder, "--data", data, "--eval.temperature", 0)
    alone = read_answers(tmp_path / "evals" / tiny_folder.name / "eval" / "base.jsonl")
    assert [a.text for a in alone] == [a.text for a in base]


def test_an_adapter_whose_base_has_gone(adapter, tiny_folder, data, capsys):
    file = adapter / "adapter_config.json"
    tree = json.loads(file.read_text())
    file.write_text(json.dumps(tree | {"base_model_name_or_path": "./gone"}))
    assert main(["eval", str(adapter), "--data", data]) == 2
    error = capsys.readouterr().err
    assert "whose base is not found: there is no folder './gone'; name it with --model" in error
    evaluated(adapter, "--data", data, "--model", tiny_folder)


def test_two_tokenizers_are_said_to_differ(tiny_folder, other, tmp_path, data, capsys):
    evaluated(tiny_folder, other, "--data", data)
    shown = capsys.readouterr().out
    assert "token counts are not comparable" in shown
    assert "mean characters" in shown
    assert "character reduction" in shown
    assert "token reduction" not in shown
    found = summary_of(tmp_path / "evals" / f"{tiny_folder.name}-vs-other")
    assert not found["same_tokens"]
    assert "character_reduction_ci95" in found["sets"][0]["compared"]["b"]


def test_only_problems_that_fit_both_models_are_asked(tiny_folder, other, tmp_path, capsys):
    rows = [{"problem": "What is " * 20 + str(i), "answer": "1"} for i in range(3)]
    rows += [{"problem": f"{i}?", "answer": "1"} for i in range(3)]
    path = written(tmp_path, rows, "long.jsonl")
    evaluated(tiny_folder, other, "--data", path, "--prompt.max_tokens", 120)
    found = summary_of(tmp_path / "evals" / f"{tiny_folder.name}-vs-other")
    assert found["sets"][0]["problems"] == 3


def test_a_run_beside_a_plain_model(run, tiny_folder, tmp_path, data):
    evaluated(run, tiny_folder, "--data", data)
    found = summary_of(tmp_path / "evals" / f"run-vs-{tiny_folder.name}")
    assert found["models"]["a"]["name"] == str(run)
    assert found["sets"][0]["problems"] == 12


def test_a_run_alone_is_what_it_was(run, capsys):
    assert main(["eval", str(run)]) == 0
    assert (run / "reeval" / "eval" / "prompt_only.jsonl").is_file()
    assert "base, told to be concise" in capsys.readouterr().out


def test_nothing_is_overwritten_in_silence(tiny_folder, data, capsys):
    evaluated(tiny_folder, "--data", data, "--output_dir", "here")
    assert main(["eval", str(tiny_folder), "--data", data, "--output_dir", "here"]) == 2
    assert "--output_dir here is there already" in capsys.readouterr().err


def test_a_default_cap_gives_way_to_the_models_positions(tiny_folder, tmp_path, data, capsys):
    flags = ["--data", data, "--eval.problems", "1", "--eval.scorer", "number"]
    assert main(["eval", str(tiny_folder), *flags, "--eval.max_new_tokens", "600"]) == 2
    assert "--eval.max_new_tokens 600 is too long" in capsys.readouterr().err
    assert main(["eval", str(tiny_folder), *flags]) == 0
    assert "has 512 positions" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["MODEL"], "by --data FILE or --suite NAME"),
        (["MODEL", "MODEL"], "two models: say which problems"),
        (["./nowhere", "--data", "DATA"], "there is no folder './nowhere'"),
        (["MODEL", "--data", "none.jsonl"], "there is no file none.jsonl"),
        (["MODEL", "--data", "DATA", "--eval.problems", "99"], "--eval.problems 99 of 12 problems"),
        (["MODEL", "--data", "DATA", "--suite", "reasoning"], "both name problems"),
        (["MODEL", "--suite", "reason"], "unknown suite 'reason'"),
        (["MODEL", "--data", "DATA", "--suite_dir", "x"], "--suite_dir belongs to --suite"),
        (["MODEL", "--data", "DATA", "--trained", "x"], "--trained belongs to the folder of a run"),
        (["MODEL", "--data", "DATA", "--model", "x"], "is no adapter"),
        (["MODEL", "--data", "DATA", "--eval.greedy", "true"], "--eval.temperature 0 is greedy"),
        (["MODEL", "--data", "DATA", "--eval.scorer", "letter"], "needs one of A to Z"),
        (["EMPTY", "--data", "DATA"], "holds no model"),
        (["embedded:other", "--data", "DATA"], "the embedded model is"),
    ],
)
def test_mistakes_end_in_one_line(arguments, words, tiny_folder, tmp_path, data, capsys):
    (tmp_path / "empty").mkdir()
    names = {"MODEL": str(tiny_folder), "DATA": data, "EMPTY": str(tmp_path / "empty")}
    assert main(["eval", *(names.get(a, a) for a in arguments)]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not (tmp_path / "evals").exists()


def test_a_whole_run_is_its_own_model_and_tokenizer(run, tiny_folder):
    model = given_model(str(run), OPSDCConfig().model)
    assert model.config.name_or_path == str(run / "model")
    assert model.short_name == "run"
    shutil.rmtree(run / "model")
    with pytest.raises(Exception, match="has the run ended"):
        given_model(str(run), OPSDCConfig().model)


@pytest.fixture
def sets(tmp_path):
    folder = tmp_path / "sets"
    folder.mkdir()
    rows = [{"problem": f"What is {i}?", "answer": i} for i in range(11)]
    written(folder, rows, "math500.jsonl")
    written(folder, rows[:3], "AIME-2025.jsonl")
    choices = {"text": ["sun", "moon"], "label": ["1", "2"]}
    written(
        folder,
        [{"question": "Night?", "choices": choices, "answerKey": "2"}],
        "ARC_Challenge.jsonl",
    )
    wrong = {f"Incorrect Answer {i}": f"no {i}" for i in (1, 2, 3)}
    rows = [{"Question": f"Q{i}?", "Correct Answer": "yes", **wrong} for i in range(8)]
    written(folder, rows, "gpqa-diamond.jsonl")
    rows = [{"question": f"Q{i}?", "options": ["a", "b", "c"], "answer": "C"} for i in range(2)]
    written(folder, rows, "mmlu_pro.jsonl")
    return folder


@pytest.fixture
def offline(monkeypatch):
    """As on a machine without a network, and without its waits."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def test_a_suite_from_a_folder(sets, offline, run, tmp_path, capsys):
    flags = ["--suite", "reasoning", "--suite_dir", str(sets), "--eval.max_new_tokens", "4"]
    assert main(["eval", str(run), *flags]) == 0
    shown = capsys.readouterr()
    assert "AIME-2024 left out" in shown.err
    assert shown.err.count("left out") == 3
    found = summary_of(tmp_path / "evals" / "run")
    assert {s["name"]: s["problems"] for s in found["sets"]} == {
        "MATH-500": 11, "AIME-2025": 3, "GPQA-diamond": 8, "MMLU-Pro": 2, "ARC-Challenge": 1,
    }  # fmt: skip
    assert list(found["sets"][0]["arms"]) == ["base", "told", "trained"]
    assert "pass@1 (95 % interval)" in shown.out
    folder = tmp_path / "evals" / "run"
    night = read_answers(folder / "ARC-Challenge" / "eval" / "base.jsonl")[0]
    assert night.question.startswith("Night?\n\nA. sun\nB. moon\n\n")
    assert night.gold == "B"
    asked = read_answers(folder / "GPQA-diamond" / "eval" / "base.jsonl")
    assert all(f"{a.gold}. yes\n" in a.question for a in asked)
    assert len({a.gold for a in asked}) > 1


def test_a_suite_with_nothing_here(offline, tiny_folder, tmp_path, capsys):
    assert main(["eval", str(tiny_folder), "--suite", "reasoning"]) == 2
    assert "no set of it is here" in capsys.readouterr().err
    assert main(["eval", str(tiny_folder), "--suite", "reasoning", "--suite_dir", "gone"]) == 2
    assert "there is no folder gone" in capsys.readouterr().err


def test_inspect_takes_the_folder_of_a_run(run, capsys):
    assert main(["inspect", str(run), "--rollout.max_new_tokens", "6"]) == 0
    trained = capsys.readouterr().out
    model, config = str(run / "model"), str(run / "config.yaml")
    flags = ["--config", config, "--model", model, "--rollout.max_new_tokens", "6"]
    assert main(["inspect", *flags]) == 0
    assert capsys.readouterr().out == trained
    assert main(["inspect", str(run), "--config", config]) == 2
    assert "give one" in capsys.readouterr().err
    assert main(["inspect", "nowhere"]) == 2
    assert "has no config.yaml" in capsys.readouterr().err


def test_after_one_fault_of_the_network_no_set_waits_for_it(monkeypatch, tiny_folder, capsys):
    import datasets

    asked = []

    def unreachable(*_, **__):
        asked.append(datasets.config.HF_HUB_OFFLINE)
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    assert main(["eval", str(tiny_folder), "--suite", "reasoning"]) == 2
    assert asked == [False, *[True] * 7]
    assert datasets.config.HF_HUB_OFFLINE is False
    assert capsys.readouterr().err.count("left out") == 8


def test_a_run_that_trained_an_adapter(run, adapter, tiny_folder, tmp_path, data, capsys):
    config = OPSDCConfig.load(run / "config.yaml", {"model.lora": {}})
    (run / "config.yaml").write_text(config.to_yaml())
    shutil.rmtree(run / "model")
    shutil.copytree(adapter, run / "model")
    evaluated(run, adapter, "--data", data)
    out = tmp_path / "evals" / "run-vs-adapter" / "eval"
    of_run, of_adapter = (read_answers(out / f"{arm}.jsonl") for arm in "ab")
    assert [a.text for a in of_run] == [a.text for a in of_adapter]
    assert main(["inspect", str(run), "--rollout.max_new_tokens", "6"]) == 0
    assert "log p student" in capsys.readouterr().out


@pytest.mark.whole
@needs_vllm
@pytest.mark.parametrize("engine", ["vllm", "vllm_server"])
def test_two_models_one_after_the_other_in_vllm(engine, tmp_path_factory, tmp_path, data):
    """In a process of its own, which vLLM changes; each push is proven by its probe."""
    models = [
        small_folder(tmp_path_factory, "llama", tied=True),
        small_folder(tmp_path_factory, "qwen3", tied=False, head_dim=64),
    ]
    flags = ["--data", data, "--rollout.engine", engine, "--prompt.max_tokens", "128", *QUICK]
    done = subprocess.run(
        [sys.executable, "-m", "opsdc", "eval", *map(str, models), *flags, "--output_dir", "out"],
        cwd=tmp_path, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("rollouts: vLLM") == 2
    assert [len(read_answers(tmp_path / f"out/eval/{arm}.jsonl")) for arm in "ab"] == [12, 12]
