"""What the tests of docs/migrating.md share: its rows, other libraries, inputs."""

import importlib
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch

from benchmarks.contenders import _module_of_file

PAGE = (Path(__file__).parents[2] / "docs" / "migrating.md").read_text("utf-8")


def table(heading):
    """Rows of the table below a heading, as lists of cells."""
    lines = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")]
            for line in lines if line.startswith("|")][2:]  # fmt: skip


def peer(library):
    """The functions of a library by name; the test is skipped where it is not installed."""
    if library == "unsloth":
        try:
            module = _module_of_file("unsloth-zoo", "unsloth_zoo/fused_losses/fused_linear.py")
        except PackageNotFoundError:
            pytest.skip("unsloth-zoo is not installed: `make bench` brings it")
        return {"fused_linear_jsd": module.fused_linear_jsd}
    module, name = {
        "Liger": ("liger_kernel.chunked_loss", "LigerFusedLinearJSDLoss"),
        "TRL": ("trl.trainer.distillation_trainer", "_chunked_divergence_loss"),
        "TRL, GKD": ("trl.experimental.gkd.gkd_trainer", "GKDTrainer"),
    }[library]
    pytest.importorskip(module.partition(".")[0])
    return {name: getattr(importlib.import_module(module), name)}


def inputs(*leading, seed=0, dtype=torch.float32):
    """Hidden states and heads of student and teacher: h, W, ht, Wt."""
    g = torch.Generator().manual_seed(seed)
    shapes = ((*leading, 16), (40, 16), (*leading, 16), (40, 16))
    return [torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype) for shape in shapes]


def log_probs(h, W, ht, Wt, temperature=1.0):
    return [(x @ y.T / temperature).log_softmax(-1) for x, y in ((h, W), (ht, Wt))]


def reverse(log_q, log_p):
    return (log_q.exp() * (log_q - log_p)).sum(-1)


def gradients(loss_of, *tensors):
    """Loss and gradients with respect to student's states and head."""
    h, W = (x.clone().requires_grad_() for x in tensors[:2])
    loss = loss_of(h, W, *tensors[2:])
    loss.backward()
    return loss.detach(), h.grad, W.grad


def close(a, b, rtol=1e-4):
    torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=rtol, atol=1e-6)


def is_liger(**options):
    """Liger's loss at the settings that are a divergence alone."""
    return peer("Liger")["LigerFusedLinearJSDLoss"](0.0, 1.0, compiled=False, **options)


def with_nan():
    h, W, ht, Wt = inputs(9)
    labels = torch.ones(9, dtype=torch.long)
    labels[3] = -100
    h[3] = float("nan")
    return h, W, ht, Wt, labels


def without_a_column():
    bias = torch.zeros(40)
    bias[7] = float("-inf")
    return inputs(3, 5), bias


def near():
    """200 rows whose teacher is next to the student: KL about 1e-9."""
    h, W, _, _ = inputs(200)
    return h, W, h + 1e-6 * inputs(200, seed=1)[0], W
