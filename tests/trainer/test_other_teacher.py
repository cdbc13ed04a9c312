"""Another model as the teacher (`teacher.model`), from the loss of a step to a resumed run."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.passes import both_passes
from helpers.tiny import byte_tokenizer, tiny_model
from transformers import AutoModelForCausalLM, TrainerCallback

from opsdc.cli import main
from opsdc.config.settings import OPSDCConfig, TeacherConfig
from opsdc.errors import ConfigError, ModelError
from opsdc.method.batch import Layout, Pair
from opsdc.method.mixture import Mix
from opsdc.method.teacher import Teacher
from opsdc.models.head import read_head
from opsdc.models.other import OtherModel, load_other
from opsdc.planner.holders import PHASES
from opsdc.planner.plan import make_plan
from opsdc.record.lines import read_lines
from opsdc.train import OPSDCTrainer

PROMPT, TOLD, AGAINST = [1, 20, 21, 22], [50, 51, 52, 1, 20, 21, 22], [60, 61, 1, 20, 21, 22]
TOKENS = len(byte_tokenizer())


@pytest.fixture(autouse=True)
def no_picture(monkeypatch):
    """Drawing takes longer than all else here."""
    monkeypatch.setattr("opsdc.eval.report.plot_run", lambda folder: folder)


def wide(**settings):
    """A teacher of another architecture, width, depth and head."""
    sizes = {"hidden_size": 48, "num_hidden_layers": 3, "tied": False, "seed": 5}
    return tiny_model("qwen3", **{**sizes, **settings})


def pairs(dial=1.0, lengths=(9, 3, 14, 1, 6)):
    generator = torch.Generator().manual_seed(3)
    return [
        Pair(
            student_prompt_ids=PROMPT,
            teacher_prompt_ids=TOLD,
            against_prompt_ids=AGAINST,
            response_ids=torch.randint(3, TOKENS, (n,), generator=generator).tolist(),
            dial=dial,
        )
        for n in lengths
    ]


def layout(**changes):
    plain = Layout(packed=False, max_tokens=60, pad_id=0, dtype=torch.float32)
    return replace(plain, **changes)


def step_of(student, other, settings, where):
    config = OPSDCConfig.from_dict(settings)
    teacher = Teacher(student, config.teacher, other)
    batch = pairs(config.teacher.dial)
    loss, _, stats = both_passes(student, teacher, batch, where, config)
    return loss, torch.cat([p.grad.flatten() for p in student.parameters()]), stats


def expected(student, module, weights, columns):
    """Straight from the two models' own logits in float64, one response at a time."""

    def log_probabilities(model, prompt, response):
        logits = model(torch.tensor([[*prompt, *response]])).logits[0, -len(response) - 1 : -1]
        return logits[:, :columns].log_softmax(-1)

    total = 0.0
    for p in pairs():
        n = len(p.response_ids)
        prompts = {"plain": PROMPT, "concise": TOLD, "against": AGAINST}
        with torch.no_grad():
            mixed = sum(
                w * log_probabilities(module, prompts[name], p.response_ids)
                for name, w in weights.items()
            ).log_softmax(-1)
        s = log_probabilities(student, p.student_prompt_ids, p.response_ids)
        total = total + (s.exp() * (s - mixed)).sum() / (n * len(pairs()))
    gradients = torch.autograd.grad(total, list(student.parameters()))
    return total.item(), torch.cat([g.flatten() for g in gradients])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("teacher", "mix"),
    [
        ({}, Mix()),
        ({"dial": 1.5}, Mix(dial=1.5)),
        ({"dial": 0.6, "against": "Ramble.", "against_weight": 0.3}, Mix(dial=0.6, against=0.3)),
    ],
    ids=["paper", "dial", "against"],
)
@pytest.mark.parametrize(
    "make",
    [
        lambda: tiny_model(seed=7),
        wide,
        lambda: wide(vocab_size=272),
        lambda: wide(vocab_size=TOKENS),
    ],
    ids=["alike", "another width", "padded head", "shorter head"],
)
def test_a_step_is_the_formula_on_both_models_own_logits(make, teacher, mix, packed):
    student, module = tiny_model().double(), make().double()
    rows = len(read_head(module).weight)
    other = OtherModel(module, None if rows == 264 else TOKENS)
    settings = {"teacher": {"mode": "frozen", "model": "other", **teacher}}
    before = [p.clone() for p in module.parameters()]
    loss, gradient, _ = step_of(student, other, settings, layout(packed=packed))
    columns = 264 if rows == 264 else TOKENS
    weights = mix.weights(start_is_teacher=True)
    true_loss, true_gradient = expected(student, module, weights, columns)
    assert loss > 0.1
    assert loss == pytest.approx(true_loss, rel=1e-6)
    assert float((gradient - true_gradient).norm() / true_gradient.norm()) <= 1e-6
    assert all(torch.equal(p, b) and p.grad is None for p, b in zip(module.parameters(), before))


