"""Heads sharded over the vocabulary, by real gloo processes: 2 and 3 ranks against the whole head.

Three processes serve all tests of the module; a test sends them a function of this file. Equality
is to 1e-6 of a tensor's size plus the conditioning of fp32 logits, see `bound`.
"""

import contextlib
import dataclasses
import datetime
import functools
import math
import traceback

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from opsdc_kernels import linear_divergence, products, testing, vocab_parallel
from opsdc_kernels.chunked import op as chunked_op
from opsdc_kernels.chunked.run import run_chunks
from opsdc_kernels.vocab_parallel import HEADER_BYTES, bytes_per_token

DIVERGENCES = ("reverse_kl", "forward_kl", "jsd")
WORLD = 3
N, D, V = 24, 48, 1003
CUTS = {2: [0, 402, V], 3: [0, 335, 335, V], 1: [0, V]}
"""Uneven, and the second of three ranks holds nothing."""


def serve(rank, store, pipe):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD,
        timeout=datetime.timedelta(seconds=60),
    )  # fmt: skip
    groups = {WORLD: dist.group.WORLD, 2: dist.new_group([0, 1]), 1: dist.new_group([0])}
    while (job := pipe.recv()) is not None:
        function, size, arguments = job
        try:
            pipe.send(function(groups[size], **arguments) if rank < size else None)
        except Exception as error:
            error.add_note(traceback.format_exc())
            pipe.send(error)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """ranks(function, size, **arguments): what function(group, **arguments) gives on each rank."""
    context = torch.multiprocessing.get_context("spawn")
    store = tmp_path_factory.mktemp("gloo") / "store"
    pipes, processes = [], []
    for rank in range(WORLD):
        pipe, theirs = context.Pipe()
        processes.append(context.Process(target=serve, args=(rank, store, theirs), daemon=True))
        processes[-1].start()
        pipes.append(pipe)

    def run(function, size, **arguments):
        for pipe in pipes:
            pipe.send((function, size, arguments))
        found = []
        for rank, pipe in enumerate(pipes):
            assert pipe.poll(100), f"rank {rank} hangs"
            found.append(pipe.recv())
        errors = [x for x in found if isinstance(x, Exception)]
        if errors:
            raise errors[0]
        return found[:size]

    yield run
    for pipe in pipes:
        pipe.send(None)
    for process in processes:
        process.join(20)
        assert process.exitcode == 0


def call(case, upstream=1.0, trainable_head=True, **options):
    """[loss, dH, dW, db, *statistics], where there."""
    hidden = case.student_hidden.clone().requires_grad_()
    weight = case.student_weight.clone().requires_grad_(trainable_head)
    bias = options.get("student_bias")
    if bias is not None:
        options["student_bias"] = bias = bias.clone().requires_grad_(trainable_head)
    loss, stats = linear_divergence(
        hidden, weight, case.teacher_hidden, case.teacher_weight, return_stats=True, **options
    )
    (loss * upstream).sum().backward()
    stats = [getattr(stats, name) for name in stats.__slots__]
    return [loss.detach(), hidden.grad, weight.grad, None if bias is None else bias.grad, *stats]


def sharded(group, case, mutant=None, **options):
    """As `call`, with this rank's rows of the heads; dW and db are those rows'."""
    cuts = CUTS[group.size()]
    rows = slice(cuts[group.rank()], cuts[group.rank() + 1])
    other = case.teacher_weight
    part = dataclasses.replace(
        case,
        student_weight=case.student_weight[rows],
        teacher_weight=None if other is None else other[rows],
    )
    for name in ("student_bias", "teacher_bias"):
        if options.get(name) is not None:
            options[name] = options[name][rows]
    with contextlib.nullcontext() if mutant is None else mutated(mutant):
        return call(part, process_group=group, **options)


def whole(results):
    """One result of all ranks': what is replicated is the same bits, the rest is put together."""
    for other in results[1:]:
        for i, (a, b) in enumerate(zip(results[0], other, strict=True)):
            assert i in (2, 3) or a is b is None or torch.equal(a, b), f"ranks differ in result {i}"
    found = list(results[0])
    for i in (2, 3):
        found[i] = None if found[i] is None else torch.cat([x[i] for x in results])
    return found


@functools.cache
def make_case(entropy, kl, dtype=torch.float32, *, shared, seed=0, **options):
    return testing.make_case(
        tokens=N, dim=D, vocab_size=V, entropy=entropy, kl=kl, dtype=dtype, shared_head=shared,
        seed=seed, **options,
    )  # fmt: skip


