"""The examples run, their numbers are right, and the docs' blocks do what they replace."""

import copy
import os
import re
import subprocess
import sys
from pathlib import Path

import hf_trainer
import peft
import peft_lora
import plain_loop
import pytest
import start
import torch
import trl_trainer
from torch.autograd.graph import saved_tensors_hooks
from transformers import Trainer, TrainingArguments
from trl.trainer import distillation_trainer

from opsdc import collate
from opsdc_kernels import linear_divergence

pytestmark = pytest.mark.whole

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
ORIGINAL = distillation_trainer._chunked_divergence_loss


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def trl_as_it_was():
    yield
    distillation_trainer._chunked_divergence_loss = ORIGINAL


def reference(student, teacher, pairs):
    """KL per response token, a tensor per pair: the reference backend in float64."""
    for pair in pairs:
        h = plain_loop.states(student, pair.student_prompt_ids, pair.response_ids)
        t = plain_loop.states(teacher, pair.teacher_prompt_ids, pair.response_ids)
        head, other = (m.get_output_embeddings().weight.detach() for m in (student, teacher))
        tensors = (x.detach().double() for x in (h, head, t, other))
        yield linear_divergence(*tensors, reduction="none", backend="reference")


def test_plain_loop():
    losses = plain_loop.main(steps=3)
    model, tokenizer = start.load()
    want = torch.cat(list(reference(model, model, start.sample(model, tokenizer)))).mean()
    assert losses[0] == pytest.approx(float(want), rel=1e-5)
    assert losses[0] > 0.5
    assert losses[-1] < 0.9 * losses[0]


def test_hf_trainer(tmp_path):
    losses = hf_trainer.main(output_dir=str(tmp_path))
    model, tokenizer = start.load()
    want = torch.cat(list(reference(model, model, start.sample(model, tokenizer)))).mean()
    assert losses[0] == pytest.approx(float(want), rel=1e-5)
    assert losses[-1] < 0.9 * losses[0]
    trained = type(model).from_pretrained(tmp_path / "model")
    assert not torch.equal(trained.lm_head.weight, model.lm_head.weight)
    assert (tmp_path / "checkpoint-4" / "model.safetensors").is_file()


def test_peft_lora():
    losses = peft_lora.main(steps=3)
    base, tokenizer = start.load()
    want = [float(x.mean()) for x in reference(base, base, start.sample(base, tokenizer))]
    # An adapter starts at zero: the first losses are the instruction's effect on the base.
    assert losses[0] == pytest.approx(sum(want) / len(want), rel=1e-4)
    assert losses[-1] < losses[0]


def test_trl_trainer_gives_trls_losses(tmp_path):
    """Two real steps, sampling included: a different update would sample other responses."""

    def losses(directory):
        (student, tokenizer), (teacher, _) = start.load(), start.load(seed=1)
        trainer = trl_trainer.make_trainer(
            student, teacher, tokenizer, output_dir=str(tmp_path / directory), learning_rate=1e-3
        )
        trainer.train()
        return [
            (entry["loss"], entry["entropy"], entry["grad_norm"])
            for entry in trainer.state.log_history
            if "loss" in entry
        ]

    theirs = losses("theirs")
    calls = []

    def counted(*args, **kwargs):
        calls.append(args)
        return trl_trainer.divergence_loss(*args, **kwargs)

    distillation_trainer._chunked_divergence_loss = counted
    ours = losses("ours")
    assert len(calls) == 4  # two steps of two micro-batches
    assert len(ours) == 2
    for a, b in zip(ours, theirs, strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    assert ours[0][0] > 0.1


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("items", [None, torch.tensor(31.0)])
def test_trl_adapter_passes_every_argument_on(beta, items):
    g = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=g)

    hidden, teacher_hidden = randn(2, 7, 16), randn(2, 7, 24)
    weight, teacher_weight = randn(50, 16), randn(50, 24)
    options = {
        "completion_mask": torch.tensor([[1] * 7, [1] * 3 + [0] * 4]),
        "beta": beta,
        "num_items_in_batch": items,
        "student_lm_head_bias": randn(50),
        "teacher_lm_head_bias": randn(50).requires_grad_(),
        "student_logit_scale": 0.5,
        "teacher_logit_scale": 0.25,
        "student_final_logit_softcapping": 4.0,
        "teacher_final_logit_softcapping": 3.0,
        "temperature": 1.7,
    }
    found = []
    for loss_of in (trl_trainer.divergence_loss, ORIGINAL):
        inputs = [x.clone().requires_grad_() for x in (hidden, weight)]
        loss, entropy, count = loss_of(
            inputs[0], teacher_hidden, inputs[1], teacher_weight, **options
        )
        loss.backward()
        found.append((loss.detach(), entropy, count, *(x.grad for x in inputs)))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_the_frozen_head_has_no_gradient_buffer_and_the_adapter_alone_has_gradients():
    base, tokenizer = start.load()
    pair = start.sample(base, tokenizer)[3]
    student = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules="all-linear"))
    hidden = plain_loop.states(base, pair.student_prompt_ids, pair.response_ids)
    with torch.no_grad(), student.disable_adapter():
        teacher_hidden = plain_loop.states(base, pair.teacher_prompt_ids, pair.response_ids)

    def kept(weight):
        """Shapes of what the loss saves for its backward."""
        shapes = []
        with saved_tensors_hooks(lambda x: (shapes.append(tuple(x.shape)), x)[1], lambda x: x):
            loss = linear_divergence(hidden, weight, teacher_hidden)
        return loss, shapes

    weight = base.lm_head.weight
    loss, shapes = kept(weight)
    assert tuple(hidden.shape) in shapes
    assert tuple(weight.shape) not in shapes
    # The same question asked of a head that is trained, so that "no" means something.
    assert tuple(weight.shape) in kept(weight.detach().clone().requires_grad_())[1]
    loss.backward()
    trained = {name for name, p in student.named_parameters() if p.grad is not None}
    assert trained == {name for name, _ in student.named_parameters() if "lora_" in name}


