"""What `auto` takes, and that planner and loss take the same."""

import inspect
import json
from dataclasses import replace

import pytest
import torch
from helpers.kernels import CPU, make_problem

from opsdc_kernels import api, auto, linear_divergence, plan
from opsdc_kernels.fused import op as fused
from opsdc_kernels.fused.cost import DEVICES, H200, SIZES

GPU = torch.device("cuda")
CALL = auto.Call(
    tokens=8192, vocab_size=151936, dims=(4096, 4096), dtype=torch.bfloat16, device=GPU,
    trainable=False, gradient=True, divergence="reverse_kl", shared_head=False, recomputes=False,
    extras=False, rows=2048, workspace_bytes=2 << 30,
)  # fmt: skip
GIVEN = {"tokens": 8192, "vocab_size": 151936, "student_dim": 4096, "dtype": torch.bfloat16,
         "device": "cuda"}  # fmt: skip
H100 = DEVICES["sm_90"]


@pytest.fixture(autouse=True)
def nothing_measured(monkeypatch, tmp_path):
    monkeypatch.setattr(auto, "MEASURED", tmp_path / "none.json")
    monkeypatch.setattr(auto, "find_spec", lambda name: object())


def test_on_a_cpu_it_is_chunked():
    assert auto.choose(replace(CALL, device=CPU, rows=1)) == ("chunked", "auto: chunked on a CPU")


@pytest.mark.parametrize("mode", [(True, True), (False, True), (False, False)])
def test_with_scratch_chunked_is_forecast_to_be_faster(mode):
    for size in SIZES:
        picked = plan.estimate(
            tokens=size.tokens, vocab_size=size.vocab_size, student_dim=size.dim,
            dtype=torch.bfloat16, device="cuda", trainable_head=mode[0], gradient=mode[1],
            workspace_bytes=2 << 30,
        )  # fmt: skip
        assert picked.backend == "chunked"
        assert picked.reason.startswith("auto: forecast, chunked ")


def test_with_little_scratch_fused_is():
    """Chunks of a few rows read the whole head for each, and a trained one's gradient too."""
    frozen, trained, loss = (
        [plan.estimate(**GIVEN, workspace_bytes=mib << 20, trainable_head=train, gradient=gradient)
         .backend for mib in (2048, 256, 128, 64)]
        for train, gradient in ((False, True), (True, True), (False, False))
    )  # fmt: skip
    for found in (frozen, trained, loss):
        assert found[0] == "chunked"
        assert found[-1] == "fused"
        assert found == sorted(found)
    assert trained.count("fused") > frozen.count("fused")


def test_scratch_that_holds_no_row_of_chunked_holds_a_loss_of_fused():
    small = {**GIVEN, "workspace_bytes": 1 << 20, "trainable_head": False}
    found = plan.estimate(**small, gradient=False)
    assert found.backend == "fused"
    assert "not one row" in found.reason
    assert found.workspace_bytes == 0
    with pytest.raises(ValueError, match="workspace_bytes"):
        plan.estimate(**small)  # with a gradient fused needs a tile


def test_a_gradient_tile_of_fused_must_fit():
    least = auto._least_tile(CALL, "sm_90")
    assert least == 128 * 151936 * 2
    tight = replace(CALL, rows=1, workspace_bytes=least)
    assert auto.choose(tight)[0] == "fused"
    picked, reason = auto.choose(replace(tight, workspace_bytes=least - 1))
    assert picked == "chunked"
    assert "gradient tile" in reason
    assert auto.choose(replace(tight, workspace_bytes=least - 1, gradient=False))[0] == "fused"


@pytest.mark.parametrize("given", [{"dtype": torch.float64}, {"sharded": True}])
def test_what_fused_does_not_compute(given):
    little = replace(CALL, rows=32, workspace_bytes=64 << 20)
    assert auto.choose(little)[0] == "fused"
    assert auto.choose(replace(little, **given))[0] == "chunked"


