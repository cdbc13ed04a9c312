"""A base in 4 bits: its gradients, what is pushed of it, resuming it bit for bit, its plan."""

import importlib.util
import json

import pytest
import torch
from helpers import runs
from helpers.tiny import tiny_model
from helpers.vllm_runs import assert_synchronized, measure, needs_vllm, small_folder

from opsdc.config.settings import ModelConfig, OPSDCConfig
from opsdc.errors import ConfigError, ModelError
from opsdc.models import quantize
from opsdc.models.head import read_head
from opsdc.models.load import load_model, prepare_model
from opsdc.planner.activations import on_meta
from opsdc.planner.plan import make_plan
from opsdc.planner.sizes import sizes_of
from opsdc.rollout.weights import named_weights
from opsdc.train import OPSDCTrainer

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None,
    reason="bitsandbytes is not installed; `make install` does it",
)
SIZES = {"tied": False, "hidden_size": 64, "intermediate_size": 128}
LORA = {"r": 4, "alpha": 8}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    place = tmp_path_factory.mktemp("dense")
    tiny_model(**SIZES).save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


def model_config(folder, **settings):
    tree = {"name_or_path": str(folder), "lora": LORA, "quantize": "nf4", **settings}
    return OPSDCConfig.from_dict({"model": tree}).model


def quantized(folder):
    torch.manual_seed(0)
    config = model_config(folder)
    return prepare_model(load_model(config), config)


@needs_bitsandbytes
def test_all_linear_layers_but_the_head_are_in_4_bits(folder):
    model, dense = quantized(folder), tiny_model(**SIZES)
    in_4_bits = quantize.quantized(model.get_base_model())
    assert len(in_4_bits) == 2 * 7
    assert not any("lm_head" in name or "embed" in name for name in in_4_bits)
    assert torch.equal(read_head(model).weight, dense.lm_head.weight)
    embedding = model.get_input_embeddings().weight
    assert torch.equal(embedding, dense.model.embed_tokens.weight)
    frozen = [p for p in model.parameters() if not p.requires_grad]
    assert sum(map(quantize.elements, frozen)) == sum(p.numel() for p in dense.parameters())


@needs_bitsandbytes
def test_it_computes_with_the_weights_that_are_pushed(folder):
    """Logits of 4-bit layers with their adapter are those of a plain model with what is pushed."""
    model = quantized(folder).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.1)
    plain = tiny_model(**SIZES, seed=1).eval()
    pushed = dict(named_weights(model, torch.float32))
    plain.load_state_dict(pushed, strict=True)
    ids = torch.arange(5, 45)[None]
    with torch.no_grad():
        own, other = model(input_ids=ids).logits, plain(input_ids=ids).logits
    assert (own - other).abs().max() <= 1e-5 * own.abs().max()
    # And 4 bits are not 32.
    assert (pushed["model.layers.0.mlp.up_proj.weight"] != 0).any()
    dense = tiny_model(**SIZES)(input_ids=ids).logits
    assert (own - dense).abs().max() > 1e-2 * own.abs().max()


