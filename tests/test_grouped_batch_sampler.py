"""The plan of micro-batches: equal to 2019's for one process, the same partition on every rank."""

import numpy as np
import pytest
from conftest import load_golden

from grouped_batch_sampler import GroupedBatchSampler, grouped_batches, length_groups
from utils import InputError, keyed_numpy_generator


@pytest.mark.parametrize(
    "case", load_golden("parity.json")["sampler"], ids=lambda case: f"{len(case['lengths'])}"
)
def test_groups_and_batches_equal_the_2019_code(case):
    groups = length_groups(np.array(case["lengths"]), case["max_model_input_size"])
    assert groups.tolist() == case["groups"]
    batches = grouped_batches(np.array(case["order"]), groups, case["batch_size"])
    assert [batch.tolist() for batch in batches] == case["batches"]


def test_without_a_maximum_length_there_is_one_edge():
    assert length_groups(np.array([3, 9, 10, 500]), 0).tolist() == [0, 0, 1, 1]


def make_sampler(num=101, batch_size=4, group_by_size=True, seed=5) -> GroupedBatchSampler:
    lengths = np.random.default_rng(0).integers(12, 60, num)
    return GroupedBatchSampler(lengths, batch_size, 64, group_by_size=group_by_size, seed=seed)


@pytest.mark.parametrize("group_by_size", [True, False])
@pytest.mark.parametrize("num, batch_size", [(1, 4), (4, 4), (101, 4), (7, 100), (50, 1)])
def test_an_epoch_holds_every_sequence_once(num, batch_size, group_by_size):
    sampler = make_sampler(num, batch_size, group_by_size)
    batches = sampler.epoch_batches(0)
    assert sorted(np.concatenate(batches).tolist()) == list(range(num))
    assert len(batches) == len(sampler) == -(-num // batch_size)
    assert max(map(len, batches)) <= batch_size


def test_the_flag_controls_grouping_by_length():
    spreads = {}
    for group_by_size in (True, False):
        sampler = make_sampler(400, 5, group_by_size)
        spreads[group_by_size] = np.mean(
            [np.ptp(sampler.lengths[batch]) for batch in sampler.epoch_batches(0)]
        )
    assert spreads[True] < 8 < 20 < spreads[False]


def test_order_depends_on_seed_and_epoch_alone():
    plans = {
        (s, e): np.concatenate(make_sampler(seed=s).epoch_batches(e)).tolist()
        for s in (5, 6)
        for e in (0, 1)
    }
    assert len({tuple(plan) for plan in plans.values()}) == 4
    assert np.concatenate(make_sampler(seed=6).epoch_batches(1)).tolist() == plans[6, 1]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("num_epochs", [1, 3])
def test_ranks_divide_each_update_evenly(world_size, num_epochs):
    accumulation = 12 // world_size
    sampler = make_sampler()
    total = len(sampler) * num_epochs
    whole = list(sampler.updates(total, 12, 0, 1))
    shares = [
        list(make_sampler().updates(total, accumulation, rank, world_size))
        for rank in range(world_size)
    ]
    for number, alone in enumerate(whole):
        mine = [share[number].mine for share in shares]
        together = sorted((b.number, b.sequences.tolist()) for share in mine for b in share)
        assert together == [(b.number, b.sequences.tolist()) for b in alone.mine]
        sizes = [len(share) for share in mine]
        assert max(sizes) - min(sizes) <= 1
        if number < len(whole) - 1:
            assert sizes == [accumulation] * world_size
    assert all(len(share) == len(whole) for share in shares)
    assert [batch.number for update in whole for batch in update.planned] == list(range(total))


def test_some_ranks_get_nothing_of_a_last_update_smaller_than_the_ranks():
    sampler = make_sampler(num=5, batch_size=1)
    shares = [[len(update.mine) for update in sampler.updates(5, 1, rank, 4)] for rank in range(4)]
    assert shares == [[1, 1], [1, 0], [1, 0], [1, 0]]


def test_dealing_balances_the_ranks_padded_sizes():
    sampler = make_sampler(num=2000, batch_size=4)
    for update in zip(*(sampler.updates(400, 16, rank, 2) for rank in range(2)), strict=True):
        loads = [
            sum(len(b.sequences) * sampler.lengths[b.sequences].max() for b in rank.mine)
            for rank in update
        ]
        assert max(loads) / min(loads) < 1.05


# --------------------------------------------------------------------------------------------------
# Batches by a token budget
# --------------------------------------------------------------------------------------------------


def budget_sampler(
    num=3000, max_tokens=512, max_length=64, seed=5, longest=64
) -> GroupedBatchSampler:
    lengths = np.random.default_rng(0).integers(12, longest + 1, num)
    options = {"group_by_size": True, "seed": seed, "max_tokens": max_tokens}
    return GroupedBatchSampler(lengths, 5, max_length, **options)


def padded_sizes(sampler, batches) -> list[int]:
    return [len(batch) * int(sampler.lengths[batch].max()) for batch in batches]


@pytest.mark.parametrize("num", [1, 7, 500, 3000])
@pytest.mark.parametrize(
    "max_tokens, max_length, longest",
    [(512, 64, 64), (64, 64, 64), (1000, 512, 200), (63, 63, 63), (700, 65, 65)],
)
def test_batches_stay_within_the_budget_and_hold_every_sequence_once(
    num, max_tokens, max_length, longest
):
    sampler = budget_sampler(num, max_tokens, max_length, longest=longest)
    batches = sampler.epoch_batches(0)
    assert sorted(np.concatenate(list(batches)).tolist()) == list(range(num))
    assert max(padded_sizes(sampler, batches)) <= max_tokens
    assert len(batches) == len(sampler)


def test_batches_use_the_budget_and_hold_similar_lengths():
    sampler = budget_sampler(20_000, max_tokens=2048)
    batches = list(sampler.epoch_batches(0))
    sizes = np.array(padded_sizes(sampler, batches))
    assert np.median(sizes) > 0.9 * 2048, "batches of long and of short sequences cost the same"
    assert np.mean([np.ptp(sampler.lengths[batch]) for batch in batches]) < 4.5
    assert max(map(len, batches)) > 3 * min(len(batch) for batch in batches[: len(batches) // 2])


def test_every_epoch_has_the_same_number_of_batches():
    sampler = budget_sampler(777, max_tokens=300)
    assert len({len(sampler.epoch_batches(epoch)) for epoch in range(12)}) == 1


def test_ranks_divide_the_batches_of_a_budget():
    shares = [list(budget_sampler().updates(400, 3, rank, 2)) for rank in range(2)]
    numbers = sorted(batch.number for share in shares for update in share for batch in update.mine)
    assert numbers == list(range(400))


def test_a_budget_below_the_longest_sequence_or_without_grouping_is_refused():
    expected = "--max_tokens 63: the longest sequence has 64 ids; raise it, or set --max_length"
    with pytest.raises(InputError, match=expected):
        budget_sampler(max_tokens=63)
    with pytest.raises(InputError, match="--max_tokens with --no-group_by_size"):
        GroupedBatchSampler(np.array([20]), 5, 64, group_by_size=False, seed=1, max_tokens=99)


def test_the_order_of_an_epoch_equals_numpys_permutation():
    """Plans of earlier versions stay valid: 32-bit orders use the same random numbers."""
    sampler = make_sampler(1000, 4, group_by_size=False, seed=9)
    expected = keyed_numpy_generator(9, 3, "order").permutation(1000)
    assert np.concatenate(list(sampler.epoch_batches(3))).tolist() == expected.tolist()
