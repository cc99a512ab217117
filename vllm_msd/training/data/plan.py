"""Which record comes when: a pure function of seed and step, alike on every process.

Step s of the run draws a kind for each of its records, text or multimodal, with the curriculum's
probability at s. The n-th record of a kind is the n-th of its shuffled data, so that none comes
twice before all have come once.
"""

from collections.abc import Callable

import numpy as np

from vllm_msd.training.curriculum import visual_ratio

TEXT, MULTIMODAL = 0, 1
# Streams of random numbers of one seed, kept apart.
_KINDS, _ORDER, _DEAL, _SPARE = range(4)


def seeded(seed: int, *place: int) -> np.random.Generator:
    """Random numbers that depend on the seed and the place alone."""
    return np.random.default_rng([seed, *place])


def share_of_multimodal(
    curriculum: str,
    steps: int,
    epochs: int = 40,
    ramp_share: float = 1.0,
    visual_share: float = 1.0,
) -> Callable[[int], float]:
    """The probability of a multimodal record at each step, from 0.

    Args:
        curriculum: ``two-stage`` (arXiv 2505.14260), ``text``, ``multimodal``, or ``mixed``, which
            keeps to two-stage's mean from the first step on.
        steps: of the run.
        epochs: stairs of the two-stage ramp.
        ramp_share: part of the run over which they are spread; then the last one goes on.
        visual_share: factor on the ramp.
    """
    if curriculum in ("text", "multimodal"):
        return lambda step: float(curriculum == "multimodal")

    def two_stage(step: int) -> float:
        past = step / (ramp_share * steps) if ramp_share else 1.0
        return visual_share * visual_ratio(min(epochs, 1 + int(past * epochs)), epochs)

    if curriculum == "two-stage":
        return two_stage
    mean = sum(map(two_stage, range(steps))) / steps
    return lambda step: mean


class DataPlan:
    """The records of every step.

    Args:
        weights: rough length of every text and of every multimodal record, by which a pool of
            steps is sorted.
        batch_size: records per step, over all processes.
        share: probability of a multimodal record at a step.
        pool: steps that are sorted by length together; their kinds stay those of the pool.
        seed: of everything.
    """

    def __init__(
        self,
        weights: tuple[np.ndarray, np.ndarray],
        batch_size: int,
        share: Callable[[int], float],
        pool: int = 1,
        seed: int = 0,
    ) -> None:
        self.weights = weights
        self.sizes = tuple(len(w) for w in weights)
        self.batch_size = batch_size
        self.share = share
        self.pool = pool
        self.seed = seed
        # How many of each kind came before a pool, filled up as far as anybody asked.
        self._before = [(0, 0)]
        self._orders: dict[tuple[int, int], np.ndarray] = {}
        self._dealt: tuple[int, np.ndarray] | None = None

    def records(self, step: int) -> list[tuple[int, int]]:
        """Kind and record number of every record of a step."""
        pool, place = divmod(step, self.pool)
        if self._dealt is None or self._dealt[0] != pool:
            self._dealt = (pool, self._deal(pool))
        return [tuple(row) for row in self._dealt[1][place].tolist()]

    def spare(self, step: int, slot: int, attempt: int, kind: int) -> int:
        """Another record of the kind, for one that turned out to be broken."""
        rng = seeded(self.seed, _SPARE, step, slot, attempt)
        return int(rng.integers(self.sizes[kind]))

    def _kinds(self, pool: int) -> np.ndarray:
        steps = range(pool * self.pool, (pool + 1) * self.pool)
        draws = [
            seeded(self.seed, _KINDS, s).random(self.batch_size) < self.share(s) for s in steps
        ]
        return np.concatenate(draws).astype(np.int64)

    def _deal(self, pool: int) -> np.ndarray:
        """int64 [pool, batch, 2]: kind and number, like lengths together, steps shuffled."""
        while len(self._before) <= pool:
            text, multimodal = self._before[-1]
            kinds = self._kinds(len(self._before) - 1)
            more = int(kinds.sum())
            self._before.append((text + len(kinds) - more, multimodal + more))
        kinds = self._kinds(pool)
        numbers = np.empty_like(kinds)
        for kind in (TEXT, MULTIMODAL):
            places = np.flatnonzero(kinds == kind)
            counts = self._before[pool][kind] + np.arange(len(places))
            numbers[places] = [self._nth(kind, int(n)) for n in counts]
        records = np.stack([kinds, numbers], 1)
        if self.pool > 1:
            lengths = [self.weights[kind][number] for kind, number in records]
            records = records[np.argsort(lengths, kind="stable")]
        dealt = records.reshape(self.pool, self.batch_size, 2)
        return dealt[seeded(self.seed, _DEAL, pool).permutation(self.pool)]

    def _nth(self, kind: int, n: int) -> int:
        """The n-th record of a kind that is ever drawn."""
        lap, place = divmod(n, self.sizes[kind])
        if (kind, lap) not in self._orders:
            self._orders = {
                k: v for k, v in self._orders.items() if k[0] != kind or k[1] == lap - 1
            }
            order = seeded(self.seed, _ORDER, kind, lap).permutation(self.sizes[kind])
            self._orders[kind, lap] = order
        return int(self._orders[kind, lap][place])
