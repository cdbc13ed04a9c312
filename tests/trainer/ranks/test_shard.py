"""Gradients of all ranks: added whatever a rank has, in buckets of any size."""

import pytest
from helpers import ranks as t

MISSING = [{}, {1: ["b"]}, {0: ["a"], 1: ["c"]}, {0: ["a", "b", "c"]}, {0: ["b"], 1: ["b"]}]


def summed(missing, bucket_bytes):
    """What a rank has after the sum of gradients that are rank + 1 times the parameter's number."""
    import torch

    from opsdc.config.settings import DistributedConfig
    from opsdc.ranks import shard, talk

    ranks = talk.join(DistributedConfig())
    shard._BUCKET_BYTES = bucket_bytes
    model = torch.nn.ParameterDict(
        {name: torch.nn.Parameter(torch.zeros(i + 1, 2)) for i, name in enumerate("abcd")}
    )
    model["d"].requires_grad_(False)
    for i, name in enumerate("abc", 1):
        if name not in missing.get(ranks.rank, []):
            model[name].grad = torch.full_like(model[name], i * 10.0**ranks.rank)
    shard.sum_gradients(model, ranks)
    return {n: None if p.grad is None else p.grad.unique().tolist() for n, p in model.items()}


@pytest.mark.whole
@pytest.mark.parametrize("bucket_bytes", [1, 20, 1 << 28])
@pytest.mark.parametrize("missing", MISSING, ids=str)
def test_a_rank_without_a_gradient_is_part_of_the_sum(missing, bucket_bytes):
    expected = {
        name: [sum(i * 10.0**rank for rank in (0, 1) if name not in missing.get(rank, []))]
        for i, name in enumerate("abc", 1)
    }
    for found in t.ranks(2, summed, missing, bucket_bytes):
        assert found == {**expected, "d": None}
