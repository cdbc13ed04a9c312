import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opsdc.method.batch import (
    Layout,
    Pair,
    from_labels,
    micro_batches,
    plan_step,
    to_labels,
    token_batch,
    token_weights,
)
from opsdc.method.mixture import AGAINST, CONCISE, PLAIN

CPU = torch.device("cpu")
SEQUENCES = [([1, 2, 3], [4, 5]), ([6], [7, 8, 9]), ([1, 2], [3])]


@pytest.mark.parametrize("packed", [True, False])
def test_scored_positions_predict_the_response_tokens(packed):
    batch = token_batch(SEQUENCES, packed=packed, pad_id=0, device=CPU)
    flat = batch.input_ids.flatten()
    expected = [token for _, response in SEQUENCES for token in response]
    assert flat[batch.scored + 1].tolist() == expected
    before = [(prompt + response[:-1])[-len(response) :] for prompt, response in SEQUENCES]
    assert flat[batch.scored].tolist() == [token for part in before for token in part]


def test_packed_row_restarts_positions_and_has_no_mask():
    batch = token_batch(SEQUENCES, packed=True, pad_id=0, device=CPU)
    assert batch.attention_mask is None
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1, 2]]


def test_padded_rows_are_masked_on_the_right():
    batch = token_batch(SEQUENCES, packed=False, pad_id=99, device=CPU)
    assert batch.attention_mask.sum(1).tolist() == [5, 4, 3]
    assert batch.input_ids[2].tolist() == [1, 2, 3, 99, 99]


def test_labels_and_scored_positions_say_the_same():
    batch = token_batch(SEQUENCES, packed=False, pad_id=0, device=CPU)
    labels = to_labels(batch)
    assert labels.tolist() == [
        [-100, -100, -100, 4, 5],
        [-100, 7, 8, 9, -100],
        [-100, -100, 3, -100, -100],
    ]
    again = from_labels(batch.input_ids, batch.attention_mask, labels)
    assert torch.equal(again.scored, batch.scored)
    assert again.targets.tolist() == [4, 5, 7, 8, 9, 3]


def test_labels_of_left_padded_rows():
    ids = torch.tensor([[0, 0, 1, 2], [5, 6, 7, 8]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    # The first label of the second row has no position before it and is not scored.
    labels = torch.tensor([[-100, -100, -100, 2], [5, 6, -100, -100]])
    batch = from_labels(ids, mask, labels)
    assert batch.position_ids.tolist() == [[0, 0, 0, 1], [0, 1, 2, 3]]
    assert batch.scored.tolist() == [2, 4]
    assert batch.targets.tolist() == [2, 6]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(1, 100), st.booleans())
@settings(max_examples=200, deadline=None)
def test_micro_batches_hold_every_sequence_once_within_the_budget(lengths, budget, packed):
    groups = micro_batches(lengths, max_tokens=budget, packed=packed)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    for group in groups:
        widths = [lengths[i] for i in group]
        tokens = sum(widths) if packed else max(widths) * len(widths)
        # A sequence above the budget goes alone: it is never cut or dropped.
        assert tokens <= budget or len(group) == 1


@pytest.mark.parametrize("normalization", ["sequence", "token"])
def test_weights_sum_to_one_and_skip_empty_responses(normalization):
    lengths = [3, 0, 5, 1]
    weights = token_weights(lengths, normalization)
    assert sum(w * n for w, n in zip(weights, lengths)) == pytest.approx(1)
    assert weights[1] == 0


def test_sequence_mean_and_token_mean_are_what_they_are_called():
    assert token_weights([2, 8], "sequence") == [1 / 4, 1 / 16]
    assert token_weights([2, 8], "token") == [1 / 10, 1 / 10]


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("sides", [(3, 40, 20), (40, 3, 20), (7, 7, 90)], ids=str)
def test_each_pass_is_cut_by_the_lengths_of_its_own_prompts(sides, packed):
    """Student's, teacher's and the other style's: a long instruction needs smaller forwards."""
    generator = torch.Generator().manual_seed(0)
    many = [
        Pair(
            student_prompt_ids=[1] * sides[0],
            teacher_prompt_ids=[2] * sides[1],
            against_prompt_ids=[3] * sides[2],
            response_ids=[4] * int(torch.randint(1, 60, (), generator=generator)),
        )
        for _ in range(30)
    ]
    budget = 160
    layout = Layout(packed=packed, max_tokens=budget, pad_id=0, dtype=torch.float32)
    mix = {CONCISE: 1.5, PLAIN: -0.25, AGAINST: -0.25}
    plan = plan_step(many, layout, normalization="sequence", contexts=lambda dial: mix)
    passes = {**plan.teacher_groups, "student": plan.student_groups}
    assert passes.keys() == {CONCISE, PLAIN, AGAINST, "student"}
    used = {}
    for context, groups in passes.items():
        assert sorted(i for group in groups for i in group) == list(range(30))
        sizes = [
            plan.teacher_batch(context, group, CPU).input_ids.numel()
            if context != "student"
            else plan.student_batch(group, CPU).input_ids.numel()
            for group in groups
        ]
        assert max(sizes) <= budget
        used[context] = len(groups)
    shorter, longer = sorted((CONCISE, PLAIN), key=lambda c: sides[0 if c == PLAIN else 1])
    assert (used[shorter] < used[longer]) == (sides[0] != sides[1])
    assert used["student"] == used[PLAIN]
