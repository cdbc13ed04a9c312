"""A run goes on only as what it was: contents are compared, not names; a run has one date."""

import datetime
import json
import re

import pytest
import torch
from helpers.tiny import CHAT_TEMPLATE, byte_tokenizer, tiny_model
from transformers import (
    GraniteConfig,
    GraniteForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    TrainerCallback,
)
from transformers.utils import chat_template_utils

from opsdc.config.settings import LoRAConfig, ModelConfig, OPSDCConfig
from opsdc.errors import ConfigError
from opsdc.models.load import load_weights, prepare_model, save_weights
from opsdc.record.contents import changes
from opsdc.record.lines import read_lines
from opsdc.train import OPSDCTrainer

STEPS = {"eval.problems": 0, "train.steps": 3}
DATED = CHAT_TEMPLATE.replace(
    "{% for m", "{%- if strftime_now is defined %}{{ strftime_now(FORMAT) }}\n{% endif %}{% for m"
)


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


@pytest.fixture(autouse=True)
def no_picture(monkeypatch):
    """Drawing takes longer than all else here."""
    monkeypatch.setattr("opsdc.eval.report.plot_run", lambda folder: folder)


def losses(folder):
    return [row["loss_nats"] for row in read_lines(folder / "metrics.jsonl")]


@pytest.fixture
def mine(tmp_path, problem_file):
    """A base folder, a data file and an instruction of the test's own, to be changed."""
    tiny_model().save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "data.jsonl").write_text(problem_file.read_text())
    (tmp_path / "told.txt").write_text("Be brief.")
    return {
        **STEPS,
        "model.name_or_path": str(tmp_path / "base"),
        "data.source": str(tmp_path / "data.jsonl"),
        "prompt.instruction": str(tmp_path / "told.txt"),
    }


def edit_instruction(folder):
    (folder / "told.txt").write_text("Be very brief.")


def edit_data(folder):
    path = folder / "data.jsonl"
    path.write_text(path.read_text().replace("What is", "How much is"))


def edit_an_answer(folder):
    path = folder / "data.jsonl"
    path.write_text(path.read_text().replace('"answer": "3"', '"answer": "4"'))


def edit_one_weight(folder):
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 4] *= 1.001
    model.save_pretrained(folder / "base")


def edit_the_config(folder):
    path = folder / "base" / "config.json"
    config = json.loads(path.read_text())
    config["rms_norm_eps"] = 1e-3
    path.write_text(json.dumps(config))


def edit_the_end(folder):
    path = folder / "base" / "generation_config.json"
    config = json.loads(path.read_text())
    config["eos_token_id"] = [2, 77]
    path.write_text(json.dumps(config))


def edit_the_template(folder):
    (folder / "base" / "chat_template.jinja").write_text(CHAT_TEMPLATE.replace("\n", "\n\n"))


EDITS = {
    edit_instruction: ["instruction: 'Be brief.' → 'Be very brief.'", "prompts.training: sha256"],
    edit_data: ["problems.training: sha256", "problems.held_out: sha256", "prompts.training"],
    edit_an_answer: ["problems.training: sha256"],
    edit_one_weight: ["model.weights: sha256"],
    edit_the_config: ["model.config.rms_norm_eps: 1e-06 → 0.001"],
    edit_the_end: ["model.eos_token_id: 2 → [2, 77]"],
    edit_the_template: ["chat_template: sha256", "prompts.training: sha256"],
}


@pytest.mark.whole
@pytest.mark.parametrize("edit", EDITS, ids=lambda f: f.__name__)
def test_other_contents_under_the_same_names_are_refused_by_name(
    make_config, mine, tmp_path, edit, capsys
):
    config = make_config(**mine)
    OPSDCTrainer(None, config, callbacks=[StopAt(2)]).train()
    before = losses(tmp_path / "run")
    edit(tmp_path)
    with pytest.raises(ConfigError) as refused:
        OPSDCTrainer(None, config).train()
    told = str(refused.value)
    assert [entry for entry in EDITS[edit] if entry not in told] == []
    assert told.count("→") == len(re.findall(r"[;(] ?(?:\w+\.)*\w+: ", told))
    if edit is edit_an_answer:
        assert "prompts." not in told
    assert losses(tmp_path / "run") == before
    # Asked for by name it goes on, and says the same.
    capsys.readouterr()
    folder = tmp_path / "run" / "checkpoints" / "step-000002"
    OPSDCTrainer(None, make_config(**mine, **{"train.resume": str(folder)})).train()
    said = capsys.readouterr().err
    assert [entry for entry in EDITS[edit] if f"since that checkpoint: {entry}" not in said] == []
    assert len(losses(tmp_path / "run")) == 3


