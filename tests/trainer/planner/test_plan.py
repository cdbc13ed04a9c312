"""The plan against what a step of the real model takes, and against what is known of models."""

import itertools
import json
import os
import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest
from helpers.tiny import tiny_model

from opsdc.cli import main
from opsdc.config.settings import LoRAConfig, ModelConfig, OPSDCConfig
from opsdc.config.yaml_file import recipe_names
from opsdc.errors import ConfigError, ModelError
from opsdc.models.load import load_architecture
from opsdc.planner.activations import _trace, count_activations, on_meta
from opsdc.planner.plan import make_plan
from opsdc.planner.report import parse_bytes
from opsdc.planner.sizes import sizes_of

pytestmark = pytest.mark.whole

# Memory of an update by phase, in a process of its own, from the kernel's high-water mark. With
# these settings of the C library freed memory is given back, so that the mark is what is held.
_MEASURED = """
import ctypes, json, sys
from pathlib import Path
import torch
from opsdc.method import update as module
from opsdc.method.batch import Pair
from opsdc.config.settings import OPSDCConfig
from opsdc.models.load import load_model, prepare_model
from opsdc.planner.plan import make_plan
from opsdc.method.teacher import Teacher

torch.set_num_threads(1)
config = OPSDCConfig.load("smollm2-cpu", json.loads(sys.argv[1]))
plan = make_plan(config, memory_bytes=None)

def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) << 10 for x in lines if x.startswith(field + ":"))

def restart():
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")

ctypes.CDLL(None).malloc_trim(0)
before = status("VmRSS")
model = prepare_model(load_model(config.model), config.model).train()
trained = [p for p in model.parameters() if p.requires_grad]
teacher = Teacher(model, config.teacher)
optimizer = torch.optim.AdamW(trained, lr=1e-6)
prompt, response = config.prompt.max_tokens, config.rollout.max_new_tokens
pairs = [
    Pair(
        student_prompt_ids=list(range(9 + i, 9 + i + prompt)),
        teacher_prompt_ids=list(range(7 + i, 7 + i + prompt)),
        response_ids=list(range(900 + i, 900 + i + response)),
    )
    for i in range(config.rollout.prompts_per_step)
]
layout = module.Layout(
    packed=False, max_tokens=plan.rows * plan.width, pad_id=0, dtype=torch.float32
)
# Moments come with the first step.
module.update(model, teacher, pairs[:1], optimizer, layout, config)
teacher.after_update(config.teacher.refresh_steps)
peaks = {}

def watched(name, function):
    def call(*arguments, **keywords):
        result = function(*arguments, **keywords)
        peaks[name] = max(peaks.get(name, 0), status("VmHWM") - before)
        restart()
        return result
    return call

module.teacher_pass = watched("teacher", module.teacher_pass)
module.distillation_loss = watched("loss", module.distillation_loss)
torch.Tensor.backward = watched("backward", torch.Tensor.backward)
optimizer.step = watched("update", optimizer.step)
restart()
module.update(model, teacher, pairs, optimizer, layout, config)
print(json.dumps({name: [plan.total(name), peak] for name, peak in peaks.items()}))
"""
SETTINGS = {
    "prompt.max_tokens": 48,
    "rollout.max_new_tokens": 32,
    "rollout.prompts_per_step": 4,
    "train.max_tokens_per_micro_batch": 160,
    "eval.problems": 0,
}


def measured(**settings):
    done = subprocess.run(
        [sys.executable, "-c", _MEASURED, json.dumps({**SETTINGS, **settings})],
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "MALLOC_MMAP_THRESHOLD_": "65536",
            "MALLOC_ARENA_MAX": "1",
        },
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.model
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_predicted_peaks_are_the_measured_ones_and_an_adapter_takes_under_60_percent(smollm2):
    full, adapter = measured(), measured(**{"model.lora.r": 16})
    for found in (full, adapter):
        assert set(found) == {"teacher", "loss", "backward", "update"}
        for phase, (predicted, peak) in found.items():
            assert predicted == pytest.approx(peak, rel=0.10), phase
    peaks = [max(peak for _, peak in found.values()) for found in (full, adapter)]
    assert peaks[1] <= 0.6 * peaks[0]


@pytest.mark.model
@pytest.mark.slow
def test_a_mixture_with_the_start_takes_what_is_predicted(smollm2):
    for phase, (predicted, peak) in measured(
        **{"teacher.anchor": 0.1, "teacher.dial": 0.5}
    ).items():
        assert predicted == pytest.approx(peak, rel=0.10), phase