def test_without_triton_it_is_chunked(monkeypatch):
    little = replace(CALL, rows=32, workspace_bytes=64 << 20)
    monkeypatch.setattr(auto, "find_spec", lambda name: None)
    assert auto.choose(little)[0] == "chunked"


def test_a_forecast_must_be_clearly_better(monkeypatch):
    for fused_ms, picked in ((10 / 1.11, "fused"), (10 / 1.09, "chunked")):
        monkeypatch.setattr(auto, "chunked_ms", lambda *a: 10.0)
        monkeypatch.setattr(auto, "fused_ms", lambda *a, ms=fused_ms: ms)
        assert auto.choose(CALL)[0] == picked


def test_chunked_by_hand():
    """Frozen, large chunks: three products, and 48 bytes of a logit beside them."""
    unit = 2 * 8192 * 4096 * 151936 / (0.74 * 989e12) * 1e3
    streamed = 8192 * 151936 / (0.9 * 3.35e12) * 1e3
    assert auto.chunked_ms(CALL, H100) == pytest.approx(3 * unit + 48 * streamed, rel=1e-3)
    loss = replace(CALL, gradient=False)
    assert auto.chunked_ms(loss, H100) == pytest.approx(2 * unit + 8 * streamed, rel=1e-3)
    trained = replace(CALL, trainable=True)
    assert auto.chunked_ms(trained, H100) == pytest.approx(4 * unit + 48 * streamed, rel=1e-3)
    jsd = replace(CALL, divergence="jsd")
    assert auto.chunked_ms(jsd, H100) == pytest.approx(3 * unit + 56 * streamed, rel=1e-3)
    twice = replace(trained, recomputes=True)
    assert auto.chunked_ms(twice, H100) == pytest.approx(6 * unit + 56 * streamed, rel=1e-3)
    assert auto.chunked_ms(CALL, H200) < auto.chunked_ms(CALL, H100)


def test_low_chunks_read_the_head_again_and_again():
    low = replace(CALL, rows=32)
    head = 2 * 151936 * 4096
    reads = 3 * 256 * head / (0.9 * 3.35e12) * 1e3
    assert auto.chunked_ms(low, H100) > reads
    trained = auto.chunked_ms(replace(low, trainable=True), H100) - auto.chunked_ms(low, H100)
    assert trained == pytest.approx(256 * 4 * head / (0.9 * 3.35e12) * 1e3, rel=0.02)


def test_fused_by_hand():
    from opsdc_kernels.fused.configs import config_for
    from opsdc_kernels.fused.cost import Kernel

    unit = 2 * 8192 * 4096 * 151936 / (0.74 * 989e12) * 1e3

    def tiles(kernel, config=None, **extras):
        chosen = config_for(config or kernel, "sm_90", "16-bit",
                            **{"shared": False, "extras": False, **extras})  # fmt: skip
        shared = extras.get("shared", False)
        return Kernel.of(kernel, shared=shared, item=2).cost(chosen, H100, SIZES[0]).milliseconds

    loss = replace(CALL, gradient=False)
    assert auto.fused_ms(loss, H100, "sm_90") == tiles("statistics")
    both = tiles("statistics") + tiles("gradient")
    assert auto.fused_ms(CALL, H100, "sm_90") == pytest.approx(both + unit, rel=1e-3)
    trained = replace(CALL, trainable=True)
    assert auto.fused_ms(trained, H100, "sm_90") == pytest.approx(both + 2 * unit, rel=1e-3)
    jsd = replace(CALL, divergence="jsd", gradient=False)
    assert auto.fused_ms(jsd, H100, "sm_90") == tiles("statistics") + tiles("jsd")
    shared = replace(loss, shared_head=True)
    assert auto.fused_ms(shared, H100, "sm_90") == tiles("statistics", shared=True)
    forward = replace(loss, divergence="forward_kl")
    assert auto.fused_ms(forward, H100, "sm_90") == tiles("statistics", by_teacher=True)
    assert auto.fused_ms(forward, H100, "sm_90") > auto.fused_ms(loss, H100, "sm_90")
    extras = replace(loss, extras=True)
    assert auto.fused_ms(extras, H100, "sm_90") == tiles("statistics", extras=True)


