"""Every mistake is an error that names argument, value and remedy."""

import math

import pytest
import torch

from opsdc_kernels import linear_divergence

N, D, V = 6, 4, 9
h, w, ht = torch.randn(N, D), torch.randn(V, D), torch.randn(N, D)
ids, ones = torch.zeros(N, dtype=torch.long), torch.ones(N)


@pytest.mark.parametrize(("change", "error", "words"), [
    ({"divergence": "kl"}, ValueError, "divergence='kl'"),
    ({"reduction": "avg"}, ValueError, "reduction='avg'"),
    ({"backend": "cuda"}, ValueError, "backend='cuda'"),
    ({"divergence": "jsd", "beta": 0.0}, ValueError, "forward_kl"),
    ({"divergence": "jsd", "beta": 1.0}, ValueError, "reverse_kl"),
    ({"beta": 0.3}, ValueError, "beta=0.3 has no effect"),
    ({"temperature": 0.0}, ValueError, "temperature=0.0"),
    ({"temperature": float("nan")}, ValueError, "temperature"),
    ({"logit_scale": 0.0}, ValueError, "logit_scale"),
    ({"logit_scale": (1.0, 2.0, 3.0)}, ValueError, "pair"),
    ({"logit_softcap": -1.0}, ValueError, "logit_softcap"),
    ({"logit_softcap": (1.0, 0.0)}, ValueError, "logit_softcap"),
    ({"temperature": torch.tensor(2.0, requires_grad=True)}, ValueError,
     "temperature=.*requires a gradient and receives none; pass temperature.item"),
    ({"logit_scale": (1.0, torch.tensor(2.0, requires_grad=True))}, ValueError,
     "logit_scale=.*apply it to student_hidden"),
    ({"logit_softcap": torch.tensor(9.0, requires_grad=True)}, ValueError, "logit_softcap=.*none"),
    ({"divergence": "jsd", "beta": torch.tensor(0.3, requires_grad=True)}, ValueError, "beta="),
    ({"target_ids": ids}, ValueError, "return_stats"),
    ({"target_ids": ids[:2], "return_stats": True}, ValueError, "target_ids has shape"),
    ({"target_ids": ids.float(), "return_stats": True}, TypeError, "target_ids has dtype"),
    ({"target_ids": ids + V, "return_stats": True}, ValueError, "target_ids must lie in"),
    ({"target_ids": ids - 100, "return_stats": True}, ValueError, "token_weight 0"),
    ({"token_weight": ones[:2]}, ValueError, "token_weight has shape"),
    ({"token_weight": -ones}, ValueError, "token_weight must be finite and >= 0"),
    ({"token_weight": ones * math.nan}, ValueError, "token_weight"),
    ({"token_weight": ones * math.inf}, ValueError, "token_weight"),
    ({"token_weight": ones.tolist()}, TypeError, "token_weight must be a tensor"),
    ({"token_weight": ones.clone().requires_grad_()}, ValueError, "token_weight requires"),
    ({"student_bias": torch.ones(V + 1)}, ValueError, "student_bias has shape"),
    ({"process_group": object()}, TypeError, "process_group=.*ProcessGroup"),
    ({"skip_tolerance": 0.0}, ValueError, "skip_tolerance=0.0"),
    ({"skip_tolerance": 1e-3, "divergence": "jsd"}, ValueError, "teacher's mass"),
    ({"skip_tolerance": 1e-3, "reduction": "none"}, ValueError, "token_weight"),
    ({"skip_tolerance": 1e-3, "backend": "fused"}, ValueError, "chunked"),
    ({"skip_tolerance": 1e-3, "logit_softcap": (5.0, 6.0)}, ValueError, "one cap"),
    ({"exact_value": True}, ValueError, "without skip_tolerance"),
    ({"vocab_size": V + 1}, ValueError, "vocab_size"),
    ({"vocab_size": 0}, ValueError, "vocab_size"),
    ({"workspace_bytes": 100}, ValueError, "workspace_bytes=100"),
    ({"student_hidden": h[0]}, ValueError, "student_hidden has shape"),
    ({"student_hidden": h.long()}, TypeError, "student_hidden has dtype"),
    ({"student_hidden": None}, TypeError, "student_hidden must be a tensor"),
    ({"student_hidden": h.bfloat16()}, TypeError, "dtypes differ"),
    ({"student_hidden": h.to("meta")}, ValueError, "is on"),
    ({"teacher_hidden": ht[:3]}, ValueError, "different tokens"),
    ({"teacher_hidden": torch.randn(N, D + 1)}, ValueError, "teacher_weight has shape"),
    ({"teacher_weight": torch.randn(V + 1, D)}, ValueError, "vocab_size="),
    ({"teacher_weight": torch.randn(V - 1, D)}, ValueError, "vocab_size="),
    ({"student_weight": torch.randn(V, D + 1)}, ValueError, "student_weight has shape"),
    ({"teacher_hidden": ht.clone().requires_grad_()}, ValueError, "teacher_hidden requires"),
    ({"teacher_weight": w.clone().requires_grad_()}, ValueError, "teacher_weight requires"),
    ({"teacher_bias": torch.ones(V, requires_grad=True)}, ValueError, "teacher_bias requires"),
])  # fmt: skip
def test_mistakes_name_argument_value_and_remedy(change, error, words):
    tensors = {"student_hidden": h, "student_weight": w, "teacher_hidden": ht, **change}
    with pytest.raises(error, match=words.replace("(", r"\(")):
        linear_divergence(**tensors)


def test_fused_by_name_never_falls_back():
    with pytest.raises((ValueError, ImportError, TypeError), match="fused"):
        linear_divergence(h.double(), w.double(), ht.double(), backend="fused")


def test_dtensor_is_refused():
    class Sharded(torch.Tensor):
        device_mesh = "mesh"

    with pytest.raises(ValueError, match=r"student_weight is a DTensor.*full_tensor"):
        linear_divergence(h, w.as_subclass(Sharded), ht)
