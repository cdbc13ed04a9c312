"""What the command says to arguments that it does not know, and to bare ones."""

import os
import re
import subprocess
import sys
import time

import pytest
import yaml

import opsdc
from opsdc.cli import main
from opsdc.config.settings import OPSDCConfig
from opsdc.config.yaml_file import recipe_names


def said(capsys, *arguments):
    """Status, output and errors of a command."""
    try:
        status = main(list(arguments))
    except SystemExit as end:
        status = end.code
    shown = capsys.readouterr()
    return status, shown.out, shown.err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["trian"], "opsdc: unknown command 'trian'; did you mean train?"),
        (["fly"], "opsdc: unknown command 'fly' (there are compress, train, eval,"),
        (["train", "--lr", "3"], "opsdc train: unknown flag --lr; did you mean --optim.lr?"),
        (["train", "--train.step=3"], "unknown flag --train.step; did you mean --train.steps?"),
        (["train", "--learning-rate", "3"], "--learning-rate; here it is --optim.lr"),
        (["train", "--dryrun"], "unknown flag --dryrun; did you mean --dry-run?"),
        (["train", "--conf", "my.yaml"], "unknown flag --conf; did you mean --config?"),
        (["eval", "runs/x", "--modle", "y"], "opsdc eval: unknown flag --modle; did you mean"),
        (["plan", "here"], "opsdc plan: unexpected argument 'here' (see opsdc plan --help)"),
        (["plot"], "opsdc plot: the following arguments are required: RUN"),
        (["train", "--config", "smolm2-cpu"], "'smolm2-cpu'; did you mean smollm2-cpu?"),
        (["train", "--optim.lr", "fast"], "opsdc train: --optim.lr must be a number, got 'fast'"),
        (["train", "--model", " "], "opsdc train: --model must be a model, got ' '"),
        (["plan", "--model", "./none"], "opsdc plan: --model: there is no folder './none'"),
        (["train", "--data.source", "./none.jsnol"], "--data.source ./none.jsnol: there is no"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_with_what_was_meant(capsys, arguments, sentence):
    began = time.perf_counter()
    status, out, error = said(capsys, *arguments)
    assert status == 2
    assert out == ""
    assert sentence in error
    assert error.count("\n") == 1
    # Nothing asked the network, which would have been asked for a minute.
    assert time.perf_counter() - began < 30


def test_an_error_of_the_file_still_names_the_file(capsys, tmp_path):
    file = tmp_path / "my.yaml"
    file.write_text("optim: {lr: fast}")
    _, _, error = said(capsys, "train", "--config", str(file), "--seed", "3")
    assert f"opsdc train: {file}: optim.lr must be a number" in error


@pytest.mark.parametrize("arguments", [[], ["train"]])
def test_a_bare_command_begins_nothing(capsys, arguments):
    status, out, _ = said(capsys, *arguments)
    assert status == 2
    assert out.startswith(f"usage: {' '.join(['opsdc', *arguments])}")


def test_version_and_print_config(capsys, tmp_path):
    assert said(capsys, "--version") == (0, f"opsdc {opsdc.__version__}\n", "")
    flags = ["--model", "a/b", "--data.source", "a.jsonl,b.csv.gz", "--train.steps", "3"]
    status, out, _ = said(capsys, "train", "--config", "smollm2-cpu", "--print-config", *flags)
    config = OPSDCConfig.from_dict(yaml.safe_load(out))
    assert status == 0
    assert (config.model.name_or_path, config.train.steps) == ("a/b", 3)
    assert config.data.source == ("a.jsonl", "b.csv.gz")


def test_recipes_are_listed_with_a_sentence(capsys):
    _, out, _ = said(capsys, "recipes")
    assert re.findall(r"^\S+$", out, re.MULTILINE) == recipe_names()
    assert "\n    The demo: SmolLM2-135M-Instruct on two CPU cores" in out
    assert "#" not in out


@pytest.mark.parametrize("recipe", recipe_names())
def test_init_writes_the_recipe_with_meanings(capsys, tmp_path, recipe):
    file = tmp_path / "mine.yaml"
    assert said(capsys, "init", "--from", recipe, str(file))[0] == 0
    text = file.read_text("utf-8")
    assert "# Learning rate; paper: 1e-6." in text
    config = OPSDCConfig.load(recipe, {"output_dir": "runs/mine"})
    assert OPSDCConfig.load(file) == config
    status, _, error = said(capsys, "init", str(file))
    assert status == 2
    assert "is there already" in error


def test_a_reader_that_has_seen_enough_is_no_error():
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "opsdc", "recipes"], stdout=write, stderr=subprocess.PIPE, text=True
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")
