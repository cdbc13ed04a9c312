"""One command for the common case, on a tiny random Qwen3 and problems of its own."""

import json

import pytest
import torch
from helpers.tiny import byte_tokenizer, tiny_model

from opsdc.cli import main
from opsdc.config.settings import OPSDCConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model whose answers end after some ten tokens."""
    path = tmp_path_factory.mktemp("qwen3")
    model = tiny_model("qwen3", tied=False)
    with torch.no_grad():
        model.lm_head.weight[2] *= 4
    model.save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


@pytest.mark.whole
def test_one_command_chooses_trains_and_evaluates(folder, problem_file, tmp_path, capsys):
    out = tmp_path / "short"
    flags = ["--data", str(problem_file), "--target", "0.4", "--output", str(out)]
    assert main(["compress", str(folder), *flags, "--train.steps", "1"]) == 0
    shown = capsys.readouterr().out
    assert "data: 40 problems, 8 of them for the evaluation, 4 for decisions" in shown
    assert "end within 256 tokens" in shown
    assert "training: all weights in float32" in shown
    assert "token reduction" in shown
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["steps"], summary["base"]["answers"]) == (1, 8)
    assert (out / "model" / "model.safetensors").is_file()
    # The file that was printed is the run's.
    printed = shown[shown.index("output_dir:") : shown.index(f"{out}/config.yaml: the settings")]
    (tmp_path / "printed.yaml").write_text(printed)
    chosen, config = (OPSDCConfig.load(p) for p in (tmp_path / "printed.yaml", out / "config.yaml"))
    # The run adds the day on which it began.
    assert chosen.to_dict() | {"prompt": 0} == config.to_dict() | {"prompt": 0}
    assert (chosen.teacher.target, chosen.rollout.max_new_tokens) == (0.4, 256)
    assert (chosen.eval.scorer, chosen.train.keep_best) == ("number", True)
