"""The module for other people's trainers: its loss, its gradients, and what Trainer makes of it."""

import copy
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from helpers.tiny import tiny_model
from safetensors.torch import load_file
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from opsdc import Distiller, collate
from opsdc.config.settings import LossConfig
from opsdc.errors import ConfigError, DataError, ModelError
from opsdc.method.batch import Pair
from opsdc.method.mixture import Mix


def make_pairs(count=4, seed=0):
    """Responses of 2, 7, 12, … tokens: a mean of means is far from the mean."""
    g = torch.Generator().manual_seed(seed)

    def tokens(n):
        return torch.randint(3, 264, (n,), generator=g).tolist()

    return [
        Pair(
            student_prompt_ids=tokens(3 + i % 2),
            teacher_prompt_ids=tokens(6),
            response_ids=tokens(2 + 5 * i),
        )
        for i in range(count)
    ]


def truth(student, teacher, pairs, share=1.0):
    """Mean over all response tokens of KL(student‖teacher), textbook, from the models' logits; the
    sum over those `share` of each response alone whose KL is largest."""

    def log_probs(model, prompt, response):
        logits = model(torch.tensor([[*prompt, *response]])).logits
        return logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)

    total = 0.0
    for pair in pairs:
        log_q = log_probs(student, pair.student_prompt_ids, pair.response_ids)
        with torch.no_grad():
            log_p = log_probs(teacher, pair.teacher_prompt_ids, pair.response_ids)
        kl = (log_q.exp() * (log_q - log_p)).sum(1)
        total = total + kl.topk(max(1, round(share * len(kl)))).values.sum()
    return total / sum(len(pair.response_ids) for pair in pairs)


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_close(got, want, rel):
    assert got.keys() == want.keys()
    assert got
    for name, b in want.items():
        assert (got[name] - b).norm() <= rel * b.norm(), name


@pytest.mark.parametrize("share", [1.0, 0.4])
@pytest.mark.parametrize("tied", [True, False])
def test_loss_and_gradients_are_those_of_the_logits(tied, share):
    student, teacher = (tiny_model(tied=tied, seed=s).double() for s in (0, 1))
    pairs = make_pairs()
    want = truth(student, teacher, pairs, share)
    want.backward()
    expected = gradients(student)
    student.zero_grad()
    settings = LossConfig(normalization="token", token_share=share)
    loss = Distiller(student, teacher, settings)(**collate(pairs))["loss"]
    loss.backward()
    # The tokens' weights 1/n are float32.
    assert float(loss.detach()) == pytest.approx(float(want.detach()), rel=1e-6)
    assert_close(gradients(student), expected, 1e-6)
    assert not gradients(teacher)


def test_a_teacher_with_another_head_of_another_width():
    torch.manual_seed(3)
    config = Gemma2Config(
        vocab_size=264, hidden_size=48, intermediate_size=64, num_hidden_layers=1, head_dim=12,
        num_attention_heads=4, num_key_value_heads=2, final_logit_softcapping=2.0,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=0.3,
    )  # fmt: skip
    student, teacher, pairs = tiny_model(), Gemma2ForCausalLM(config).eval(), make_pairs()
    want = truth(student, teacher, pairs)
    loss = Distiller(student, teacher)(**collate(pairs))["loss"]
    assert float(loss.detach()) == pytest.approx(float(want.detach()), rel=1e-5)


def test_micro_batches_add_up_to_the_batch():
    student, pairs = tiny_model().double(), make_pairs()
    distiller = Distiller(student, tiny_model(seed=1).double())
    items = sum(len(pair.response_ids) for pair in pairs)
    whole = distiller(**collate(pairs))["loss"]
    whole.backward()
    want = gradients(student)
    student.zero_grad()
    parts = [distiller(**collate([p]), num_items_in_batch=torch.tensor(items)) for p in pairs]
    sum(part["loss"] for part in parts).backward()
    assert sum(float(p["loss"].detach()) for p in parts) == pytest.approx(
        float(whole.detach()), rel=1e-6
    )
    assert_close(gradients(student), want, 1e-6)


def test_a_batch_without_response_tokens_is_a_finite_zero():
    student = tiny_model()
    arguments = collate(make_pairs(2))
    for name in ("labels", "teacher_labels"):
        arguments[name].fill_(-100)
    loss = Distiller(student, tiny_model(seed=1))(**arguments)["loss"]
    loss.backward()
    assert float(loss.detach()) == 0
    assert all(not g.any() for g in gradients(student).values())