@pytest.mark.parametrize("loss", [{"token_share": 0.5}, {"skip_tolerance": 0.01}], ids=str)
def test_other_losses_take_it_too(loss):
    """The padding of either head counts nowhere: its weights may be anything."""
    found = []
    for value in (0.0, 3.0):
        student, module = tiny_model(tied=False), wide(vocab_size=272)
        for model in (student, module):
            with torch.no_grad():
                read_head(model).weight[TOKENS:] += value
        settings = {"teacher": {"mode": "frozen", "model": "other"}, "loss": loss}
        found.append(step_of(student, OtherModel(module, TOKENS), settings, layout())[:2])
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])


def test_it_waits_in_host_memory_with_the_same_bits():
    found = []
    for offload in (False, True):
        student = tiny_model()
        settings = {"teacher": {"mode": "frozen", "model": "other", "offload": offload}}
        found.append(step_of(student, OtherModel(wide()), settings, layout())[:2])
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])


def test_it_is_neither_the_student_nor_a_copy_and_never_moves():
    student = tiny_model()
    config = TeacherConfig(mode="frozen", model="other")
    teacher = Teacher(student, config, OtherModel(tiny_model()))
    assert not teacher.equals_student(0)
    assert not teacher.is_student
    assert not teacher.is_copy
    assert not any(teacher.after_update(step) for step in range(1, 60))
    assert teacher.version == 0


def test_a_mixture_asks_for_its_head_not_the_students():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    capped = Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=264, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
            num_attention_heads=4, num_key_value_heads=2, head_dim=8, final_logit_softcapping=30.0,
        )
    )  # fmt: skip
    config = TeacherConfig(mode="frozen", model="other", dial=0.5)
    with pytest.raises(ModelError, match="caps its logits softly"):
        Teacher(tiny_model(), config, OtherModel(capped))
    Teacher(capped, config, OtherModel(tiny_model()))


def test_an_id_without_an_embedding_there_is_read_all_the_same():
    """A student with more padding may sample a row that is no token."""
    student, other = tiny_model(vocab_size=280), OtherModel(wide(vocab_size=TOKENS), TOKENS)
    teacher = Teacher(student, TeacherConfig(mode="frozen", model="other"), other)
    odd = [Pair(student_prompt_ids=PROMPT, teacher_prompt_ids=TOLD, response_ids=[5, 279, 6])]
    assert both_passes(student, teacher, odd, layout(), OPSDCConfig())[0] > 0


# --- whole runs


@pytest.fixture
def taught(tmp_path, make_config):
    """`taught(**overrides)`: a run whose teacher is a wider model with a padded head."""
    folder = tmp_path / "other"
    wide(vocab_size=272).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)

    def make(**overrides):
        settings = {"teacher.model": str(folder), "teacher.mode": "frozen", "train.steps": 3}
        return make_config(**{**settings, "eval.problems": 0, **overrides})

    return make


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