def bound(case, kl, dtype):
    """Of equality: 1e-6, plus what the rounding of fp32 logits z does: 3e-7·max|z|, divided by
    √(2·KL) where logits of two heads are subtracted."""
    if dtype == torch.float64:
        return 1e-12 * (1 if case.teacher_weight is None else 1 + 1e-3 / math.sqrt(2 * kl))
    z = float((case.student_hidden.double() @ case.student_weight.double().T).abs().max())
    return 1e-6 + 3e-7 * z / (1 if case.teacher_weight is None else min(math.sqrt(2 * kl), 1))


def differences(got, want):
    """Relative to a tensor's size."""
    return [
        0.0 if b is None else float((a.double() - b).norm() / max(float(b.norm()), 1e-300))
        for a, b in zip(got, (x if x is None else x.double() for x in want), strict=True)
    ]


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_equals_the_whole_head(ranks, size, shared, divergence):
    """KL 1e-12 to 1, entropies from a peaked row to a flat one; and the truth's budget as well."""
    targets = torch.arange(N) * 41 % V
    for entropy in (0.01, 1.0, 5.0):
        for kl in (1e-12, 1e-6, 1e-3, 1.0):
            if (kl == 1.0 and entropy == 0.01) or (kl == 1e-12 and not shared):
                continue  # not representable
            case = make_case(entropy, kl, shared=shared)
            options = {"divergence": divergence, "target_ids": targets}
            want = call(case, **options)
            got = whole(ranks(sharded, size, case=case, **options))
            limit = bound(case, kl, torch.float32)
            assert max(differences(got, want)) <= limit, (entropy, kl, differences(got, want))
            true = testing.truth(case, divergence=divergence)
            found, plain = (
                testing.errors(testing.Outcome(x[0], x[4], x[1], x[2]), true) for x in (got, want)
            )
            # What both owe to the same logits may exceed the budget in a single row.
            budget = testing.budget(case, true)
            if not testing.within(plain, budget):
                budget = testing.Budget(
                    *(1.1 * x + limit for x in (plain.loss, plain.weight_gradient, plain.rows))
                )
            assert not testing.excesses(found, budget), (entropy, kl, found, plain)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_float64(ranks, size, divergence):
    for shared in (True, False):
        for kl in (1e-12, 1e-6, 1.0) if shared else (1e-6, 1.0):
            case = make_case(1.0, kl, torch.float64, shared=shared)
            want = call(case, divergence=divergence)
            got = whole(ranks(sharded, size, case=case, divergence=divergence))
            limit = bound(case, kl, torch.float64)
            assert max(differences(got, want)) <= limit, (kl, differences(got, want))


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_every_option(ranks, divergence, reduction):
    weight = torch.linspace(0, 2, N, dtype=torch.float64)
    weight[5] = 0
    bias, other = torch.linspace(-1, 1, V).double(), torch.linspace(2, -1, V).double()
    for shared, cap, scale, vocab_size, train in (
        (True, None, 1.0, None, True),
        (True, 3.0, 1.1, V - 700, True),  # the last rank of three scores nothing, of two less
        (False, (4.0, 6.0), (1.1, 0.9), V - 1, True),
        (False, None, -1.0, 300, False),
    ):
        case = make_case(2.0, 0.1, torch.float64, shared=shared)
        options = {
            "divergence": divergence, "reduction": reduction, "logit_softcap": cap,
            "logit_scale": scale, "vocab_size": vocab_size, "temperature": 1.7,
            "token_weight": weight, "student_bias": bias, "trainable_head": train,
            "teacher_bias": other if not shared else None,
            "upstream": torch.linspace(0.5, -2, N).double() if reduction == "none" else 1.7,
            "target_ids": torch.arange(N) * 41 % (vocab_size or V),
        }  # fmt: skip
        want = call(case, **options)
        # A small workspace: several chunks.
        got = whole(ranks(sharded, 3, case=case, workspace_bytes=300_000, **options))
        assert (got[2] is None) == (not train)
        assert max(differences(got, want)) <= 1e-12, differences(got, want)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_equal_teacher_gives_exactly_zero(ranks, divergence):
    case = make_case(1.0, 1e-3, shared=False)
    for teacher in (None, case.student_weight.clone()):
        equal = dataclasses.replace(
            case, teacher_hidden=case.student_hidden, teacher_weight=teacher
        )
        loss, dh, dw, _, per_token, *_, agreement = whole(
            ranks(sharded, 3, case=equal, divergence=divergence)
        )[:10]
        for x in (loss, dh, dw, per_token):
            assert torch.equal(x, torch.zeros_like(x))
        assert torch.equal(agreement, torch.ones(N))


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("masks", [
    ([0, 5, 700], [0, 5, 700]), ([3, 400], []), ([], [1, 2, 999]), (range(335), range(335)),
    ([7], [7, 500]),
])  # fmt: skip
def test_infinite_logits(ranks, divergence, masks):
    """A masked vocabulary on both sides, on one, and a rank whose columns are all masked."""
    case = make_case(2.0, 0.1, torch.float64, shared=False)
    biases = [torch.zeros(V, dtype=torch.float64) for _ in masks]
    for bias, mask in zip(biases, masks, strict=True):
        bias[list(mask)] = -math.inf
    options = {"divergence": divergence, "student_bias": biases[0], "teacher_bias": biases[1]}
    want = call(case, **options)
    got = whole(ranks(sharded, 3, case=case, **options))
    for a, b in zip(got, want, strict=True):
        if b is not None:
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit(ranks, dtype):
    """The all-reduced dH is rounded once, like the unsharded one."""
    case = make_case(2.0, 1e-2, dtype, shared=True)
    got, want = whole(ranks(sharded, 2, case=case)), call(case)
    assert got[1].dtype == got[2].dtype == dtype
    limit = bound(case, 1e-2, dtype)
    found = differences(got, want)
    # The gradients differ where a last bit rounds the other way.
    assert max(found[:1] + found[4:]) <= limit
    assert max(found[1:3]) <= limit + torch.finfo(dtype).eps / 4


