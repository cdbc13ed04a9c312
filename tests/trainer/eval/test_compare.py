import numpy as np
import pytest

from opsdc.errors import DataError
from opsdc.eval.answers import Answer, headline
from opsdc.eval.compare import by_length, compare


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
    with pytest.raises(DataError, match="not to the same problems"):
        compare(base, base[:1])


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