def test_the_same_contents_under_other_names_go_on(make_config, mine, tmp_path, capsys):
    """A moved base and a renamed data file: named as settings that changed, and no more."""
    OPSDCTrainer(None, make_config(**mine), callbacks=[StopAt(2)]).train()
    for old, new in (("base", "moved"), ("data.jsonl", "renamed.jsonl")):
        (tmp_path / old).rename(tmp_path / new)
    moved = {
        "model.name_or_path": str(tmp_path / "moved"),
        "data.source": str(tmp_path / "renamed.jsonl"),
    }
    OPSDCTrainer(None, make_config(**{**mine, **moved})).train()
    (tmp_path / "moved").rename(tmp_path / "base")
    (tmp_path / "renamed.jsonl").rename(tmp_path / "data.jsonl")
    # Finished, it still only reports.
    OPSDCTrainer(None, make_config(**mine)).train()
    told = [line for line in capsys.readouterr().err.splitlines() if "changed since" in line]
    assert [line.split(": ")[1] for line in told] == 2 * ["model.name_or_path", "data.source"]
    assert len(losses(tmp_path / "run")) == 3


@pytest.mark.parametrize("lora", [None, {"r": 2, "alpha": 4}])
def test_an_adapter_of_its_own_is_not_part_of_the_base(make_config, lora, tmp_path):
    """From Python: a PEFT model is wrapped anew, from other random numbers, in every run."""
    import peft

    for seed in (1, 2):
        model = tiny_model()
        if lora is None:
            torch.manual_seed(seed)
            settings = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
            model = peft.get_peft_model(model, settings)
        config = make_config(**STEPS, **{"model.lora": lora})
        stop = [StopAt(2)] if seed == 1 else []
        tokenizer = byte_tokenizer()
        OPSDCTrainer(model, config, processing_class=tokenizer, callbacks=stop).train()
    assert len(losses(tmp_path / "run")) == 3


@pytest.mark.whole
@pytest.mark.parametrize(
    "change", [{"optim.lr": 1e-4}, {"teacher.refresh_steps": 3}, {"eval.max_new_tokens": 5}]
)
def test_a_finished_run_is_not_taken_for_another_experiment(make_config, tmp_path, change):
    """Two experiments in one folder: the second trained nothing and mixed their files."""
    OPSDCTrainer(None, make_config(**STEPS)).train()
    config = (tmp_path / "run" / "config.yaml").read_text()
    (name,) = change
    with pytest.raises(ConfigError, match=rf"end of a run with other settings \({name}: .*raise"):
        OPSDCTrainer(None, make_config(**STEPS, **change)).train()
    assert (tmp_path / "run" / "config.yaml").read_text() == config
    # With steps left it goes on, as it always could.
    OPSDCTrainer(None, make_config(**{**STEPS, **change, "train.steps": 4})).train()
    assert len(losses(tmp_path / "run")) == 4


# Models of other architectures.


def other(kind):
    """A model with parameters of the names and shapes of the tiny ones."""
    torch.manual_seed(1)
    sizes = dict(  # noqa: C408
        vocab_size=264,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        eos_token_id=2,
        pad_token_id=0,
    )
    if kind == "granite":
        return GraniteForCausalLM(GraniteConfig(**sizes))
    return MistralForCausalLM(MistralConfig(**sizes, sliding_window=64))


@pytest.mark.whole
@pytest.mark.parametrize("lora", [None, {"r": 2, "alpha": 4}])
@pytest.mark.parametrize(
    ("first", "second"), [("qwen3", "granite"), ("llama", "granite"), ("llama", "mistral")]
)
def test_a_checkpoint_of_another_architecture_is_refused(
    make_config, tmp_path, first, second, lora
):
    config = {**STEPS, "model.lora": lora}
    tokenizer = byte_tokenizer()
    trainer = OPSDCTrainer(
        tiny_model(first), make_config(**config), None, None, tokenizer, [StopAt(1)]
    )
    trainer.train()
    kept = losses(tmp_path / "run")
    for resume in ("auto", str(tmp_path / "run" / "checkpoints" / "step-000001")):
        again = make_config(**config, **{"train.resume": resume})
        trainer = OPSDCTrainer(other(second), again, None, None, tokenizer)
        with pytest.raises(
            ConfigError, match=rf"(?i)another model .*'{first}.* → '{second}.*output"
        ):
            trainer.train()
    assert losses(tmp_path / "run") == kept


