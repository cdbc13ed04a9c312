import numpy as np
import pytest

from opsdc.errors import DataError
from opsdc.eval.answers import Answer, headline
from opsdc.eval.compare import by_difficulty, by_length, compare, in_characters, pass_at_1


def answers(tokens, correct, samples=1, truncated=None):
    return [
        Answer(
            problem_id=f"p{i // samples}",
            sample=i % samples,
            question="?",
            gold="1",
            text="",
            tokens=int(n),
            truncated=bool(truncated[i]) if truncated is not None else False,
            correct=None if right is None else bool(right),
            extracted="1" if right else None,
        )
        for i, (n, right) in enumerate(zip(tokens, correct))
    ]


def test_headline_counts_what_it_says():
    found = headline(answers([10, 20, 30, 40], [1, 0, 0, 1], truncated=[0, 0, 0, 1]))
    assert found["tokens_mean"] == 25
    assert found["tokens_p50"] == 25
    assert (found["truncated"], found["accuracy"], found["no_answer_found"]) == (0.25, 0.5, 0.5)


def test_problems_without_gold_have_no_accuracy():
    assert headline(answers([1, 2], [None, None]))["accuracy"] is None
    assert "accuracy_difference" not in compare(
        answers([2, 2], [None, None]), answers([1, 1], [None, None])
    )


def test_reduction_is_of_the_means_and_its_interval_covers_the_truth():
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(40):
        base = rng.poisson(100, 64) + 1
        other = (base * rng.uniform(0.2, 0.6, 64)).astype(int)
        found = compare(answers(base, [1] * 64), answers(other, [1] * 64), seed=seed)
        low, high = found["token_reduction_ci95"]
        assert low <= found["token_reduction"] <= high
        # 0.4 of the length is kept on average, half a token is lost to rounding.
        covered += low <= 0.605 <= high
    assert covered >= 34


@pytest.mark.whole
def test_detectable_difference_is_seen_four_times_in_five():
    """At a true difference of the printed size, the interval excludes 0 in ~80 % of samples."""
    rng = np.random.default_rng(1)
    n = 128

    def sample(loss):
        base = rng.random(n) < 0.5
        return answers([9] * n, base), answers([9] * n, base & (rng.random(n) >= loss))

    # The size for a drop of about 7 points: 0.5 of the problems can turn, 14 % of them do.
    sizes = [compare(*sample(0.14))["accuracy_detectable"] for _ in range(5)]
    loss = float(np.mean(sizes)) / 0.5
    seen = [compare(*sample(loss))["accuracy_difference_ci95"][1] < 0 for _ in range(40)]
    assert 0.6 < np.mean(seen) <= 1


def test_pairing_matters_and_is_checked():
    base = answers([10, 100], [1, 1])
    for others in (base[:1], base[::-1]):
        with pytest.raises(DataError, match="not to the same problems"):
            compare(base, others)