@pytest.mark.model
@pytest.mark.slow
def test_checkpointed_activations_are_predicted_and_fewer(smollm2):
    # Long enough that what a layer keeps is a good part of the whole.
    long = {
        "prompt.max_tokens": 160,
        "rollout.max_new_tokens": 96,
        "train.max_tokens_per_micro_batch": 520,
    }
    base = measured(**long)
    found = measured(**long, **{"model.gradient_checkpointing": True})
    for phase, (predicted, peak) in found.items():
        assert predicted == pytest.approx(peak, rel=0.10), phase
    assert found["loss"][1] < 0.9 * base["loss"][1]


def test_what_few_layers_and_rows_tell_is_what_more_of_them_take():
    model = tiny_model("qwen3", num_hidden_layers=5)
    for settings in (
        ModelConfig(dtype="bfloat16", gradient_checkpointing=True),
        ModelConfig(lora=LoRAConfig(r=2)),
    ):
        text = model.config.to_json_string(use_diff=False)
        one, more = count_activations(text, settings, width=64, masked=True)
        whole = _trace(model.config, settings, layers=5, rows=4, width=64, masked=True)
        predicted = one + more * 3
        for field in ("teacher", "forward", "held", "backward"):
            assert getattr(predicted, field) == pytest.approx(getattr(whole, field), rel=0.05)


def test_checkpointing_keeps_less_and_longer_sequences_keep_more():
    model = tiny_model("qwen3", num_hidden_layers=6)

    def held(width, masked=False, **settings):
        text = model.config.to_json_string(use_diff=False)
        one, _ = count_activations(text, ModelConfig(**settings), width=width, masked=masked)
        return one.held

    assert held(256, gradient_checkpointing=True) < 0.3 * held(256)
    assert held(512) == pytest.approx(2 * held(256), rel=0.02)
    # Where a mask is needed, every layer keeps one.
    assert held(512, masked=True) - held(512) >= 6 * 512**2


# Billions of parameters, and of them outside the embedding, as the model cards on
# huggingface.co/Qwen state them.
CARDS = {
    "Qwen/Qwen3-0.6B": (0.6, 0.44),
    "Qwen/Qwen3-1.7B": (1.7, 1.4),
    "Qwen/Qwen3-4B": (4.0, 3.6),
    "Qwen/Qwen3-8B": (8.2, 6.95),
    "Qwen/Qwen3-14B": (14.8, 13.2),
    "Qwen/Qwen3-32B": (32.8, 31.2),
}


@pytest.mark.parametrize("name", CARDS)
def test_known_architectures_have_the_parameters_of_their_cards(name):
    settings = ModelConfig(dtype="bfloat16")
    sizes = sizes_of(on_meta(load_architecture(ModelConfig(name_or_path=name)), settings), settings)
    total, rest = CARDS[name]
    embeddings = sizes.head * (1 if sizes.tied else 2)
    assert sizes.trained / 1e9 == pytest.approx(total, rel=0.03)
    assert (sizes.trained - embeddings) / 1e9 == pytest.approx(rest, rel=0.03)


def test_an_adapter_trains_and_copies_nothing_else():
    model = ModelConfig(dtype="bfloat16", lora=LoRAConfig(r=8))
    config = OPSDCConfig(model=model)
    architecture = tiny_model("qwen3").config
    plan = make_plan(config, memory_bytes=10**9, architecture=architecture)
    adapter = 4 * sizes_of(on_meta(architecture, model), model).trained
    assert plan.parts["teacher's copy (float32)"]["teacher"] == adapter
    assert plan.parts["gradients (float32)"]["loss"] == adapter
    assert "sampling" not in plan.parts["gradients (float32)"]


@pytest.mark.parametrize(
    ("text", "size"), [("80GB", 80 * 10**9), ("76GiB", 76 * 2**30), ("24 gb", 24 * 10**9)]
)
def test_bytes_as_people_write_them(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    "text", ["", "GB", "80XB", "eighty", "24", "0GB", "-3GB", "nanGB", "1e99GB"]
)
def test_other_bytes_are_refused(text):
    with pytest.raises(ConfigError, match="80GB"):
        parse_bytes(text)


def test_a_model_without_a_config_is_named(monkeypatch):
    # The variable of that name was read when huggingface_hub was imported.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"config\.json"):
        load_architecture(ModelConfig(name_or_path="nobody/no-such-model"))
    with pytest.raises(ModelError, match=r"there is no folder '\./no/such/folder'"):
        load_architecture(ModelConfig(name_or_path="./no/such/folder"))


