"""The cost of a tile kernel: every term by hand, what bounds it, and mutants that leave one out."""

import inspect

import pytest

from opsdc_kernels.fused import cost
from opsdc_kernels.fused.configs import Config, config_for
from opsdc_kernels.fused.cost import DEVICES, H200, SIZES, Cost, Kernel, Size

N, D, V = SIZES[0]
TODAY = Config(128, 64, 64, 1, 16, 8, 4)
"""Of the forward KL's statistics."""
TWO_HEADS = Kernel.of("statistics", shared=False, item=2)
ONE_HEAD = Kernel.of("statistics", shared=True, item=2)
H100 = DEVICES["sm_90"]


def test_two_heads_in_tiles_of_128_by_64_do_43_flop_per_byte():
    assert TWO_HEADS.step_flop(TODAY) == 2 * 2 * 128 * 64 * 64
    assert TWO_HEADS.step_bytes(TODAY) == 2 * 64 * (2 * 128 + 2 * 64)
    assert TWO_HEADS.step_flop(TODAY) / TWO_HEADS.step_bytes(TODAY) == pytest.approx(42.7, abs=0.05)


def test_and_are_bound_by_l2():
    """Far above what the products take, and nowhere near what memory gives."""
    found = TWO_HEADS.cost(TODAY, H100, SIZES[0])
    assert found.bound_by == "l2"
    # N·D·V·2 bytes · (2 / BN + 2 / BM) at 9.7 TB/s.
    by_hand = 2 * N * D * V * (2 / 64 + 2 / 128) / 9.7e12 * 1e3
    assert found.milliseconds == found.l2 == pytest.approx(by_hand, rel=1e-3)
    assert found.tensor == pytest.approx(2 * 2 * N * D * V / (0.74 * 989e12) * 1e3, rel=1e-3)
    assert found.milliseconds > 1.5 * found.tensor
    assert found.memory < 0.5 * found.tensor


def test_bytes_from_memory():
    """Both heads once per group of 16 blocks of 128 rows, both hidden states once."""
    found = TWO_HEADS.cost(TODAY, H100, SIZES[0])
    moved = 2 * D * (2 * V * 4 + 2 * N)
    assert found.memory == pytest.approx(moved / (0.9 * 3.35e12) * 1e3, rel=1e-3)
    narrow = TWO_HEADS.cost(TODAY._replace(GROUP=1), H100, SIZES[0])
    assert narrow.memory > 15 * found.memory
    assert narrow.bound_by == "memory"


def test_one_head_reads_its_weights_once_and_multiplies_three_operands():
    assert ONE_HEAD.step_flop(TODAY) == 3 * 2 * 128 * 64 * 64
    assert ONE_HEAD.step_bytes(TODAY) == 2 * 64 * (3 * 128 + 64)
    exact = Kernel.of("statistics", shared=True, item=4)
    assert exact.step_flop(TODAY) == 2 * 2 * 128 * 64 * 64
    assert exact.step_bytes(TODAY) == 4 * 64 * (2 * 128 + 64)


def test_the_gradient_is_written_through_l2_to_memory():
    gradient = Kernel.of("gradient", shared=False, item=2)
    more, less = (kernel.cost(TODAY, H100, SIZES[0]) for kernel in (gradient, TWO_HEADS))
    assert more.memory - less.memory == pytest.approx(2 * N * V / (0.9 * 3.35e12) * 1e3, rel=1e-3)
    assert more.l2 - less.l2 == pytest.approx(2 * N * V / 9.7e12 * 1e3, rel=1e-3)
    assert more.tensor == less.tensor


def test_tiles_at_the_edge_are_whole_tiles():
    full, past = (TWO_HEADS.cost(TODAY, H100, Size(128, 64, columns)) for columns in (64, 65))
    assert past.tensor == 2 * full.tensor
    assert past.l2 == 2 * full.l2


def test_wider_tiles_read_less():
    costs = [
        TWO_HEADS.cost(Config(rows, columns, 64, 1, 16, 8, 3), H100, SIZES[0])
        for rows, columns in ((64, 64), (128, 64), (128, 128), (128, 256))
    ]
    assert sorted((x.l2 for x in costs), reverse=True) == [x.l2 for x in costs]
    assert len({round(x.tensor, 6) for x in costs}) <= 2  # but for the edge
    assert costs[-1].bound_by == "tensor"


def test_fp32_runs_at_the_rate_of_fp32():
    single = Kernel.of("statistics", shared=False, item=4).cost(TODAY, H100, SIZES[0])
    assert single.tensor == pytest.approx(2 * 2 * N * D * V / (0.74 * 67e12) * 1e3, rel=1e-3)


