"""Which tokens are kept: the largest of each response, however equal or sick they are."""

import math

import pytest
import torch

from opsdc.method.selection import kept_count, kept_tokens


def test_each_response_keeps_its_own_largest():
    # A response without tokens, and one whose smallest is above all others' largest.
    value = torch.tensor([3.0, 1.0, 2.0, 0.0, 9.0, 8.0, 7.0])
    kept = kept_tokens(value, [4, 0, 2, 1], 0.5)
    assert kept.tolist() == [True, False, True, False, True, False, True]


def test_of_equal_tokens_the_first_are_kept():
    assert kept_tokens(torch.ones(5), [5], 0.4).tolist() == [True, True, False, False, False]
    kept = kept_tokens(torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0]), [5], 0.8)
    assert kept.tolist() == [True, True, False, True, True]


def test_what_is_not_finite_is_kept():
    value = torch.tensor([1.0, math.nan, math.inf, 2.0])
    assert kept_tokens(value, [4], 0.5).tolist() == [False, True, True, False]


@pytest.mark.parametrize(
    ("length", "share", "count"),
    # 0.1·30 is 3.0000000000000004 in binary: never one token more than asked for.
    [(30, 0.1, 3), (10, 0.5, 5), (1, 0.2, 1), (3, 0.01, 1), (7, 1.0, 7), (7, 0.95, 7), (0, 0.5, 0)],
)
def test_count(length, share, count):
    assert kept_count(length, share) == count
    assert int(kept_tokens(torch.arange(float(length)), [length], share).sum()) == count