MUTANTS = (
    ("* (1 + call.recomputes)", "* 1"),
    ("STATISTICS_BYTES * (1 + (call.divergence == \"jsd\"))", "STATISTICS_BYTES"),
    ("GRADIENT_BYTES + ROUNDING_BYTES * (item == 2)", "GRADIENT_BYTES"),
    ("tile + 8 * columns * student.dim", "tile"),
    ("head * size.dim + 4 * logits", "4 * logits"),
    ("        if call.trainable:\n            # The", "        if False:\n            # The"),
    ("+ (tiles(\"jsd\", \"jsd\") if jsd else 0.0)", ""),
    ("total += tiles(\"gradient\", \"jsd\" if jsd else \"gradient\")", "pass"),
    ("by_teacher=call.divergence == \"forward_kl\"", "by_teacher=False"),
    ("return total + products * call.tokens / height", "return total"),
    ("tile + 8 * head", "tile"),
)  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_term_left_out_is_noticed(mutant, monkeypatch):
    source = inspect.getsource(auto)
    assert mutant[0] in source, "the mutant's line has changed"
    wrong: dict = {"__name__": auto.__name__, "__file__": auto.__file__}
    exec(compile(source.replace(*mutant), "mutant", "exec"), wrong)
    for name in ("chunked_ms", "fused_ms"):
        monkeypatch.setattr(auto, name, wrong[name])
    for test in (test_chunked_by_hand, test_low_chunks_read_the_head_again_and_again,
                 test_fused_by_hand, test_trained_tiles_of_fused_by_hand):  # fmt: skip
        try:
            test()
        except AssertionError:
            return
    pytest.fail("no test fails")


def test_trained_tiles_of_fused_by_hand():
    """In low tiles the trained head's gradient is read and written for each."""
    low = replace(CALL, workspace_bytes=128 * 151936 * 2)
    more = auto.fused_ms(replace(low, trainable=True), H100, "sm_90")
    more -= auto.fused_ms(low, H100, "sm_90")
    moved = 64 * (8 * 151936 * 4096 + 128 * 151936 * 2)
    assert more == pytest.approx(moved / (0.9 * 3.35e12) * 1e3, rel=1e-3)


def table(path, **changes):
    row = {"target": "sm_90", "dtype": "bfloat16", "tokens": 8192, "dim": 4096,
           "vocab_size": 151936, "mode": "frozen head", "chunked_ms": 60.0,
           "fused_ms": 50.0}  # fmt: skip
    path.write_text(json.dumps({"rows": [{**row, **changes}]}))
    auto.measurements.cache_clear()


def test_measurements_overrule_the_forecast(tmp_path, monkeypatch):
    monkeypatch.setattr(auto, "MEASURED", tmp_path / "measured.json")
    assert auto.choose(CALL)[0] == "chunked"
    table(auto.MEASURED)
    picked, reason = auto.choose(CALL)
    assert picked == "fused"
    assert reason == "auto: measured, chunked 60.0 ms and fused 50.0 ms"
    found = plan.estimate(**GIVEN, workspace_bytes=2 << 30, trainable_head=False)
    assert (found.backend, found.reason) == (picked, reason)
    table(auto.MEASURED, fused_ms=61.0)
    assert auto.choose(CALL)[0] == "chunked"
    assert "measured" in auto.choose(CALL)[1]


@pytest.mark.parametrize("changes", [
    {"target": "sm_100"}, {"dtype": "float16"}, {"mode": "trainable head"}, {"tokens": 1024},
    {"vocab_size": 32000}, {"dim": 512},
])  # fmt: skip
def test_measurements_of_something_else_say_nothing(changes, tmp_path, monkeypatch):
    monkeypatch.setattr(auto, "MEASURED", tmp_path / "measured.json")
    table(auto.MEASURED, **changes)
    assert auto.choose(CALL)[1].startswith("auto: forecast")