@pytest.mark.parametrize("adapter", [False, True])
def test_weights_without_a_place_are_not_dropped(tmp_path, adapter):
    """Qwen3's norms of queries and keys, or an adapter on more modules."""
    if adapter:
        all_linear = ModelConfig(lora=LoRAConfig(r=2, alpha=4))
        save_weights(prepare_model(tiny_model(), all_linear), tmp_path)
        few = ModelConfig(lora=LoRAConfig(r=2, alpha=4, target_modules=("q_proj",)))
        model = prepare_model(tiny_model(), few)
    else:
        save_weights(tiny_model("qwen3"), tmp_path)
        model = other("granite")
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(KeyError, match="tensors have no place in this model"):
        load_weights(model, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))


def test_other_versions_may_know_other_entries_of_a_config():
    old = {"model": {"config": {"a": 1, "gone": 2}, "weights": "x"}}
    new = {"model": {"config": {"a": 3, "new": 4}, "weights": "x"}}
    assert changes(old, new) == ["model.config.a: 1 → 3"]


# The date of a run.


class Clock(datetime.datetime):
    today_is = datetime.datetime(2026, 1, 31, 23, 59)

    @classmethod
    def now(cls, tz=None):
        return cls.today_is


class Today(datetime.date):
    @classmethod
    def today(cls):
        return Clock.today_is.date()


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(chat_template_utils, "datetime", Clock)
    monkeypatch.setattr("opsdc.record.contents.datetime.date", Today)
    monkeypatch.setattr(Clock, "today_is", datetime.datetime(2026, 1, 31, 23, 59))
    return Clock


class Midnight(TrainerCallback):
    """After step 1 it is the next day, in a template that any tokenizer of the run renders."""

    def on_step_end(self, args, state, control, **kwargs):
        Clock.today_is = datetime.datetime(2026, 2, 1, 0, 1)


TEMPLATES = {
    # As Llama-3.2, gpt-oss (inside a macro) and Granite write it.
    "llama": DATED.replace("FORMAT", "'%d %b %Y'"),
    "gpt-oss": "{%- macro day() -%}{{ strftime_now('%Y-%m-%d') }}{%- endmacro -%}{{ day() }}"
    + CHAT_TEMPLATE,
    "granite": DATED.replace("FORMAT", "'%B %d, %Y'"),
}


@pytest.mark.whole
@pytest.mark.parametrize("kind", TEMPLATES)
def test_a_run_has_one_date(make_config, tmp_path, clock, kind):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATES[kind]
    whole = make_config(**STEPS, output_dir=str(tmp_path / "whole"))
    trainer = OPSDCTrainer(tiny_model(), whole, processing_class=tokenizer)
    assert "2026" in trainer.problems[0].prompts.student_text
    assert "31" in trainer.problems[0].prompts.teacher_text
    trainer.train()
    config = make_config(**STEPS)
    for callbacks in ([Midnight(), StopAt(2)], []):
        trainer = OPSDCTrainer(
            tiny_model(), config, processing_class=tokenizer, callbacks=callbacks
        )
        trainer.train()
        assert trainer.config.prompt.date == "2026-01-31"
    assert clock.now().day == 1
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert OPSDCConfig.load(tmp_path / "run" / "config.yaml").prompt.date == "2026-01-31"
    # A run of its own has a date of its own, and other losses.
    other_day = make_config(**STEPS, output_dir=str(tmp_path / "later"))
    OPSDCTrainer(tiny_model(), other_day, processing_class=tokenizer).train()
    assert losses(tmp_path / "later") != losses(tmp_path / "whole")


def test_a_date_is_a_setting(tmp_path):
    path = tmp_path / "a.yaml"
    for text in ("2025-06-30", '"2025-06-30"'):
        path.write_text(f"prompt: {{date: {text}}}")
        assert OPSDCConfig.load(path).prompt.date == "2025-06-30"