def sections():
    """Of the page's section: the heading's file, and its (before, after) blocks."""
    text = (ROOT / "docs" / "loss.md").read_text("utf-8")
    section = text.split("\n## Use the loss in your code\n")[1].split("\n## ")[0]
    for part in section.split("\n### ")[1:]:
        name = re.search(r"examples/(\w+)\.py", part.splitlines()[0]).group(1)
        yield name, re.findall(r"```python\n(.*?)```", part, re.DOTALL)


def test_the_page_shows_every_example_before_and_after():
    shown = {name: len(blocks) for name, blocks in sections()}
    files = {path.stem for path in EXAMPLES.glob("*.py")} - {"start"}
    assert shown == dict.fromkeys(files, 2)


def training(folder, **settings):
    return TrainingArguments(
        str(folder), per_device_train_batch_size=2, gradient_accumulation_steps=4, max_steps=1,
        logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True, seed=0,
        **settings,
    )  # fmt: skip


def namespace(name, folder):
    """What a reader of the page is assumed to have at hand."""
    (student, tokenizer), (teacher, _) = start.load(), start.load(seed=1)
    pairs = start.sample(student, tokenizer)
    pair = pairs[3]
    found = {"torch": torch, "student": student, "teacher": teacher, "tokenizer": tokenizer}
    if name == "plain_loop":
        found |= {"W": student.lm_head.weight, "W_teacher": teacher.lm_head.weight.detach()}
        for side in ("student", "teacher"):
            prompt = getattr(pair, f"{side}_prompt_ids")
            states = plain_loop.states(found[side], prompt, pair.response_ids)
            found[f"{side}_hidden"] = states if side == "student" else states.detach()
    elif name == "hf_trainer":
        found |= {"Trainer": Trainer, "args": training(folder), "pairs": pairs, "collate": collate}
    elif name == "trl_trainer":
        trainer = trl_trainer.make_trainer(student, teacher, tokenizer, output_dir=str(folder))
        found |= {
            "DistillationTrainer": trl_trainer.DistillationTrainer,
            "divergence_loss": trl_trainer.divergence_loss,
            "config": trainer.args,
            "prompts": trainer.train_dataset,
        }
    else:
        found["linear_reverse_kl"] = plain_loop.linear_reverse_kl
        found["student"] = peft.get_peft_model(
            copy.deepcopy(student), peft.LoraConfig(r=4, target_modules="all-linear")
        )
        found["ids"] = torch.tensor([[*pair.student_prompt_ids, *pair.response_ids]])
        found["teacher_ids"] = torch.tensor([[*pair.teacher_prompt_ids, *pair.response_ids]])
        found["start"] = len(pair.student_prompt_ids)
        found["teacher_start"] = len(pair.teacher_prompt_ids)
    return found


@pytest.mark.parametrize(("name", "blocks"), sections(), ids=lambda x: x if type(x) is str else "")
def test_the_pages_lines_do_what_they_replace(name, blocks, tmp_path):
    found = []
    for block in blocks:
        names = namespace(name, tmp_path)
        exec(block, names)
        if "loss" in names:
            names["loss"].backward()
            found.append(float(names["loss"].detach()))
        else:
            names["trainer"].train()
            history = names["trainer"].state.log_history
            found.append(next(entry["loss"] for entry in history if "loss" in entry))
        ours = distillation_trainer._chunked_divergence_loss is not ORIGINAL
        assert ours == (name == "trl_trainer" and len(found) == 2)
    before, after = found
    assert before > 0.1
    assert after == pytest.approx(before, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain_loop", "hf_trainer", "trl_trainer", "peft_lora"])
def test_the_command_of_the_docstring(name, tmp_path):
    path = EXAMPLES / f"{name}.py"
    assert f"\n    python examples/{name}.py\n" in path.read_text("utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(path)], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert re.search(r"\d\.\d", done.stdout)