def with_rounded_tile(group, case, correct):
    rounded = functools.partial(run_chunks, tile_dtype=torch.bfloat16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked_op, "run_chunks", rounded)
        if not correct:
            right = products.hidden_gradient
            patch.setattr(
                products, "hidden_gradient",
                lambda t, w, mean, kept=None: right(
                    dataclasses.replace(t, residual=torch.zeros_like(t.residual)), w, mean
                ),
            )  # fmt: skip
        return sharded(group, case, logit_softcap=8.0)


def test_rounded_tile_is_corrected_on_shards(ranks):
    """A component common to all rows of W, soft-cap and shards: Σ dZ of a shard is not 0."""
    case = make_case(2.0, 1e-2, shared=True, common_mode=3.0)
    want = call(case, logit_softcap=8.0)[1]
    errors = [
        float((whole(ranks(with_rounded_tile, 2, case=case, correct=x))[1] - want).norm())
        / float(want.norm())
        for x in (True, False)
    ]
    assert errors[0] <= 3e-3
    assert errors[1] >= 2 * errors[0]


@contextlib.contextmanager
def mutated(name):
    merge, gather = vocab_parallel._merge, vocab_parallel._gather
    scalars = vocab_parallel._row_scalars

    def without_last(parts, problem):
        gone = torch.full_like(parts.inside[-1:], -math.inf)
        return merge(parts._replace(inside=torch.cat([parts.inside[:-1], gone])), problem)

    def only_own_sums(ours, group):
        found = gather(ours, group)
        if ours.shape[0] == 2:  # the JSD's sums
            found.zero_()[group.rank()] = ours
        return found

    mutants = {
        "a shard is dropped": ("_merge", without_last),
        "dH is not added up": ("Shard.add_up_", lambda shard, gradient: None),
        "each shard has its own mean": (
            "_row_scalars", lambda *a: (r := scalars(*a))._replace(to_mean=0 * r.to_mean)
        ),
        "each shard has its own normalizers": (
            "_row_scalars", lambda *a: (r := scalars(*a))._replace(to_log_ratio=0 * r.to_log_ratio)
        ),
        "the JSD's sums are local": ("_gather", only_own_sums),
        "the divergence within shards is dropped": (
            "_merge", lambda p, problem: merge(
                p._replace(mean=p.mean + p.reverse, reverse=0 * p.reverse, forward=0 * p.forward),
                problem,
            )
        ),
        "targets are not shifted": (
            "Shard.localize",
            lambda shard, problem: dataclasses.replace(
                problem, options=dataclasses.replace(problem.options, vocab_size=shard.size)
            ),
        ),
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        where, mutant = mutants[name]
        patch.setattr(f"opsdc_kernels.vocab_parallel.{where}", mutant)
        yield


@pytest.mark.parametrize(("mutant", "divergence"), [
    ("a shard is dropped", "reverse_kl"),
    ("a shard is dropped", "forward_kl"),
    ("dH is not added up", "reverse_kl"),
    ("each shard has its own mean", "reverse_kl"),
    ("each shard has its own normalizers", "forward_kl"),
    ("the JSD's sums are local", "jsd"),
    ("the divergence within shards is dropped", "reverse_kl"),
    ("targets are not shifted", "reverse_kl"),
])  # fmt: skip
def test_mutants_are_seen(ranks, mutant, divergence):
    """What `test_equals_the_whole_head` compares differs far beyond its bound."""
    case = make_case(1.0, 1e-3, shared=True)
    options = {"divergence": divergence, "target_ids": torch.arange(N) * 41 % V}
    want = call(case, **options)
    results = ranks(sharded, 2, case=case, mutant=mutant, **options)
    limit = bound(case, 1e-3, torch.float32)
    assert max(max(differences(x[:2] + x[4:], want[:2] + want[4:])) for x in results) > 30 * limit


def counted(group, case, **options):
    """[(collective, bytes this rank hands in)] of a real call."""
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        for name, position in (("all_gather", 1), ("all_reduce", 0)):
            original = getattr(dist, name)

            def spy(*args, _name=name, _original=original, _position=position, **kwargs):
                x = args[_position]
                seen.append((_name, x.numel() * x.element_size()))
                return _original(*args, **kwargs)

            patch.setattr(dist, name, spy)
        sharded(group, case, **options)
    return seen


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("targets", [False, True])
def test_bytes_per_token(ranks, divergence, targets):
    case = make_case(1.0, 1e-3, shared=False)
    options = {"target_ids": torch.arange(N)} if targets else {}
    budget = 2 * 4 * 668 * 10 + 16 * 4 * 668 * 6  # some three chunks
    for seen in ranks(
        counted, 3, case=case, divergence=divergence, workspace_bytes=budget, **options
    ):
        sizes = [size for _, size in seen]
        header, *gathered, gradient = sizes
        assert [name for name, _ in seen] == ["all_gather"] * (len(seen) - 1) + ["all_reduce"]
        assert header == HEADER_BYTES
        assert gradient == 4 * N * D
        assert sum(gathered) + gradient == N * bytes_per_token(
            divergence=divergence, student_dim=D, return_stats=True, target_ids=targets
        )
        chunks = len(gathered) / (2 if divergence == "jsd" else 1)
        assert chunks == int(chunks) > 1
        assert sum(gathered) / N <= 8 * 15


def test_one_rank_is_the_unsharded_call(ranks):
    case = make_case(1.0, 1e-3, shared=True)
    (got,) = ranks(sharded, 1, case=case)
    for a, b in zip(got, call(case), strict=True):
        assert a is b is None or torch.equal(a, b)


def mistake(group, case, kind):
    """The message of what is raised."""
    rank = group.rank()
    h, w, ht = case.student_hidden, case.student_weight, case.teacher_hidden
    n = N - rank if kind == "tokens" else N
    options, teacher = {"process_group": group}, None
    if kind == "weights":
        options["token_weight"] = torch.arange(N) >= rank
    elif kind == "options":
        options["temperature"] = 1.0 + rank
    elif kind == "cuts":
        w, teacher = (w[: 400 + 100 * rank], w[: 500 - 100 * rank].clone())
        options["vocab_size"] = 800
    elif kind == "vocab_size":
        options["vocab_size"] = 3 * V
    elif kind == "targets":
        options |= {"target_ids": torch.full((N,), 2 * V), "return_stats": True}
    elif kind in ("fused", "reference"):
        options["backend"] = kind
    elif kind == "group":
        options["process_group"] = "tp"
    try:
        linear_divergence(h[:n], w, ht[:n], teacher, **options)
    except (ValueError, TypeError) as error:
        return str(error)


@pytest.mark.parametrize(("kind", "words"), [
    ("tokens", "same tokens on all ranks"), ("weights", "23) tokens with weight"),
    ("options", "different options"), ("cuts", "vocab_size="), ("vocab_size", f"1 and {2 * V}"),
    ("targets", f"[0, {2 * V})"), ("fused", 'backend="chunked"'), ("reference", "gather the head"),
    ("group", "ProcessGroup"),
])  # fmt: skip
def test_mistakes_raise_on_every_rank(ranks, kind, words):
    case = make_case(1.0, 1e-3, shared=True)
    for message in ranks(mistake, 2, case=case, kind=kind):
        assert words in message


def autograd_contract(group, case):
    cuts = CUTS[group.size()]
    w = case.student_weight[cuts[group.rank()] : cuts[group.rank() + 1]].clone().requires_grad_()
    h = case.student_hidden.clone().requires_grad_()
    loss = linear_divergence(h, w, case.teacher_hidden, process_group=group)
    first = torch.autograd.grad(loss, (h, w), retain_graph=True)
    again = torch.autograd.grad(loss, (h, w), create_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    with pytest.raises(RuntimeError, match="second derivatives"):
        again[0].sum().backward()
    compiled = torch.compile(linear_divergence, backend="aot_eager", fullgraph=True)
    loss = compiled(h, w, case.teacher_hidden, process_group=group)
    graph = torch.autograd.grad(loss, (h, w))
    assert all(torch.equal(a, b) for a, b in zip(first, graph, strict=True))


def test_autograd_contract_and_compile(ranks):
    ranks(autograd_contract, 2, case=make_case(1.0, 1e-3, shared=True))


def with_dtensor(group, case):
    mesh = DeviceMesh.from_group(group, "cpu")
    h = case.student_hidden.clone().requires_grad_()
    w = torch.distributed.tensor.distribute_tensor(case.student_weight, mesh, [Shard(0)])
    w.requires_grad_()
    linear_divergence(h, w, case.teacher_hidden, process_group=group).backward()
    assert isinstance(w.grad, DTensor)
    assert w.grad.placements == (Shard(0),)
    messages = []
    replicated = DTensor.from_local(case.student_weight, mesh, [Replicate()])
    for weight, options in (
        (w, {}),
        (replicated, {"process_group": group}),
        (w, {"process_group": dist.group.WORLD}),
    ):
        with pytest.raises(ValueError, match="student_weight is") as raised:
            linear_divergence(h, weight, case.teacher_hidden, **options)
        messages.append(str(raised.value))
    return h.grad, w.grad.to_local(), messages


def test_dtensor_weights_need_the_group(ranks):
    case = make_case(1.0, 1e-3, shared=True)
    want = call(case)
    found = ranks(with_dtensor, 2, case=case)
    limit = bound(case, 1e-3, torch.float32)
    dw = torch.cat([x[1] for x in found])
    assert max(differences([found[0][0], dw], want[1:3])) <= limit
    for _, _, (no_group, replicated, other_group) in found:
        assert "process_group=" in no_group
        assert "Shard(0)" in replicated
        assert "ranks [0, 1]" in other_group


def tiny_llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=102, hidden_size=24, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=6, num_key_value_heads=3, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def backward_through(model, group=None):
    hidden = model.model(torch.arange(20).reshape(2, 10)).last_hidden_state
    loss = linear_divergence(
        hidden, model.lm_head.weight, 1.1 * hidden.detach(), process_group=group
    )
    loss.backward()
    return loss.detach()


def tensor_parallel(group, folder):
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    rank = str(group.rank())
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", str(WORLD))):
            patch.setenv(name, value)
        plan = DistributedConfig(tp_plan="auto", tp_size=WORLD)
        model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=plan)
    weight = model.lm_head.weight
    assert weight.to_local().shape[0] == weight.shape[0] // WORLD
    loss = backward_through(model, weight.device_mesh.get_group())
    gradients = {
        name: p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
        for name, p in model.named_parameters()
    }
    return loss, gradients


def test_composes_with_a_tensor_parallel_model(ranks, tmp_path):
    """Backbone and head by transformers' own plan: every gradient is that of the plain model."""
    pytest.importorskip("transformers.distributed")
    plain = tiny_llama()
    plain.save_pretrained(tmp_path)
    want = backward_through(plain)
    for loss, gradients in ranks(tensor_parallel, WORLD, folder=str(tmp_path)):
        torch.testing.assert_close(loss, want, rtol=1e-5, atol=0)
        for name, parameter in plain.named_parameters():
            error = (gradients[name] - parameter.grad).norm() / parameter.grad.norm()
            assert float(error) < 3e-5, name