def test_the_teacher_is_frozen_and_stays_in_evaluation_mode():
    teacher = tiny_model(seed=1)
    distiller = Distiller(tiny_model(), teacher).train()
    assert distiller.student.training
    assert not teacher.training
    assert not any(p.requires_grad for p in teacher.parameters())


def test_what_cannot_be_meant_is_refused():
    student, teacher = tiny_model(), tiny_model(seed=1)
    with pytest.raises(ModelError, match=r"copy\.deepcopy\(student\)"):
        Distiller(student)
    with pytest.raises(ConfigError, match="use 'token'"):
        Distiller(student, teacher, LossConfig(normalization="sequence"))
    arguments = collate(make_pairs())
    arguments["teacher_input_ids"] = arguments["teacher_input_ids"].roll(1, 1)
    with pytest.raises(DataError, match="same responses"):
        Distiller(student, teacher)(**arguments)


def adapted(dropout):
    student = peft.get_peft_model(
        tiny_model(attention_dropout=dropout),
        peft.LoraConfig(r=4, target_modules="all-linear", lora_dropout=dropout),
    )
    torch.manual_seed(7)
    for name, parameter in student.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return student


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_without_a_teacher_it_is_the_base_of_the_adapter(dropout):
    pairs, arguments = make_pairs(), collate(make_pairs())
    student, base = adapted(dropout), tiny_model(attention_dropout=dropout)
    torch.manual_seed(0)
    loss = Distiller(student).train()(**arguments)["loss"]
    loss.backward()
    got = gradients(student)
    assert got
    assert all("lora_" in name for name in got)

    student.zero_grad()
    torch.manual_seed(0)
    Distiller(student, base).train()(**arguments)["loss"].backward()
    # Another head tensor, equal in value: logits are then subtracted, not computed of a difference.
    assert_close(gradients(student), got, 1e-4)
    if not dropout:
        want = truth(student, base, pairs)
        assert float(loss.detach()) == pytest.approx(float(want.detach()), rel=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
        peft.PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
    ],
)
def test_an_adapter_that_the_loss_does_not_see_is_refused(config):
    with pytest.raises(ModelError, match="virtual tokens"):
        Distiller(peft.get_peft_model(tiny_model(), config), tiny_model(seed=1))


def with_norm():
    student = adapted(0.0)
    student.get_base_model().model.norm.weight.requires_grad_(True)
    return student


def test_a_teacher_made_of_the_student_may_not_drift():
    with pytest.raises(ModelError, match=r"norm\.weight.*pass a teacher"):
        Distiller(with_norm())
    # With a teacher of its own it is trained like the rest.
    loss = Distiller(with_norm(), tiny_model())(**collate(make_pairs()))["loss"]
    assert float(loss.detach()) > 0


@pytest.mark.parametrize("alias", ["itself", "its base", "its layers", "start"])
def test_a_teacher_that_is_the_student_is_refused(alias):
    student = tiny_model()
    teacher, start = student, None
    if alias == "its base":
        student = peft.get_peft_model(student, peft.LoraConfig(target_modules=["q_proj"]))
    if alias == "its layers":
        teacher = tiny_model(seed=1)
        teacher.model.layers[1] = student.model.layers[1]
    if alias == "start":
        teacher, start = tiny_model(seed=1), student
    name = "start" if alias == "start" else "teacher"
    with pytest.raises(ModelError, match=rf"the {name} holds.*copy\.deepcopy\(student\)"):
        Distiller(student, teacher, mix=Mix(anchor=0.2), start=start)
    assert any(p.requires_grad for p in student.parameters())


