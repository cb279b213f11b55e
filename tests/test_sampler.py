"""data/sampler.py: the order is a pure function of (seed, step) and covers every place once."""

from itertools import islice

import numpy as np
import pytest

from data.sampler import StepBatchSampler, draw_step, replacements, shuffled_index

LARGE, WIDE = (480, 640), (352, 1216)
MIX = [0.9, 0.1]


def sampler(seed=0, batch=32, micro_batch=4, probabilities=MIX, sizes=(LARGE, WIDE), first_step=0,
            last_step=20, rank=0, world=1):
    return StepBatchSampler(seed, batch, micro_batch, probabilities, sizes, first_step, last_step,
                            rank, world)


def test_a_step_is_a_pure_function_of_seed_and_step():
    source, flip = draw_step(7, 123, 32, MIX)
    for step in (0, 500, 122):  # whatever is drawn in between
        draw_step(7, step, 32, MIX)
    again = draw_step(7, 123, 32, MIX)
    assert np.array_equal(source, again[0]) and np.array_equal(flip, again[1])
    others = [draw_step(8, 123, 32, MIX), draw_step(7, 124, 32, MIX)]
    assert not any(np.array_equal(flip, other) for _, other in others)


def test_mix_and_flips_have_their_probabilities():
    draws = [draw_step(0, step, 32, [0.9, 0.0, 0.1]) for step in range(1000)]
    source, flip = (np.concatenate(parts) for parts in zip(*draws))
    # 32,000 draws: a standard deviation is 0.0017 for the mix and 0.0028 for the flips.
    assert abs(np.mean(source == 2) - 0.1) < 0.007
    assert not (source == 1).any()
    assert abs(flip.mean() - 0.5) < 0.012
    assert abs(flip[source == 0].mean() - flip[source == 2].mean()) < 0.05
    single, _ = draw_step(0, 0, 32, [1.0])
    assert (single == 0).all()


def test_every_epoch_is_another_permutation():
    epochs = [[shuffled_index(5, 0, 11, k) for k in range(11 * e, 11 * e + 11)] for e in range(4)]
    assert all(sorted(epoch) == list(range(11)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    other_source = [shuffled_index(5, 1, 11, k) for k in range(11)]
    other_seed = [shuffled_index(6, 0, 11, k) for k in range(11)]
    assert epochs[0] not in (other_source, other_seed)
    # Far into the training, and asked in any order, it is the same.
    assert [shuffled_index(5, 0, 11, k) for k in reversed(range(11))] == epochs[0][::-1]


def test_replacements_are_a_pure_function_of_seed_data_set_and_place():
    def row(*key):
        return list(islice(replacements(*key), 50))

    assert row(5, 0, 1000, 7) == row(5, 0, 1000, 7)
    others = [row(6, 0, 1000, 7), row(5, 1, 1000, 7), row(5, 0, 1000, 8)]
    assert row(5, 0, 1000, 7) not in others
    assert set(row(5, 0, 3, 7)) == {0, 1, 2}


@pytest.mark.parametrize("batch, micro_batch, world",
                         [(32, 4, 1), (32, 3, 4), (7, 2, 3), (5, 8, 5)])
def test_ranks_and_micro_batches_cover_every_place_once(batch, micro_batch, world):
    ranks = [sampler(batch=batch, micro_batch=micro_batch, rank=rank, world=world)
             for rank in range(world)]
    for step in range(20):
        source, _ = draw_step(0, step, batch, MIX)
        seen = []
        for rank, one in enumerate(ranks):
            for places in one.micro_batches(step):
                assert 1 <= len(places) <= micro_batch
                assert len({source[k - step * batch] for k in places}) == 1
                assert all((k - step * batch) % world == rank for k in places)
                seen += places
        assert sorted(seen) == list(range(step * batch, (step + 1) * batch))


def test_data_sets_of_one_size_share_micro_batches():
    lists = sampler(micro_batch=32, sizes=(LARGE, list(LARGE))).micro_batches(3)
    assert lists == [list(range(96, 128))]


def test_iterating_yields_the_steps_in_order_and_resumes_anywhere():
    whole = sampler(last_step=20)
    lists = list(whole)
    counts = [whole.micro_batch_count(step) for step in range(20)]
    assert len(lists) == sum(counts) and len(set(counts)) > 1
    assert [places for step in range(20) for places in whole.micro_batches(step)] == lists
    resumed = list(sampler(first_step=13, last_step=20))
    assert resumed == lists[sum(counts[:13]):]
    # Another micro-batch size changes the cut, not what a step holds.
    coarse = list(sampler(micro_batch=32))
    assert sorted(sum(coarse, [])) == sorted(sum(lists, [])) and len(coarse) < len(lists)


@pytest.mark.parametrize("wrong, message", [
    (dict(batch=3, world=4), "batch of 3 .* 4 ranks"), (dict(micro_batch=0), "micro-batch is 0"),
    (dict(seed=-1), "seed is -1")])
def test_impossible_numbers_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        sampler(**wrong)
