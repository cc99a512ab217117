"""How deep to draft for the next step, down to not at all.

Nobody knows a step's nodes before they are drafted, so the last ones drafted at each depth stand
for them: together they say what rate each depth would give at the present number of requests. To
stay informed, every so often a step drafts at full depth. Where nothing is drafted, these probes
become rarer as long as they find nothing.
"""

from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vllm_msd.budget.costs import CostTable
from vllm_msd.budget.rule import best_rate
from vllm_msd.budget.usual import expected_tree
from vllm_msd.budget.worth import USUAL, AcceptancePrior, Calibration
from vllm_msd.tree.config import TreeConfig

Array = NDArray[np.float64]
Ints = NDArray[np.int64]

REMEMBERED = 32  # trees, of each depth
PLANNED_FOR = 8  # steps with the same number of requests that share a decision
PROBE_EVERY = 64  # steps, while something is drafted
FIRST_PROBE, LAST_PROBE = 16, 512  # steps, while nothing is
PROBED_NODES = 2  # verified in any case
MARGIN = 1.02  # a gain below 2 % is less than what the costs are known to


@dataclass(frozen=True)
class DraftPlan:
    """What to draft for the next step. ``is_probe``: it should not pay, and is done to learn."""

    depth: int
    is_probe: bool = False


class DepthChooser:
    """Decides each step's depth for one shape of trees; see the module.

    Args:
        shape: the largest tree (or chain).
        calibration: path probabilities to worths, kept up to date by the caller.
        prior: what to expect before anything was drafted.
    """

    def __init__(
        self,
        shape: TreeConfig,
        calibration: Calibration,
        prior: AcceptancePrior = USUAL,
    ) -> None:
        self._shape, self._calibration = shape, calibration
        # The path probabilities of the nodes at each depth, of the last trees that went so deep.
        self._levels: list[deque[Array]] = [deque(maxlen=REMEMBERED) for _ in range(shape.depth)]
        self._expected = expected_tree(shape, prior.by_depth)
        self._plans: dict[tuple[int, float], int] = {}
        self._planned = 0
        self._until_probe = 0
        self._interval = FIRST_PROBE

    def next(self, requests: int, costs: CostTable) -> DraftPlan:
        """What to draft for the next step of ``requests`` requests; called once a step.

        ``costs``: of such steps; of one table, apart from drawing.
        """
        if self._planned == 0:
            self._plans.clear()
            self._planned = PLANNED_FOR
        self._planned -= 1
        depth = self._plans.get((requests, costs.row))
        if depth is None:
            depth = self._plans[requests, costs.row] = self._best(requests, costs)
        self._until_probe -= 1
        if self._until_probe >= 0 or depth == self._shape.depth:
            return DraftPlan(depth)
        if depth == 0:
            self._until_probe = self._interval
            self._interval = min(2 * self._interval, LAST_PROBE)
            return DraftPlan(self._shape.depth, is_probe=True)
        self._until_probe, self._interval = PROBE_EVERY, FIRST_PROBE
        return DraftPlan(self._shape.depth)

    def drafted(self, depth: int, probabilities: Array, depths: Ints) -> None:
        """Take note of a tree drafted ``depth`` levels deep, ``[nodes]`` without its root."""
        if depth == self._shape.depth and not self._levels[-1]:
            self._plans.clear()  # so far these came from the prior
        for level in range(depth):
            self._levels[level].append(probabilities[depths == level + 1])

    def probed(self, expected: float, accepted: int) -> None:
        """Take note of what a probe brought: accepted tokens against the sum of their worths.

        Far more than expected: the draft fits again, so the next probe comes soon.
        """
        if accepted > 2 * expected:
            self._interval = FIRST_PROBE
            self._until_probe = min(self._until_probe, FIRST_PROBE)
            self._plans.clear()

    def rates(self, requests: int, costs: CostTable) -> list[float]:
        """Expected tokens per second when drafting 0, 1, ... levels."""
        if self._levels[-1]:
            nodes = [np.concatenate(trees) for trees in self._levels]
            shares = [requests / len(trees) for trees in self._levels]
            worths = self._calibration.worth(np.concatenate(nodes))
            counts = np.repeat(shares, [len(level) for level in nodes])
            depths = np.repeat(np.arange(1, len(nodes) + 1), [len(level) for level in nodes])
        else:
            worths, depths = self._expected
            counts = np.full(len(worths), float(requests))
        order = np.argsort(-worths, kind="stable")
        worths, counts, depths = worths[order], counts[order], depths[order]
        rates = []
        for depth in range(self._shape.depth + 1):
            these = depths <= depth
            rates.append(best_rate(worths[these], counts[these], requests, costs, depth))
        return rates

    def _best(self, requests: int, costs: CostTable) -> int:
        none, *drafting = self.rates(requests, costs)
        best = int(np.argmax(drafting))
        return best + 1 if drafting[best] > MARGIN * none else 0
