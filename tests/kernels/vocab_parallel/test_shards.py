"""Ranks that share a vocabulary: what they exchange, refuse, and compose with."""

import pytest
import torch
import torch.distributed as dist
from helpers.kernel_ranks import (
    CUTS,
    WORLD,
    D,
    N,
    V,
    bound,
    call,
    differences,
    make_case,
    sharded,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from opsdc_kernels import linear_divergence
from opsdc_kernels.vocab_parallel import HEADER_BYTES, bytes_per_token

DIVERGENCES = ("reverse_kl", "forward_kl", "jsd")


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


@pytest.mark.whole
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
        assert sum(gathered) / N <= 8 * 16


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


@pytest.mark.whole
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


@pytest.mark.whole
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