@needs_bitsandbytes
def test_gradients_reach_every_layer_after_a_pass_without_them(folder):
    """As between sampling and training; bitsandbytes would repack its weights on some CPUs."""
    model = quantized(folder)
    # A plain model of the values that the 4 bits stand for, with the same adapter. Read first: a
    # state_dict would undo the repacking.
    dense = tiny_model(**SIZES)
    dense.load_state_dict(dict(named_weights(model, torch.float32)))
    twin = prepare_model(dense, ModelConfig(lora=model_config(folder).lora))
    ids = torch.arange(5, 45)[None]
    model.eval()
    with torch.no_grad():
        model(input_ids=ids)
    model.train()
    adapter = {n: p for n, p in model.named_parameters() if p.requires_grad}
    other = {n: p for n, p in twin.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, p in other.items():
            p.copy_(adapter[name])
    for one in (model, twin):
        one(input_ids=ids).logits.square().mean().backward()
    for name, p in other.items():
        if "lora_B" in name:
            assert p.grad.abs().max() > 0
            assert (adapter[name].grad - p.grad).norm() <= 1e-5 * p.grad.norm()


def settings_of_a_run(folder, problem_file, out, steps=4):
    return {
        "output_dir": str(out),
        "model": {"name_or_path": str(folder), "lora": LORA, "quantize": "nf4"},
        "data": {"source": str(problem_file), "eval_size": 6},
        "prompt": {"instruction": "Be brief."},
        "rollout": {"prompts_per_step": 3, "max_new_tokens": 8},
        "teacher": {"refresh_steps": 3},
        "optim": {"lr": 1e-2},
        "train": {"steps": steps, "save_every": 1},
        "eval": {"problems": 0},
    }


@pytest.mark.whole
@needs_bitsandbytes
def test_a_run_goes_on_bit_for_bit(folder, problem_file, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert runs.finish(settings_of_a_run(folder, problem_file, whole)) == 0, runs.log(whole)
    for steps in (2, 4):
        run = settings_of_a_run(folder, problem_file, parts, steps)
        assert runs.finish(run) == 0, runs.log(parts)
    assert runs.outcome(parts) == runs.outcome(whole)
    rows = [json.loads(x) for x in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [row["teacher_version"] for row in rows] == [0, 0, 3, 3]
    # It learns: an adapter that stayed at zero would be its own teacher's equal.
    assert rows[0]["grad_norm"] > 0


@needs_bitsandbytes
def test_a_refresh_changes_the_snapshot_and_nothing_else(folder, problem_file, tmp_path):
    run = settings_of_a_run(folder, problem_file, tmp_path / "run", steps=2)
    trainer = OPSDCTrainer(None, OPSDCConfig.from_dict(run))
    trainer.train()
    adapter = [p for p in trainer.model.parameters() if p.requires_grad]
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    copies = [c.clone() for c in trainer.teacher._snapshot._copies]
    assert [c.shape for c in copies] == [p.shape for p in adapter]
    assert any(not torch.equal(c, p) for c, p in zip(copies, adapter))
    assert trainer.teacher.after_update(3)
    assert all(torch.equal(c, p) for c, p in zip(trainer.teacher._snapshot._copies, adapter))
    assert all(torch.equal(p, before[n]) for n, p in trainer.model.named_parameters())


def test_the_plan_counts_4_bits():
    architecture = tiny_model(**SIZES).config
    settings = OPSDCConfig.from_dict({"model": {"lora": LORA, "quantize": "nf4"}})
    sizes = sizes_of(on_meta(architecture, settings.model), settings.model)
    linear = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
    assert sizes.in_4_bits == linear
    parts = make_plan(settings, memory_bytes=10**9, architecture=architecture).parts
    # Four bits, eight for every 64, and a float for every 64·256.
    assert parts["weights, frozen (4 bits)"]["update"] == linear * (4 + 8 / 64 + 32 / 64 / 256) / 8
    rest = sum(p.numel() for p in tiny_model(**SIZES).parameters()) - linear
    assert parts["weights, frozen (float32)"]["update"] == 4 * rest
    assert parts["a matrix, dequantized"] == dict.fromkeys(
        ("sampling", "teacher", "loss", "backward"), 4.0 * 64 * 128
    )


@needs_bitsandbytes
def test_the_plans_bytes_are_those_that_bitsandbytes_keeps(tmp_path):
    """Of matrices so large that the scales of scales count for what they do in real ones."""
    tiny_model(tied=False, hidden_size=512, intermediate_size=1024).save_pretrained(tmp_path)
    model = load_model(model_config(tmp_path))
    held = weights = 0
    for p in quantize.quantized(model).values():
        state = p.quant_state
        scales = (state.absmax, state.state2.absmax)
        held += sum(x.numel() * x.element_size() for x in (p, *scales))
        weights += quantize.elements(p)
    assert held == pytest.approx(quantize.BYTES * weights, rel=1e-3)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"model": {"quantize": "nf4"}}, r"model\.lora must be set with model\.quantize"),
        (
            {"model": {"quantize": "nf4", "lora": {}}, "distributed": {"strategy": "fsdp"}},
            r"distributed\.strategy must be ddp with model\.quantize",
        ),
        ({"model": {"quantize": "int3"}}, r"model\.quantize must be one of nf4"),
    ],
)
def test_settings_that_cannot_work_are_named(settings, words):
    with pytest.raises(ConfigError, match=words):
        OPSDCConfig.from_dict(settings)


def test_what_is_missing_is_named(folder, monkeypatch):
    with pytest.raises(ModelError, match=r"model\.quantize nf4: the model that was given"):
        prepare_model(tiny_model(), model_config(folder))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"pip install \"opsdc\[qlora\]\""):
        load_model(model_config(folder))


@needs_bitsandbytes
def test_a_quantized_head_is_refused(folder):
    plan = quantize.loading_config(torch.float32)
    plan.llm_int8_skip_modules = ["model.layers.0"]
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=plan)
    with pytest.raises(ModelError, match="the head is quantized too"):
        prepare_model(model, ModelConfig(lora=model_config(folder).lora, quantize="nf4"))


@pytest.mark.slow
@needs_vllm
@needs_bitsandbytes
def test_vllm_samples_from_what_is_trained(make_config, tmp_path_factory, tmp_path):
    place = small_folder(tmp_path_factory, "qwen3", tied=False, head_dim=64)
    config = make_config(
        **{
            "model.name_or_path": str(place),
            "model.lora": LORA,
            "model.quantize": "nf4",
            "rollout.engine": "vllm",
            "rollout.max_new_tokens": 24,
            "optim.lr": 1e-2,
        }
    )
    assert_synchronized(measure(config, 200, tmp_path), 5)
