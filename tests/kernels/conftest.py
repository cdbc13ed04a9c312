"""Tests of the kernels run on one thread: results repeat, and tiny shapes are faster."""

import pytest
import torch

from opsdc_kernels.problem import Problem
from opsdc_kernels.row_pass import build


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=["compiled", "torch"])
def row_passes(request):
    """A module's tests with the row passes in C, then with those in torch."""
    patch = pytest.MonkeyPatch()
    with patch.context() as context:
        context.setenv(build.SWITCH, "1" if request.param == "compiled" else "0")
        if request.param == "compiled" and build.native().dll is None:
            pytest.skip(f"row passes run in {build.native().description}")
        yield request.param


@pytest.fixture
def make_problem():
    """A `Problem` from tensors and the options that differ from the defaults."""

    def make(h, w, ht, wt=None, **options):
        defaults = {
            "student_bias": None,
            "teacher_bias": None,
            "token_weight": None,
            "target_ids": None,
            "divergence": "reverse_kl",
            "beta": 0.5,
            "temperature": 1.0,
            "logit_scale": (1.0, 1.0),
            "logit_softcap": (None, None),
            "own_teacher_bias": False,
            "vocab_size": w.shape[0],
            "reduction": "sum",
            "return_stats": False,
            "workspace_bytes": None,
        }
        return Problem(
            student_hidden=h,
            student_weight=w,
            teacher_hidden=ht,
            teacher_weight=wt,
            **{**defaults, **options},
        )

    return make
