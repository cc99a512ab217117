"""A world without an engine for testing budgets: a draft of a known quality, costs of any kind.

Each level of a drafted chain has a probability of the draft's own and a true chance of being
accepted; time is what the cost table says. So the budget rule can run against every fixed size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from vllm_msd.budget import (
    Calibration,
    CostTable,
    DepthChooser,
    prefix_lengths,
)
from vllm_msd.budget.costs import GREEDY
from vllm_msd.budget.depth import PROBED_NODES
from vllm_msd.tree import TreeConfig

DEPTH = 8
SHAPE = TreeConfig(DEPTH, DEPTH, 1)


def costs(step: float, request: float, row: float, prefill: float, level: float) -> CostTable:
    """Linear costs: of a step, of each of its requests and rows; of a draft's prefill and level."""
    sizes = (1, 2, 4, 8, 16, 32)
    return CostTable(
        tuple((r, n * r, step + request * r + row * n * r) for r in sizes for n in (1, 4, 64)),
        tuple((n, prefill + row * n / 30) for n in (1, 1000)),
        tuple((r, level + row * r / 30) for r in sizes),
    )


@dataclass
class World:
    """``truth`` maps a level's own probability to its chance of being accepted.

    ``way``: of drawing, which has a cost for each row.
    """

    costs: CostTable
    truth: Callable[[np.ndarray], np.ndarray]
    way: str = GREEDY
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    def draft(self, requests: int) -> tuple[np.ndarray, np.ndarray]:
        """``[R, DEPTH]`` path probabilities, and bool: whether the first i + 1 are accepted."""
        own = self.rng.beta(4, 1.2, (requests, DEPTH))
        right = self.rng.random((requests, DEPTH)) < self.truth(own)
        return own.cumprod(1), np.logical_and.accumulate(right, axis=1)

    def seconds(self, requests: int, nodes: int, depth: int) -> float:
        rows = requests + nodes
        return self.step_seconds(requests, rows) + float(
            self.costs.draft_seconds(requests, rows, depth)
        )

    def step_seconds(self, requests: int, rows: int) -> float:
        """Of the target."""
        return float(self.costs.drawn(self.way).step_seconds(requests, rows))

    def fixed(self, length: int, requests: int, steps: int) -> float:
        """Tokens per second of a chain of this length."""
        tokens = requests * steps + self.draft(requests * steps)[1][:, :length].sum()
        return tokens / (steps * self.seconds(requests, length * requests, length))

    def best_fixed(self, requests: int, steps: int = 4000) -> tuple[float, int]:
        return max((self.fixed(n, requests, steps), n) for n in range(DEPTH + 1))


@dataclass
class Step:
    requests: int
    depth: int
    nodes: int
    tokens: int
    seconds: float


class Auto:
    """The budget rule in a world, step by step."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.calibration = Calibration()
        table = world.costs
        ways = (GREEDY, *(way for way, _ in table.drawing))
        self.costs = {way: table.drawn(way) for way in ways}
        self.chooser = DepthChooser(SHAPE, self.calibration)

    def run(self, load: Sequence[int]) -> list[Step]:
        """A step for each number of requests."""
        return [self.step(requests) for requests in load]

    def step(self, requests: int) -> Step:
        costs = self.costs[self.world.way]
        plan = self.chooser.next(requests, costs)
        paths, right = self.world.draft(requests)
        paths = paths[:, : plan.depth]
        for path in paths:
            self.chooser.drafted(plan.depth, path, np.arange(1, plan.depth + 1))
        lengths = prefix_lengths(
            [self.calibration.worth(path) for path in paths],
            costs,
            plan.depth,
            at_least=PROBED_NODES if plan.is_probe else 0,
        )
        accepted = int(sum(a[:n].sum() for a, n in zip(right, lengths, strict=True)))
        verified = [(p[:n], a[:n]) for p, a, n in zip(paths, right, lengths, strict=True)]
        if plan.is_probe:
            expected = sum(self.calibration.worth(p).sum() for p, _ in verified)
            self.chooser.probed(expected, accepted)
        self.calibration.observe(*(np.concatenate(x) for x in zip(*verified, strict=True)))
        seconds = self.world.seconds(requests, sum(lengths), plan.depth)
        return Step(requests, plan.depth, sum(lengths), requests + accepted, seconds)


def rate(steps: Sequence[Step]) -> float:
    """Tokens per second."""
    return sum(s.tokens for s in steps) / sum(s.seconds for s in steps)
