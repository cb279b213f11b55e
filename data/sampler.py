"""Which sample is drawn when: pure functions of the seed, the step and the data sets' sizes.

A step has `batch` places; k = step * batch + place numbers all places of the training. A place
draws its data set and its flip, and reads entry k of that data set's own endless shuffled order.
So the samples of a step do not depend on restarts or on the number of GPUs, workers and
micro-batches, and resuming needs only the step.
"""

from functools import lru_cache

import numpy as np
from torch.utils.data import Sampler

# First words of the random streams' keys, so that no two streams share a key.
DRAW_STREAM, ORDER_STREAM, REPLACEMENT_STREAM = 0, 1, 2


def random_stream(*key):
    """A generator that is a pure function of the key (non-negative integers)."""
    return np.random.Generator(np.random.PCG64(key))


def draw_step(seed, step, batch, probabilities):
    """(source, flip): int array and bool array of length `batch`, one entry for each place.

    source is the number of the data set that the place draws, with the given probabilities; flip
    says whether the sample is mirrored left to right (p = 0.5).
    """
    # Deviation: a pure function of (seed, step); the released code's loader shuffles.
    uniform = random_stream(seed, DRAW_STREAM, step).random((2, batch))
    # Deviation: each place draws its data set; released, each micro-batch does.
    thresholds = np.cumsum(probabilities) / np.sum(probabilities)
    source = np.searchsorted(thresholds[:-1], uniform[0], side="right")
    return source, uniform[1] < 0.5


@lru_cache(maxsize=8)
def shuffled(seed, source, epoch, length):
    """The order of one data set in one epoch: a permutation of range(length)."""
    return random_stream(seed, ORDER_STREAM, source, epoch).permutation(length)


def shuffled_index(seed, source, length, k):
    """Entry k of the endless shuffled order of data set `source`, which has `length` samples.

    Every data set has an entry for every k; entry k is skipped if place k drew another data set.
    """
    epoch, position = divmod(k, length)
    return int(shuffled(seed, source, epoch, length)[position])


def replacements(seed, source, length, k):
    """The endless sequence of indices that replace entry k of data set `source`.

    It has its own random stream: the same step usually draws the next entries of the order, too.
    """
    stream = random_stream(seed, REPLACEMENT_STREAM, source, k)
    while True:
        yield int(stream.integers(length))


class StepBatchSampler(Sampler):
    """A batch sampler: yields the micro-batches of this rank, lists of places k, step by step.

    Rank r of `world` takes the places r, r + world, ... of each step. They are grouped by the size
    (H, W) of the data set they draw, as only equal sizes can be stacked, and each group is cut
    into lists of at most `micro_batch`. Every place is in exactly one list of one rank.
    """

    def __init__(self, seed, batch, micro_batch, probabilities, sizes, first_step, last_step,
                 rank=0, world=1):
        """probabilities and sizes: one entry per data set; steps: first_step .. last_step - 1."""
        if seed < 0:
            raise ValueError(f"the seed is {seed}, but it must be 0 or more.")
        if micro_batch < 1:
            raise ValueError(f"the micro-batch is {micro_batch}, but it must be 1 or more.")
        if batch < world:
            raise ValueError(f"a batch of {batch} leaves some of the {world} ranks without a "
                             "sample; use a larger batch or fewer ranks.")
        self.seed, self.batch, self.micro_batch = seed, batch, micro_batch
        self.probabilities, self.sizes = list(probabilities), [tuple(size) for size in sizes]
        self.first_step, self.last_step = first_step, last_step
        self.rank, self.world = rank, world

    def micro_batches(self, step):
        """The lists of places of one step, for this rank."""
        source, _ = draw_step(self.seed, step, self.batch, self.probabilities)
        groups = {}
        for place in range(self.rank, self.batch, self.world):
            size = self.sizes[source[place]]
            groups.setdefault(size, []).append(step * self.batch + place)
        return [places[start:start + self.micro_batch] for places in groups.values()
                for start in range(0, len(places), self.micro_batch)]

    def micro_batch_count(self, step):
        """How many of the yielded lists belong to this step."""
        return len(self.micro_batches(step))

    def __iter__(self):
        for step in range(self.first_step, self.last_step):
            yield from self.micro_batches(step)