@pytest.mark.parametrize(("ours", "theirs"), [(264, 272), (280, 264), (272, 280)])
@pytest.mark.parametrize("share", [1.0, 0.5])
@pytest.mark.parametrize("anchor", [0.0, 0.3])
def test_other_padding_of_the_vocabulary_is_cut_off(ours, theirs, share, anchor):
    student = tiny_model(vocab_size=ours).double()
    teacher = tiny_model(seed=1, vocab_size=theirs).double()
    start = tiny_model(seed=2, vocab_size=theirs + 8).double() if anchor else None
    pairs, settings = make_pairs(), LossConfig(normalization="token", token_share=share)
    with pytest.raises(ConfigError, match=rf"{ours}, {theirs}.*vocab_size=len\(tokenizer\)"):
        Distiller(student, teacher, settings)
    with pytest.raises(ConfigError, match=r"between 1 and 2.*got 281"):
        Distiller(student, teacher, settings, vocab_size=281)

    def first_rows(model):
        """The same model with 264 rows."""
        model = copy.deepcopy(model)
        model.resize_token_embeddings(264)
        return model

    twin, mix = first_rows(student), Mix(anchor=anchor)
    frozen = [m and first_rows(m) for m in (teacher, start)]
    want = Distiller(twin, frozen[0], settings, mix, frozen[1])(**collate(pairs))["loss"]
    want.backward()
    got = Distiller(student, teacher, settings, mix, start, 264)(**collate(pairs))["loss"]
    got.backward()
    assert float(got.detach()) == pytest.approx(float(want.detach()), rel=1e-9)
    for (name, p), q in zip(student.named_parameters(), twin.parameters(), strict=True):
        assert not p.grad[len(q) :].any(), name
        assert torch.allclose(p.grad[: len(q)], q.grad, rtol=1e-6, atol=1e-12), name


