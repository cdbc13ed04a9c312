"""One step on a tiny model: layouts, normalisation and backends must not change the gradient."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.passes import both_passes
from helpers.tiny import tiny_model

from opsdc.config.settings import OPSDCConfig, TeacherConfig
from opsdc.errors import TrainingError
from opsdc.method.batch import Layout, Pair
from opsdc.method.teacher import Teacher
from opsdc.method.update import update
from opsdc.models.head import read_head

module = sys.modules["opsdc.method.update"]

PROMPT, INSTRUCTION = [1, 20, 21, 22], [50, 51, 52, 53, 54]


def pairs(lengths=(9, 3, 14, 1, 6, 12, 2, 7)):
    generator = torch.Generator().manual_seed(3)
    return [
        Pair(
            student_prompt_ids=PROMPT,
            teacher_prompt_ids=INSTRUCTION + PROMPT,
            response_ids=torch.randint(3, 260, (n,), generator=generator).tolist(),
        )
        for n in lengths
    ]


def layout(packed=False, max_tokens=10_000):
    return Layout(packed=packed, max_tokens=max_tokens, pad_id=0, dtype=torch.float32)


def gradients(model, config, where, *, teacher_mode="frozen", batch=None):
    """Loss and gradients of a whole step; the student has moved away from its teacher."""
    teacher = Teacher(model, TeacherConfig(mode=teacher_mode))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator), alpha=0.02)
    batch = batch or pairs()
    loss, _, stats = both_passes(model, teacher, batch, where, config)
    return loss, {n: p.grad.clone() for n, p in model.named_parameters()}, stats


def relative(a, b):
    """Distance of two gradients relative to the first, over all parameters."""
    difference = sum(float((a[n] - b[n]).square().sum()) for n in a)
    return math.sqrt(difference / sum(float(a[n].square().sum()) for n in a))


def config(**loss):
    return OPSDCConfig.from_dict({"loss": loss})


@pytest.mark.parametrize("loss", [{}, {"normalization": "token"}, {"token_share": 0.5}], ids=str)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_micro_batches_and_packing_change_nothing(kind, tied, loss):
    settings = config(**loss)
    base = gradients(tiny_model(kind, tied=tied), settings, layout())
    assert base[0] > 1e-3
    # One forward of 8, 2×4-ish, 8×1; padded and packed.
    for where in (
        layout(max_tokens=40),
        layout(max_tokens=1),
        layout(packed=True),
        layout(packed=True, max_tokens=40),
        layout(packed=True, max_tokens=1),
    ):
        loss, grads, _ = gradients(tiny_model(kind, tied=tied), settings, where)
        assert loss == pytest.approx(base[0], rel=1e-5)
        assert relative(base[1], grads) <= 1e-5


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "jsd"])
@pytest.mark.parametrize("teacher_mode", ["frozen", "live"])
def test_chunked_equals_reference(divergence, teacher_mode):
    found = [
        gradients(
            tiny_model(),
            config(divergence=divergence, backend=backend),
            layout(),
            teacher_mode=teacher_mode,
        )
        for backend in ("reference", "chunked")
    ]
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-5)
    assert relative(found[0][1], found[1][1]) <= 1e-5


def naive_loss(model, teacher, batch, normalization, share=1.0, criterion="divergence"):
    """Straight from the paper: two full log-softmaxes, one sequence at a time, in float64; of
    those tokens of each response alone that have the most of the criterion."""
    total, tokens = 0.0, sum(len(p.response_ids) for p in batch)
    for p in batch:
        n = len(p.response_ids)
        with teacher.weights(), torch.no_grad():
            ids = torch.tensor([[*p.teacher_prompt_ids, *p.response_ids]])
            t = model(ids).logits[0, -n - 1 : -1].double().log_softmax(-1)
        ids = torch.tensor([[*p.student_prompt_ids, *p.response_ids]])
        s = model(ids).logits[0, -n - 1 : -1].double().log_softmax(-1)
        kl = (s.exp() * (s - t)).sum(-1)
        value = kl if criterion == "divergence" else -(s.exp() * s).sum(-1)
        kept = sorted(range(n), key=lambda i: -value[i].item())[: max(1, round(share * n))]
        total = total + kl[kept].sum() / (len(batch) * n if normalization == "sequence" else tokens)
    return total


@pytest.mark.parametrize("normalization", ["sequence", "token"])
@pytest.mark.parametrize(
    ("share", "criterion"), [(1.0, "divergence"), (0.5, "divergence"), (0.2, "entropy")]
)
def test_the_step_is_the_paper_formula(normalization, share, criterion):
    """Alignment, masks, prompts, teacher weights, normalisation and which tokens are trained on
    against a naive loop."""
    settings = config(normalization=normalization, token_share=share, token_criterion=criterion)
    loss, grads, _ = gradients(tiny_model(), settings, layout(max_tokens=40))
    model = tiny_model()
    teacher = Teacher(model, TeacherConfig(mode="frozen"))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator), alpha=0.02)
    expected = naive_loss(model, teacher, pairs(), normalization, share, criterion)
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert relative({n: p.grad for n, p in model.named_parameters()}, grads) <= 1e-5


def test_gradient_checkpointing_changes_nothing():
    base = gradients(tiny_model(), config(), layout())
    model = tiny_model()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    loss, grads, _ = gradients(model, config(), layout())
    assert loss == base[0]
    assert relative(base[1], grads) <= 1e-6


def test_empty_responses_are_in_no_mean():
    batch = pairs((5, 4))
    hole = Pair(student_prompt_ids=PROMPT, teacher_prompt_ids=PROMPT, response_ids=[])
    results = []
    for some in (batch, [batch[0], hole, batch[1]]):
        model = tiny_model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        teacher = Teacher(model, TeacherConfig(mode="frozen"))
        results.append(update(model, teacher, some, optimizer, layout(), config()))
    assert results[0].loss == results[1].loss > 0
    assert len(results[1].divergence) == 9


def test_a_step_without_any_token_is_skipped():
    model = tiny_model()
    before = {n: p.clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    hole = Pair(student_prompt_ids=PROMPT, teacher_prompt_ids=PROMPT, response_ids=[])
    result = update(
        model, Teacher(model, TeacherConfig()), [hole, hole], optimizer, layout(), config()
    )
    assert result.skipped
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("where", ["parameter", "gradient"])
def test_a_step_that_is_not_finite_touches_nothing(where):
    model = tiny_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    teacher = Teacher(model, TeacherConfig(mode="frozen"))
    update(model, teacher, pairs(), optimizer, layout(), config())
    weight = model.model.layers[0].mlp.up_proj.weight
    if where == "parameter":
        with torch.no_grad():
            weight[0, 0] = math.nan
    else:
        weight.register_hook(lambda grad: grad * math.inf)
    before = {n: p.clone() for n, p in model.named_parameters()}
    moments = {n: optimizer.state[p]["exp_avg"].clone() for n, p in model.named_parameters()}
    result = update(model, teacher, pairs(), optimizer, layout(), config())
    assert result.skipped
    for name, p in model.named_parameters():
        assert torch.equal(p.nan_to_num(7), before[name].nan_to_num(7))
        assert torch.equal(optimizer.state[p]["exp_avg"], moments[name])


@pytest.mark.parametrize("share", [0.01, 0.5, 2.0])
def test_the_gradient_is_clipped_to_its_norm(share):
    """As a whole, and only where it is longer; the record has the norm before."""
    steps = []
    for limit in (1e9, None):
        model, teacher = moved_model()
        optimizer = Taken(model.parameters(), lr=1e-3)
        limit = limit or share * float(flat(steps[0][1]).norm())
        settings = OPSDCConfig.from_dict({"optim": {"grad_clip": limit}})
        steps.append((update(model, teacher, pairs(), optimizer, layout(), settings), optimizer))
    (free, whole), (clipped, taken) = steps
    assert clipped.grad_norm == free.grad_norm == pytest.approx(float(flat(whole).norm()), rel=1e-5)
    expected = flat(whole) * min(share, 1.0)
    assert float((flat(taken) - expected).norm() / expected.norm()) <= 1e-5


def test_same_prompt_and_weights_give_exactly_zero():
    model = tiny_model()
    same = [
        Pair(student_prompt_ids=PROMPT, teacher_prompt_ids=PROMPT, response_ids=p.response_ids)
        for p in pairs()
    ]
    teacher = Teacher(model, TeacherConfig(mode="frozen"))
    loss, _, stats = both_passes(model, teacher, same, layout(), config())
    assert loss == 0
    assert all(float(s.divergence.abs().max()) == 0 for s in stats)
    assert all(float(p.grad.abs().max()) == 0 for p in model.parameters())


class Taken(torch.optim.SGD):
    """Keeps the gradients of its step."""

    def step(self):
        params = self.param_groups[0]["params"]
        self.taken = [p.grad.clone() for p in params]
        return super().step()


def moved_model():
    """A student at 0.7 nats per token from its teacher, and that teacher."""
    model = tiny_model(initializer_range=0.15)
    teacher = Teacher(model, TeacherConfig(mode="frozen"))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator), alpha=0.1)
    return model, teacher


def flat(optimizer):
    return torch.cat([g.flatten() for g in optimizer.taken]).double()


def too_large_for(limit, owner, name, monkeypatch, size):
    """From now on `owner.name` finds no memory for more than `limit` tokens."""
    original = getattr(owner, name)
    refused = []

    def limited(*arguments, **keywords):
        if size(*arguments) > limit:
            refused.append(size(*arguments))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return original(*arguments, **keywords)

    monkeypatch.setattr(owner, name, limited)
    return refused


def backward_calls(loss):
    """The second and the fourth backward are too large; forwards shrink in between."""
    backward_calls.n += 1
    return 99 if backward_calls.n in (1, 3) else 0


# Where memory is short: what is called there, and how many tokens a call is about.
PLACES = {
    "teacher": (module, "hidden_states", lambda m, b: b.scored.numel() * (not grad_is_on())),
    "student": (module, "hidden_states", lambda m, b: b.scored.numel() * grad_is_on()),
    "loss": (module, "distillation_loss", lambda hidden, *rest: len(hidden)),
    "backward": (torch.Tensor, "backward", backward_calls),
}


def grad_is_on():
    return torch.is_grad_enabled()


@pytest.mark.parametrize("place", PLACES)
def test_out_of_memory_halves_the_forwards_and_changes_nothing(place, monkeypatch, capsys):
    steps, refused = [], []
    for limit in (None, 20):
        model, teacher = moved_model()
        optimizer = Taken(model.parameters(), lr=1e-3)
        if limit is not None:
            backward_calls.n = 0
            owner, name, size = PLACES[place]
            refused = too_large_for(limit, owner, name, monkeypatch, size)
        result = update(model, teacher, pairs(), optimizer, layout(), config())
        steps.append((result, flat(optimizer)))
    (whole, expected), (redone, found) = steps
    assert len(refused) >= 2
    assert 0.3 < whole.loss < 3
    assert redone.loss == pytest.approx(whole.loss, rel=1e-6)
    assert float((found - expected).norm() / expected.norm()) <= 1e-6
    assert redone.layout.max_tokens < whole.layout.max_tokens == 10_000
    assert len(redone.divergence) == len(whole.divergence)
    assert "the step again, at most" in capsys.readouterr().err


def test_one_sequence_that_does_not_fit_says_what_to_do(monkeypatch):
    model, teacher = moved_model()
    before = {n: p.clone() for n, p in model.named_parameters()}
    too_large_for(0, module, "distillation_loss", monkeypatch, lambda h, *rest: len(h))
    with pytest.raises(TrainingError, match=r"gradient_checkpointing.*max_new_tokens"):
        update(model, teacher, pairs(), Taken(model.parameters(), lr=1), layout(), config())
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert all(p.grad is None for p in model.parameters())


def test_other_errors_are_not_taken_for_a_lack_of_memory(monkeypatch):
    model, teacher = moved_model()

    def broken(*arguments, **keywords):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(module, "distillation_loss", broken)
    with pytest.raises(RuntimeError, match="mat1"):
        update(model, teacher, pairs(), Taken(model.parameters(), lr=1), layout(), config())


@pytest.mark.whole
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
def test_a_real_lack_of_memory_in_a_process_with_a_limit():
    """No injection: a limit on the address space that 16 sequences at once do not fit under."""
    here = str(Path(__file__).parent)
    done = subprocess.run(
        [sys.executable, "-c", _REAL],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([here, *filter(None, sys.path)])},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "the step again, at most" in done.stderr
    assert float(done.stdout) <= 1e-6


_REAL = """
import resource
import torch
from test_update import Taken, config, flat, layout, moved_model, pairs
from opsdc.method.update import update