def test_rates_of_devices():
    assert cost.device_of("sm_90", "NVIDIA H200") == H200
    assert cost.device_of("sm_90", "NVIDIA H100 80GB HBM3") == H100
    assert H200.memory == 4.8
    for device in DEVICES.values():
        assert device.memory < device.l2 < device.half
        assert "gpu-benches" in device.l2_source
    product = cost.product_cost(H100, SIZES[0], 2)
    assert product.tensor == pytest.approx(2 * N * D * V / (0.74 * 989e12) * 1e3)
    assert product.bound_by == "tensor"


@pytest.mark.parametrize("target", DEVICES)
def test_what_a_cost_is_bound_by_is_its_largest_term(target):
    for shared in (False, True):
        config = config_for("statistics", target, "bf16", shared=shared, extras=False)
        kernel = Kernel.of("statistics", shared=shared, item=2)
        found = kernel.cost(config, DEVICES[target], SIZES[0])
        assert found.milliseconds == max(found) == getattr(found, found.bound_by)


MUTANTS = {
    "no bytes from L2": ("l2=(steps * self.step_bytes(config) +", "l2=(0 * steps +"),
    "the gradient is not read through L2": (
        "self.step_bytes(config) + self.written * logits", "self.step_bytes(config) + 0 * logits"
    ),
    "no gradient in memory": ("moved + self.written * logits", "moved + 0 * logits"),
    "hidden states for nothing": ("* groups + self.products * size.tokens", "* groups"),
    "weights once": ("size.vocab_size * groups", "size.vocab_size * 1"),
    "rows of one head": (
        "(self.products * config.BM + self.weights * config.BN)",
        "(config.BM + self.weights * config.BN)",
    ),
    "columns of one head": (
        "(self.products * config.BM + self.weights * config.BN)",
        "(self.products * config.BM + config.BN)",
    ),
    "the vendor's rate": ("(SUSTAINED * rate * 1e9)", "(rate * 1e9)"),
    "memory at its vendor's": ("(STREAMED * device.memory * 1e9)", "(device.memory * 1e9)"),
    "one product": ("2 * self.products * config.BM", "2 * config.BM"),
    "no low part": ("3 if shared and item == 2 else 2", "2"),
    "tiles cut at the edge": ("ceil(size.vocab_size / config.BN)", "size.vocab_size / config.BN"),
    "all at the rate of 16 bits": ("device.single if self.item == 4 else device.half",
                                   "device.half"),
    "the sum of all": ("return max(self)", "return sum(self)"),
}  # fmt: skip
TESTS = (
    test_two_heads_in_tiles_of_128_by_64_do_43_flop_per_byte,
    test_and_are_bound_by_l2,
    test_bytes_from_memory,
    test_one_head_reads_its_weights_once_and_multiplies_three_operands,
    test_the_gradient_is_written_through_l2_to_memory,
    test_tiles_at_the_edge_are_whole_tiles,
    test_fp32_runs_at_the_rate_of_fp32,
)


@pytest.mark.parametrize("name", MUTANTS)
def test_a_term_left_out_is_noticed(name, monkeypatch):
    """Each wrong edit of the module fails one of the tests above."""
    old, new = MUTANTS[name]
    source = inspect.getsource(cost)
    assert old in source, "the mutant's line has changed"
    wrong: dict = {"__name__": cost.__name__}
    exec(compile(source.replace(old, new), "mutant", "exec"), wrong)
    for kernel, made in (("TWO_HEADS", False), ("ONE_HEAD", True)):
        monkeypatch.setitem(
            globals(), kernel, wrong["Kernel"].of("statistics", shared=made, item=2)
        )
    monkeypatch.setitem(globals(), "Kernel", wrong["Kernel"])
    for test in TESTS:
        try:
            test()
        except AssertionError:
            return
    pytest.fail("no test fails")


def test_costs_compare_by_their_largest():
    assert Cost(3.0, 1.0, 2.0).milliseconds == 3.0
    assert Cost(1.0, 4.0, 2.0).bound_by == "memory"


def test_the_widest_tiles_are_bound_by_their_products():
    """Two heads fill the registers at 128 x 128, 64 FLOP per byte; one head does 96."""
    for name, shared, intensity in (("statistics", False, 64), ("gradient", True, 96)):
        wide = config_for(name, "sm_90", "bf16", shared=shared, extras=False)
        kernel = Kernel.of(name, shared=shared, item=2)
        assert kernel.step_flop(wide) / kernel.step_bytes(wide) == intensity
        for size in SIZES:
            found = kernel.cost(wide, H100, size)
            assert found.milliseconds < 1.25 * found.tensor
    by_teacher = config_for(
        "statistics", "sm_90", "bf16", shared=False, extras=False, by_teacher=True
    )
    assert by_teacher == TODAY