@pytest.mark.parametrize("theirs", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("ours", [torch.bfloat16, torch.float32])
def test_student_and_teacher_of_two_dtypes_meet_in_the_wider(ours, theirs):
    student, teacher = tiny_model().to(ours), tiny_model(seed=1).to(theirs)
    # A bfloat16 student is trained in float32.
    wide, rounded = copy.deepcopy(student).float(), copy.deepcopy(teacher)
    loss = Distiller(student, teacher)(**collate(make_pairs()))["loss"]
    assert {p.dtype for p in student.parameters()} == {torch.float32}
    want = truth(wide, rounded, make_pairs())
    # The textbook rounds the teacher's logits to bfloat16 too.
    rel = 2e-2 if theirs == torch.bfloat16 else 1e-5
    assert float(loss.detach()) == pytest.approx(float(want.detach()), rel=rel)


@pytest.mark.parametrize("whose", ["student", "teacher", "start"])
def test_rows_beyond_a_models_positions_are_refused(whose):
    """Rotary positions that change with the length would make a row depend on its neighbours."""
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    models = {name: tiny_model(seed=i) for i, name in enumerate(("student", "teacher", "start"))}
    models[whose] = tiny_model(max_position_embeddings=20, rope_parameters=rope)
    distiller = Distiller(**models, mix=Mix(anchor=0.2))
    assert distiller(**collate(make_pairs(2)))["loss"] > 0
    with pytest.raises(DataError, match=r"rows of 23 tokens.* 20 at most.*dynamic"):
        distiller(**collate(make_pairs(4)))


class Gradients(TrainerCallback):
    def __init__(self):
        self.seen = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.seen.append(gradients(model.student))


def run(folder, *, rows=4, accumulate=1, resume=None, student=None, teacher=None,
        collator=collate, **settings):  # fmt: skip
    """(losses logged, gradients before each step, the student) of a Trainer on the tiny model."""
    set_seed(0)
    seen = Gradients()
    arguments = {"max_steps": 2, "save_strategy": "no", "learning_rate": 1e-2, **settings}
    trainer = Trainer(
        model=Distiller(student or tiny_model(), teacher or tiny_model(seed=1)),
        args=TrainingArguments(
            str(folder),
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=accumulate,
            max_grad_norm=0.0,
            logging_steps=1,
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            **arguments,
        ),
        train_dataset=make_pairs(8),
        eval_dataset=make_pairs(3, seed=9),
        data_collator=collator,
        callbacks=[seen],
    )
    trainer.train(resume_from_checkpoint=resume)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, seen.seen, trainer


def test_trainer_one_times_b_equals_b_times_one(tmp_path):
    def models():
        return {"student": tiny_model().double(), "teacher": tiny_model(seed=1).double()}

    losses, grads, _ = run(tmp_path, rows=4, accumulate=1, **models())
    losses_b, grads_b, _ = run(tmp_path, rows=1, accumulate=4, **models())
    assert len(losses) == len(grads) == 2
    # float64, so that what is left is how the step is cut and not how a backbone rounds.
    assert losses_b == pytest.approx(losses, rel=1e-6)
    for got, want in zip(grads_b, grads, strict=True):
        assert_close(got, want, 1e-6)


def test_trainer_logs_the_token_mean_and_evaluates_it(tmp_path):
    student, teacher = tiny_model(), tiny_model(seed=1)
    before = copy.deepcopy(student)
    losses, _, trainer = run(tmp_path, rows=8, max_steps=1, student=student, teacher=teacher)
    want = truth(before, teacher, make_pairs(8))
    assert losses[0] == pytest.approx(float(want.detach()), rel=1e-5)
    found = trainer.evaluate()["eval_loss"]
    assert found == pytest.approx(
        float(truth(student, teacher, make_pairs(3, seed=9)).detach()), rel=1e-5
    )


def test_trainer_counts_no_label_that_nothing_predicts(tmp_path):
    def with_first_tokens(pairs):
        arguments = collate(pairs)
        for prefix in ("", "teacher_"):
            arguments[f"{prefix}labels"][:, 0] = arguments[f"{prefix}input_ids"][:, 0]
        return arguments

    losses, _, _ = run(tmp_path, max_steps=1)
    assert run(tmp_path, max_steps=1, collator=with_first_tokens)[0] == losses


def test_trainer_resumes_from_checkpoints_of_what_is_trained(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    losses, _, whole = run(tmp_path / "a", **settings)
    saved = load_file(tmp_path / "a" / "checkpoint-2" / "model.safetensors")
    # A tied head is the embedding's tensor, and the teacher does not change.
    assert set(saved) == {f"student.{n}" for n, _ in tiny_model().named_parameters()}
    resumed, _, again = run(tmp_path / "a", resume=str(tmp_path / "a" / "checkpoint-2"), **settings)
    assert resumed[-2:] == losses[-2:]
    ours, theirs = (t.model.student.state_dict() for t in (again, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_trainer_switches_the_students_activation_checkpointing_on(tmp_path):
    losses, grads, _ = run(tmp_path, max_steps=1)
    losses_b, grads_b, trainer = run(tmp_path, max_steps=1, gradient_checkpointing=True)
    assert trainer.model.student.is_gradient_checkpointing
    assert losses_b == losses
    assert_close(grads_b[0], grads[0], 1e-6)


# For its own file and for `helpers`.
PATHS = [str(Path(__file__).parent), str(Path(__file__).parents[2])]
TWO_PROCESSES = """
import sys
sys.path[:0] = {paths!r}
import torch
torch.set_num_threads(1)
from test_distiller import run
losses, grads, _ = run({folder!r}, rows=2, use_cpu=True, ddp_backend="gloo")
if torch.distributed.get_rank() == 0:
    torch.save((losses, grads), {folder!r} + "/found.pt")
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_trainer_on_two_processes_equals_one(tmp_path):
    """DDP around the module: the same step, half of its rows on each process."""
    script = tmp_path / "two.py"
    script.write_text(TWO_PROCESSES.format(paths=PATHS, folder=str(tmp_path)), "utf-8")
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    losses, grads = torch.load(tmp_path / "found.pt", weights_only=True)
    want, expected, _ = run(tmp_path, rows=4)
    assert losses[0] == pytest.approx(want[0], rel=1e-5)
    assert_close(grads[0], expected[0], 1e-5)


def test_collate_takes_pairs_mappings_and_datasets():
    import datasets

    pairs = make_pairs()
    names = ("student_prompt_ids", "teacher_prompt_ids", "response_ids")
    rows = [{name: list(getattr(pair, name)) for name in names} | {"id": "x"} for pair in pairs]
    dataset = datasets.Dataset.from_list(rows)
    want = collate(pairs)
    for given in (rows, dataset, dataset.with_format("torch"), iter(pairs), [pairs[0], *rows[1:]]):
        got = collate(given)
        assert got.keys() == want.keys()
        assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], "no rows"),
        ([{"input_ids": [1]}], "row 0 of collate has no student_prompt_ids; it has input_ids"),
        ([{"student_prompt_ids": [1], "teacher_prompt_ids": None}], "no teacher_prompt_ids"),
        ([{}], "it has nothing"),
        (["text"], "is a str, neither Pair nor mapping"),
    ],
)
def test_collate_says_what_a_row_lacks(rows, words):
    with pytest.raises(DataError, match=words):
        collate(rows)


def test_the_student_is_saved_alone_and_loads(tmp_path):
    student = tiny_model()
    Distiller(student, tiny_model(seed=1)).save_pretrained(tmp_path)
    again = type(student).from_pretrained(tmp_path)
    for name, parameter in student.named_parameters():
        assert torch.equal(dict(again.named_parameters())[name], parameter)