def outcome(config):
    folder = Path(config.output_dir)
    rows = read_lines(folder / "metrics.jsonl")
    record = [{k: v for k, v in row.items() if not k.startswith("perf/")} for row in rows]
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    return record, dict(model.named_parameters())


def test_a_run_resumes_to_the_bit_and_saves_nothing_of_the_teacher(taught, tmp_path, capsys):
    whole = taught(output_dir=str(tmp_path / "whole"))
    trainer = OPSDCTrainer(None, whole)
    before = [p.clone() for p in trainer.teacher.module.parameters()]
    trainer.train()
    after = trainer.teacher.module.parameters()
    assert all(torch.equal(p, b) for p, b in zip(after, before))
    assert "same prompt on both sides: not tried, another model teaches" in capsys.readouterr().out
    assert not list(Path(whole.output_dir).rglob("teacher"))

    parts = taught(output_dir=str(tmp_path / "parts"))
    OPSDCTrainer(None, parts, callbacks=[StopAt(2)]).train()
    OPSDCTrainer(None, parts).train()
    (record, weights), (its_record, its_weights) = outcome(whole), outcome(parts)
    assert record == its_record
    assert all(torch.equal(weights[n], its_weights[n]) for n in weights)
    assert all(row["loss_nats"] > 0.01 and row["teacher_version"] == 0 for row in record)


def test_a_changed_teacher_is_named_when_a_run_goes_on(taught, tmp_path, capsys):
    config = taught()
    OPSDCTrainer(None, config, callbacks=[StopAt(2)]).train()
    # The same weights from another place are the same teacher.
    (tmp_path / "other").rename(tmp_path / "moved")
    moved = replace(config, teacher=replace(config.teacher, model=str(tmp_path / "moved")))
    OPSDCTrainer(None, moved).state.resume()
    assert "teacher.model" in capsys.readouterr().err
    wide(vocab_size=272, seed=9).save_pretrained(tmp_path / "moved")
    with pytest.raises(ConfigError, match=r"other contents \(teacher\.weights: sha256 \w+ → sha"):
        OPSDCTrainer(None, moved).train()
    alone = replace(config, teacher=TeacherConfig(mode="frozen"))
    with pytest.raises(ConfigError, match=r"other contents \(teacher: \{"):
        OPSDCTrainer(None, alone).train()


@pytest.mark.whole
def test_the_command_line_trains_plans_and_looks(taught, tmp_path, monkeypatch, capsys):
    config = taught()
    file = tmp_path / "run.yaml"
    file.write_text(config.to_yaml())
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--config", str(file)]) == 0
    assert main(["inspect", "--config", str(file)]) == 0
    capsys.readouterr()
    assert main(["plan", "--config", str(file)]) == 0
    assert "other model's weights" in capsys.readouterr().out
    assert main(["train", "--config", str(file), "--dry-run"]) == 0
    assert "taught by a twin of" in capsys.readouterr().out


def test_lora_in_bfloat16(taught):
    pytest.importorskip("peft")
    config = taught(**{"model.lora.r": 2, "model.dtype": "bfloat16", "teacher.dial": 0.7})
    trainer = OPSDCTrainer(None, config)
    assert {p.dtype for p in trainer.teacher.module.parameters()} == {torch.bfloat16}
    trainer.train()
    assert all(row["loss_nats"] > 0 for row in outcome_rows(config))


def outcome_rows(config):
    return read_lines(Path(config.output_dir) / "metrics.jsonl")


@pytest.mark.whole
@pytest.mark.parametrize(
    ("settings", "row"),
    [({"teacher.target": 0.5}, "dial"), ({"teacher.against": "Ramble on."}, "loss_nats")],
)
def test_target_and_against(taught, settings, row):
    config = taught(**settings)
    OPSDCTrainer(None, config).train()
    assert all(row in r for r in outcome_rows(config))