torch.set_num_threads(1)
found = []
many = pairs((400,) * 16)
model, teacher = moved_model()
update(model, teacher, many[:1], Taken(model.parameters(), lr=1e-3), layout(), config())
now = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
soft, hard = resource.getrlimit(resource.RLIMIT_AS)
for limit in (now + (40 << 20), soft):
    model, teacher = moved_model()
    optimizer = Taken(model.parameters(), lr=1e-3)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    update(model, teacher, many, optimizer, layout(), config())
    found.append(flat(optimizer))
print(float((found[1] - found[0]).norm() / found[0].norm()))
"""


def test_columns_left_out_stay_within_the_tolerance_and_are_on_record():
    exact_loss, exact, _ = gradients(tiny_model(), config(), layout())
    settings = config(skip_tolerance=1e-2)
    loss, found, _ = gradients(tiny_model(), settings, layout(max_tokens=24))
    assert relative(exact, found) <= 1e-2
    assert loss <= exact_loss * (1 + 1e-5)
    model = tiny_model()
    teacher = Teacher(model, TeacherConfig(mode="frozen"))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    recorded = update(model, teacher, pairs(), optimizer, layout(), settings).extra
    assert set(recorded) == {"kept_columns_share", "loss_gemm_units", "hidden_gradient_bound",
                             "weight_gradient_bound", "kl_missing"}  # fmt: skip
    assert 0 < recorded["kept_columns_share"] <= 1
    assert recorded["hidden_gradient_bound"] <= 1e-2
    assert update(model, teacher, pairs(), optimizer, layout(), config()).extra == {}


def test_an_exact_value_with_columns_left_out(monkeypatch):
    seen = []
    original = module.distillation_loss

    def spy(*arguments, **options):
        seen.append(options["exact_value"])
        return original(*arguments, **options)

    monkeypatch.setattr(module, "distillation_loss", spy)
    model = tiny_model()
    teacher = Teacher(model, TeacherConfig(mode="frozen"))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    settings = config(skip_tolerance=1e-2)
    result = update(model, teacher, pairs(), optimizer, layout(), settings, exact_value=True)
    assert seen == [True]
    assert result.extra["kl_missing"] == 0


def test_columns_left_to_chance_follow_from_the_step_and_are_on_record():
    def after(number, **options):
        model = tiny_model()
        with torch.no_grad():
            read_head(model).weight.mul_(3)  # so that columns differ in mass
        teacher = Teacher(model, TeacherConfig(mode="frozen"))
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-1)
        settings = config(columns="unbiased", skip_tolerance=0.9)
        result = update(
            model, teacher, pairs(), optimizer, layout(), settings, number=number, **options
        )
        return torch.cat([p.detach().flatten() for p in model.parameters()]), result.extra

    first, recorded = after(1)
    again, other = after(1)[0], after(2)[0]
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert set(recorded) == {"kept_columns_share", "loss_gemm_units", "hidden_gradient_error",
                             "weight_gradient_error", "kl_error"}  # fmt: skip
    assert 0 < recorded["hidden_gradient_error"] < 0.9
    # With an exact value the true error is measured too; it is about what is told.
    _, measured = after(1, exact_value=True)
    assert 0 < measured["hidden_gradient_true_error"] < 3 * recorded["hidden_gradient_error"]
    assert measured["kl_error"] == 0


def test_a_share_that_rounds_to_all_tokens_changes_no_bit():
    loss, exact, _ = gradients(tiny_model(), config(), layout(max_tokens=40))
    found_loss, found, _ = gradients(tiny_model(), config(token_share=0.99), layout(max_tokens=40))
    assert found_loss == loss
    assert all(torch.equal(exact[name], found[name]) for name in exact)


@pytest.mark.parametrize("skip_tolerance", [None, 1e-2])
def test_a_share_of_the_tokens_is_on_record_and_statistics_are_of_all(skip_tolerance):
    results = []
    for share in (1.0, 0.5):
        model, teacher = moved_model()
        optimizer = Taken(model.parameters(), lr=1e-3)
        settings = config(token_share=share, skip_tolerance=skip_tolerance)
        result = update(model, teacher, pairs(), optimizer, layout(max_tokens=40), settings)
        results.append((result, flat(optimizer)))
    (whole, all_of_it), (half, kept) = results
    assert not [name for name in whole.extra if name.startswith("kept_tokens")]
    # Of 9, 3, 14, 1, 6, 12, 2 and 7 tokens.
    assert half.extra["kept_tokens_share"] == (4 + 2 + 7 + 1 + 3 + 6 + 1 + 4) / 54
    share = half.extra["kept_loss_share"]
    assert 0.5 < share < 1
    assert half.loss == pytest.approx(share * whole.loss, rel=1e-2 if skip_tolerance else 1e-6)
    assert 0.05 < float((kept - all_of_it).norm() / all_of_it.norm()) < 0.9
    if skip_tolerance is None:
        assert torch.equal(half.divergence, whole.divergence)
        assert half.student_entropy == whole.student_entropy
    else:
        # A lower bound with columns left out, but of a pass that only scores.
        assert bool((half.divergence >= whole.divergence * (1 - 1e-6)).all())
        units = half.extra["loss_gemm_units"]
        assert 2.5 < units < 2 + half.extra["kept_tokens_share"] * 4.1