@pytest.mark.parametrize("given", [
    {"divergence": "jsd"}, {"shared_head": True}, {"extras": True}, {"recomputes": True},
    {"trainable": True}, {"gradient": False},
])  # fmt: skip
def test_nor_do_those_of_other_calls(given, tmp_path, monkeypatch):
    monkeypatch.setattr(auto, "MEASURED", tmp_path / "measured.json")
    table(auto.MEASURED)
    assert auto.choose(replace(CALL, **given))[1].startswith("auto: forecast")


def test_measured_times_are_scaled_to_the_sizes(tmp_path, monkeypatch):
    monkeypatch.setattr(auto, "MEASURED", tmp_path / "measured.json")
    table(auto.MEASURED)
    assert "chunked 30.0 ms and fused 25.0 ms" in auto.choose(replace(CALL, tokens=4096))[1]


class OnGPU(torch.Tensor):
    """A CPU's tensor that says it lies on a GPU: what `auto` is asked about."""

    device = GPU


@pytest.mark.parametrize("mib", [1, 64, 256, 2048])
@pytest.mark.parametrize("mode", ["trainable head", "frozen head", "forward only", "bias", "none"])
def test_planner_and_loss_agree(mode, mib):
    """On the same sizes, for every kind of call."""
    hidden, weight, teacher = (
        torch.zeros(size, dtype=torch.bfloat16, device="meta")
        for size in ((8192, 4096), (151936, 4096), (8192, 4096))
    )
    hidden.requires_grad_(mode != "forward only")
    weight.requires_grad_(mode in ("trainable head", "none"))
    options = {"workspace_bytes": mib << 20, "reduction": "none" if mode == "none" else "mean"}
    bias = torch.zeros(151936, dtype=torch.bfloat16, device="meta") if mode == "bias" else None
    problem = make_problem(hidden, weight, teacher, weight.detach().clone(), student_bias=bias,
                           teacher_bias=bias, **options)  # fmt: skip
    on_gpu = replace(problem, student_hidden=hidden.as_subclass(OnGPU))
    try:
        planned = plan.estimate(
            **GIVEN, **options, trainable_head=weight.requires_grad, extras=bias is not None,
            gradient=mode != "forward only",
        ).backend  # fmt: skip
    except ValueError:
        planned = "chunked"  # which has no room for a row, and will say so
    assert plan.backend_of(on_gpu, chunked_only=False) == planned
    assert plan.backend_of(on_gpu, chunked_only=True) == "chunked"


def test_the_loss_runs_what_was_chosen(monkeypatch):
    h, w, ht = torch.randn(3, 8), torch.randn(11, 8), torch.randn(3, 8)
    asked = []

    def backend_of(problem, *, chunked_only):
        asked.append(chunked_only)
        return "fused"

    monkeypatch.setattr(api.plan, "backend_of", backend_of)
    monkeypatch.setattr(fused, "fused_divergence", lambda problem: ("fused ran", {}))
    assert linear_divergence(h, w, ht) == "fused ran"
    assert linear_divergence(h, w, ht, backend="chunked") != "fused ran"
    with torch.no_grad():
        linear_divergence(h, w, ht, skip_tolerance=1e-3)
    assert asked == [False, True]


def test_the_planner_forecasts_what_it_was_asked_for():
    given = {**GIVEN, "workspace_bytes": 2 << 30, "trainable_head": False}
    found = {name: plan.estimate(**given, backend=name) for name in ("chunked", "fused", "auto")}
    assert found["auto"].milliseconds == found["chunked"].milliseconds
    assert found["chunked"].milliseconds < found["fused"].milliseconds
    assert f"forecast {found['fused'].milliseconds:.1f} ms" in str(found["fused"])
    for change in (
        {"device": "cpu"}, {"dtype": torch.float64}, {"kept_share": 0.1}, {"backend": "reference"},
    ):  # fmt: skip
        silent = plan.estimate(**{**given, **change})
        assert silent.milliseconds is None
        assert ", forecast" not in str(silent)