def test_intervals_are_paired():
    """What is the same on both sides of each problem is no uncertainty of the difference."""
    rng = np.random.default_rng(2)
    base, right = 2 * rng.integers(5, 5000, 50), rng.random(50) < 0.5
    told = compare(answers(base, right), answers(base // 2, right))
    assert told["token_reduction_ci95"] == [0.5, 0.5]
    assert told["accuracy_difference_ci95"] == [0.0, 0.0]


@pytest.mark.parametrize("seed", [0, 1])
def test_intervals_hold_95_percent(seed):
    """Beside the normal approximation, good at 900 problems; 90 % would be 16 % narrower."""
    rng = np.random.default_rng(seed)
    n = 900
    base, right = rng.integers(100, 300, n), rng.random(n) < 0.5
    after, still = rng.integers(50, 150, n), rng.random(n) < 0.4
    told = compare(answers(base, right), answers(after, still), seed=seed)
    difference = still.astype(float) - right
    ratio = after.mean() / base.mean()
    for name, spread in (
        ("accuracy_difference_ci95", difference.std(ddof=1)),
        # The delta method for a ratio of means.
        ("token_reduction_ci95", (after - ratio * base).std(ddof=1) / base.mean()),
    ):
        low, high = told[name]
        assert high - low == pytest.approx(2 * 1.96 * spread / n**0.5, rel=0.04)


def test_problems_are_resampled_not_answers():
    """Four equal answers to a problem say no more than one."""
    rng = np.random.default_rng(4)
    tokens, right = rng.integers(10, 99, 25), rng.random(25) < 0.5
    after, still = rng.integers(10, 99, 25), rng.random(25) < 0.5
    once = compare(answers(tokens, right), answers(after, still))
    four = [
        answers(np.repeat(x, 4), np.repeat(y, 4), samples=4)
        for x, y in ((tokens, right), (after, still))
    ]
    again = compare(*four)
    for name in ("token_reduction", "accuracy_difference"):
        assert again[f"{name}_ci95"] == once[f"{name}_ci95"]
        assert again[name] == once[name]
    assert again["accuracy_detectable"] == once["accuracy_detectable"]


def test_detectable_difference_by_hand():
    """(1.96 + 0.84) standard errors of the sample: differences -1, 0, 0, 0 deviate by 0.5."""
    told = compare(answers([9] * 4, [1, 1, 0, 1]), answers([9] * 4, [0, 1, 0, 1]))
    assert told["accuracy_detectable"] == 0.7
    told = compare(answers([9] * 2, [1, 0]), answers([9] * 2, [0, 0]))
    assert told["accuracy_detectable"] == round(2.8 * 0.5**0.5 / 2**0.5, 4)


def test_reductions_are_ratios_of_means():
    """A long answer weighs as much as its tokens: 0.4545; the mean of the ratios would be 0.25."""
    base, after = answers([10, 100], [1, 0]), answers([10, 50], [1, 0])
    assert compare(base, after)["token_reduction"] == 0.4545
    assert by_length(base, after, bins=1)[0]["token_reduction"] == 0.4545
    many = compare(answers([10, 1000] * 60, [1] * 120), answers([10, 500] * 60, [1] * 120))
    low, high = many["token_reduction_ci95"]
    assert 0.48 < low <= many["token_reduction"] <= high < 0.5
    truncated = answers([9] * 4, [1] * 4, truncated=[1, 1, 1, 0])
    assert compare(truncated, answers([9] * 4, [1] * 4))["truncated_difference"] == -0.75


def test_bins_hold_every_problem_once():
    rng = np.random.default_rng(0)
    base = answers(rng.integers(10, 100, 60), rng.random(60) < 0.5, samples=4)
    trained = answers(rng.integers(5, 50, 60), rng.random(60) < 0.5, samples=4)
    bins = by_length(base, trained)
    assert [row["problems"] for row in bins] == [5, 5, 5]
    tokens = [row["base_tokens"] for row in bins]
    assert tokens == sorted(tokens)


@pytest.mark.parametrize(
    ("lengths", "names", "sizes"),
    [
        ([7] * 6, ["7"], [6]),
        ([3, 9, 9, 9, 9, 12], ["3", "9–12"], [1, 5]),
        ([5, 5, 5, 5, 8, 9], ["5", "8–9"], [4, 2]),
        ([4], ["4"], [1]),
    ],
)
def test_problems_of_one_length_share_a_bin(lengths, names, sizes):
    base = answers(lengths, [1] * len(lengths))
    bins = by_length(base, base)
    assert [row["bin"].removeprefix("base length ") for row in bins] == names
    assert [row["problems"] for row in bins] == sizes


def test_outcomes_are_counted_pair_by_pair():
    base = answers([9] * 10, [1, 1, 1, 1, 1, 0, 0, 0, 0, 0])
    changed = answers([9] * 10, [1, 1, 1, 0, 0, 1, 0, 0, 0, 0])
    told = compare(base, changed)
    assert [told[k] for k in ("kept", "lost", "gained", "still_wrong")] == [3, 2, 1, 4]
    assert told["accuracy_difference"] == -0.1
    # Two-sided: P(X ≤ 1 or X ≥ 2 of 3 fair coins) = 1.
    assert told["mcnemar_p"] == 1.0


def test_mcnemar_is_the_exact_binomial_test():
    base = answers([9] * 40, [1] * 12 + [0] * 28)
    changed = answers([9] * 40, [0] * 10 + [1] * 2 + [0] * 26 + [1] * 2)
    # 10 lost, 2 gained: 2·(1 + 12 + 66) / 2^12.
    assert compare(base, changed)["mcnemar_p"] == round(2 * 79 / 4096, 4)
    twice = answers([9] * 40, [1] * 12 + [0] * 28, samples=2)
    assert compare(twice, twice)["mcnemar_p"] is None


def test_bins_by_difficulty_do_not_see_the_answers_they_compare():
    """Answers of pure chance: binned by themselves they fall and rise, by others they do not."""
    rng = np.random.default_rng(3)
    n = 3000

    def coin():
        return answers(rng.integers(10, 100, n), rng.random(n) < 0.5)

    base, trained = coin(), coin()
    tables = by_difficulty(coin(), base, trained)
    for row in tables["pass_rate"]:
        assert abs(row["base_accuracy"] - row["trained_accuracy"]) < 0.06
    for row in tables["length"]:
        assert abs(row["token_reduction"]) < 0.06
    own = by_difficulty(base, base, trained)
    assert own["pass_rate"][-1]["base_accuracy"] - own["pass_rate"][-1]["trained_accuracy"] > 0.4
    assert by_length(base, trained)[-1]["token_reduction"] > 0.3


def test_pass_rates_are_those_of_several_samples():
    measured = answers([9] * 12, [0] * 4 + [1, 0, 1, 1] + [1] * 4, samples=4)
    arm = answers([9] * 3, [0, 1, 1])
    names = [row["bin"] for row in by_difficulty(measured, arm, arm)["pass_rate"]]
    assert names == ["base never right", "base sometimes right", "base always right"]


def test_pass_at_1_is_the_mean_over_problems_with_an_interval():
    rng = np.random.default_rng(3)
    right = rng.random(400) < 0.3
    found = pass_at_1(answers([9] * 400, right))
    low, high = found["pass_at_1_ci95"]
    assert found["pass_at_1"] == pytest.approx(right.mean())
    assert high - low == pytest.approx(2 * 1.96 * (0.21 / 400) ** 0.5, rel=0.15)
    # Four equal answers to each problem say no more.
    assert pass_at_1(answers([9] * 1600, np.repeat(right, 4), samples=4)) == found
    assert pass_at_1(answers([9], [None])) == {}


def test_an_interval_where_all_are_wrong_or_right_is_the_exact_one():
    """The interval of Clopper and Pearson; of 30 problems none, up to 11.6 %."""
    assert pass_at_1(answers([9] * 30, [0] * 30))["pass_at_1_ci95"] == [0.0, 0.1157]
    assert pass_at_1(answers([9] * 30, [1] * 30))["pass_at_1_ci95"] == [0.8843, 1.0]


def test_characters_stand_in_for_tokens():
    (empty,) = in_characters(answers([7], [1]))
    assert empty.tokens == 1