def test_the_command_says_whether_it_fits(tiny_folder, capsys):
    arguments = ["plan", "--config", "smollm2-cpu", "--model", str(tiny_folder / "config.json")]
    assert main([*arguments, "--gpu-memory", "80GB"]) == 0
    shown = capsys.readouterr().out
    for words in ("teacher's copy", "activations", "fits: peak", "an adapter", "TFLOP/s"):
        assert words in shown
    assert main([*arguments, "--gpu-memory", "1MB", "--loss.workspace_bytes", "500000"]) == 1
    assert "DOES NOT FIT" in capsys.readouterr().out


RECIPES = resources.files("opsdc") / "recipes"
PLANNED = [name for name in recipe_names() if name.startswith("qwen3")]


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.xdist_group(n)) for n in PLANNED]
)
def test_a_recipe_holds_the_plan_that_its_command_prints(name, capsys):
    """`make recipes` writes it there."""
    lines = (RECIPES / f"{name}.yaml").read_text("utf-8").splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("# $ opsdc plan"))
    header = list(itertools.takewhile(lambda line: line.startswith("#"), lines[at + 1 :]))
    assert main(lines[at].removeprefix("# $ opsdc ").split()) == 0
    printed = capsys.readouterr().out
    assert "fits: peak" in printed
    assert header == [f"# {line}".rstrip() for line in printed.splitlines()]


def test_ranks_cut_what_fsdp_cuts_and_ddp_does_not():
    architecture = tiny_model("qwen3").config

    def parts(**distributed):
        config = OPSDCConfig.from_dict({"distributed": distributed})
        return make_plan(config, memory_bytes=10**9, architecture=architecture, gpus=4).parts

    trained = sum(p.numel() for p in tiny_model("qwen3").parameters())
    ddp, once, always = (
        parts(),
        parts(strategy="fsdp"),
        parts(strategy="fsdp", reduce_every_micro_batch=True),
    )
    for name in ("weights, trained (float32)", "teacher's copy (float32)"):
        assert ddp[name]["loss"] == 4 * once[name]["loss"] == 4 * trained
    found = [p["gradients (float32)"] for p in (ddp, once, always)]
    assert [g["loss"] for g in found] == [4 * trained, 4 * trained, trained]
    assert [g["update"] for g in found] == [4 * trained, trained, trained]


def test_the_loss_scores_all_tokens_and_trains_on_their_share():
    architecture = tiny_model().config

    def flop(**loss):
        config = OPSDCConfig.from_dict({"loss": {"backend": "chunked", **loss}})
        return make_plan(config, memory_bytes=10**9, architecture=architecture).loss_flop

    # Two head GEMMs to score all, four for what is trained on.
    assert flop(token_share=0.25) == flop() * (2 + 0.25 * 4) / 4


def test_a_paged_teacher_leaves_its_head_alone_on_the_device():
    architecture = tiny_model(tied=False).config
    plans = [
        make_plan(
            OPSDCConfig.from_dict({"teacher": {"offload": offload}}),
            memory_bytes=10**9,
            architecture=architecture,
        ).parts["teacher's copy (float32)"]
        for offload in (False, True)
    ]
    assert plans[0]["teacher"] == 4 * sum(p.numel() for p in tiny_model(tied=False).parameters())
    assert plans[1] == {"loss": 4 * 264 * 32, "backward": 4 * 264 * 32}


def test_an_anchor_counts_the_start_its_head_and_the_contexts():
    architecture = tiny_model(tied=False).config

    def plan(**teacher):
        config = OPSDCConfig.from_dict({"teacher": teacher, "loss": {"backend": "chunked"}})
        return make_plan(config, memory_bytes=10**9, architecture=architecture)

    one, dialled, anchored = plan(), plan(dial=0.5), plan(anchor=0.1)
    both = 2 * 4 * 264 * 32
    copy, start = "teacher's copy (float32)", "start's copy, for the anchor (float32)"
    assert anchored.parts[start] == one.parts[copy]
    assert anchored.parts["both heads in one, for the anchor"] == {"loss": both, "backward": both}
    # States of two contexts beside their mixture; a wide mixture is two of these.
    states = "teacher's hidden states"
    assert dialled.parts[states]["teacher"] == 3 * one.parts[states]["teacher"]
    assert dialled.parts[states]["loss"] == one.parts[states]["loss"]
    assert anchored.parts[states]["teacher"] == 4 * one.parts[states]["teacher"]
    assert anchored.parts[states]["loss"] == 2 * one.parts[states]["loss"]
    assert anchored.loss_flop == one.loss_flop * 5 / 4
    # A frozen teacher is the start itself: one more context, and no other copy or head.
    frozen = plan(mode="frozen", anchor=0.1)
    assert set(frozen.parts) == set(one.parts)
    assert frozen.parts[states] == dialled.parts[states]