def test_the_students_chat_template_renders_both_prompts(taught, tmp_path, capsys):
    config = taught()
    said = "has a chat template of its own, which is not used"
    load_other(config, tiny_model(), byte_tokenizer())
    assert said not in capsys.readouterr().err
    tokenizer = byte_tokenizer()
    tokenizer.chat_template += "<think>"
    tokenizer.save_pretrained(tmp_path / "other")
    load_other(config, tiny_model(), byte_tokenizer())
    assert said in capsys.readouterr().err


def test_the_plan_counts_its_weights_states_and_products(taught):
    def plan(**teacher):
        settings = {f"teacher.{key}": value for key, value in teacher.items()}
        return make_plan(taught(**settings, **{"loss.backend": "chunked"}), memory_bytes=10**9)

    alone, whole, paged = plan(model=None), plan(), plan(offload=True)
    module = wide(vocab_size=272)
    weights = 4 * sum(p.numel() for p in module.parameters())
    name, states = "other model's weights (float32)", "teacher's hidden states"
    assert whole.parts[name] == dict.fromkeys(PHASES, weights)
    head = 4 * read_head(module).weight.numel()
    assert paged.parts[name] == {"teacher": weights, "loss": head, "backward": head}
    assert "teacher's copy (float32)" not in whole.parts
    assert whole.parts[states]["loss"] == alone.parts[states]["loss"] * 48 / 32
    # One of four products is the teacher's.
    assert whole.loss_flop == alone.loss_flop * (3 + 48 / 32) / 4
    assert whole.parts["activations"]["teacher"] > alone.parts["activations"]["teacher"]
    assert whole.parts["activations"]["backward"] == alone.parts["activations"]["backward"]


# --- what is refused


def with_another_token(tokenizer):
    tokenizer.add_tokens(["<|extra|>"])


def with_another_end(tokenizer):
    tokenizer.eos_token = "<|endoftext|>"


def with_another_order(tokenizer):
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    vocab = state["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    tokenizer._tokenizer = type(tokenizer._tokenizer).from_str(json.dumps(state))


def with_another_reading(tokenizer):
    from tokenizers import normalizers

    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (with_another_token, "259 tokens, and '<|extra|>' has the id 259 there and None here"),
        (with_another_order, "has the id"),
        (with_another_end, "ends in '<|endoftext|>' there and in '<|im_end|>' here"),
        (with_another_reading, "as other tokens, though they have the same ones"),
    ],
)
def test_another_vocabulary_is_refused_with_both_names(taught, tmp_path, change, words):
    tokenizer = byte_tokenizer()
    change(tokenizer)
    tokenizer.save_pretrained(tmp_path / "other")
    config = taught_again(taught, tokenizer, tmp_path)
    with pytest.raises(ModelError, match=re.escape(words)) as error:
        OPSDCTrainer(None, config)
    assert f"teacher.model {tmp_path / 'other'} teaches model.name_or_path" in str(error.value)
    assert not Path(config.output_dir).exists()


def taught_again(taught, tokenizer, tmp_path):
    config = taught()
    tokenizer.save_pretrained(tmp_path / "other")
    return config


def test_a_head_that_lacks_tokens_is_refused(taught, tmp_path):
    config = taught()
    wide(vocab_size=TOKENS - 1).save_pretrained(tmp_path / "other")
    with pytest.raises(ModelError, match="one of them lacks tokens of the other"):
        load_other(config, tiny_model(), byte_tokenizer())


def test_too_few_positions_are_said_before_step_1(taught, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    config = taught()
    sizes = {"vocab_size": 264, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 40}
    GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=2)).save_pretrained(
        tmp_path / "other"
    )
    with pytest.raises(ModelError, match=r"teacher\.model .* is to have 40 tokens at most"):
        OPSDCTrainer(None, config).train()


def test_a_folder_that_is_none_names_the_setting(taught):
    with pytest.raises(ModelError, match=r"^teacher\.model: no tokenizer in '\./no/such'"):
        OPSDCTrainer(None, taught(**{"teacher.model": "./no/such"}))
