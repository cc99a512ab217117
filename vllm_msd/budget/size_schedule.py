"""How many nodes each request of a step has verified, by the number of requests.

For engines whose steps run in CUDA graphs: all requests of a step get the same size, one of a few
that graphs are there for. For each number of requests R the size n is taken that makes
``R (1 + A(n)) / seconds(R, n)`` largest, where A(n) is what is accepted of n nodes, down to none.
To stay informed, now and then a step takes the next larger size; where nothing is drafted, such
probes become rarer as long as they find nothing.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vllm_msd.budget.accepted import AcceptedTokens
from vllm_msd.budget.size_costs import SizeCosts
from vllm_msd.budget.worth import USUAL, AcceptancePrior
from vllm_msd.tree.config import TreeConfig

Array = NDArray[np.float64]

PLANNED_FOR = 16  # steps between two looks at what was accepted
MARGIN = 1.02  # a gain below 2 % is less than what the costs are known to
PROBE_EVERY = 128  # steps, while something is drafted
FIRST_PROBE, LAST_PROBE = 16, 512  # steps, while nothing is
REMEMBERED = 32.0  # verifications, where there are none now: the rest is from another time


class SizeSchedule:
    """Decides each step's size; see the module.

    Args:
        shape: the largest tree (or chain).
        sizes: numbers of nodes to choose from, rising, the first 0. Those without costs are never
            taken.
        costs: of the machine.
        most_requests: that a step has.
        prior: what to expect before anything was verified.
    """

    def __init__(
        self,
        shape: TreeConfig,
        sizes: Sequence[int],
        costs: SizeCosts,
        most_requests: int,
        prior: AcceptancePrior = USUAL,
    ) -> None:
        if list(sizes) != sorted({0, *sizes}) or len(sizes) < 2:
            raise ValueError(f"sizes: got {list(sizes)}, expected 0 and larger ones, rising")
        self.sizes = np.array(sizes)
        self.accepted = AcceptedTokens(shape, prior)
        requests = np.arange(1, most_requests + 1)
        seconds = costs.seconds(requests, sizes)
        measured = np.isfinite(seconds).all(axis=0)  # none at all always is
        self.sizes, self._seconds = self.sizes[measured], seconds[:, measured]
        self._requests = requests[:, None]
        self._chosen = np.zeros(most_requests, dtype=np.int64)  # places in `sizes`
        self._table, self._probes = self._plan()
        self._planned = PLANNED_FOR
        self._until_probe, self._interval = FIRST_PROBE, FIRST_PROBE
        self._last = 0  # nodes that a step of as many requests as the last one has, probes aside
        self._verified = False  # whether anything was, since the last look

    def table(self) -> list[int]:
        """The next step's nodes by requests, ``[most_requests + 1]``; index 0 is unused."""
        return self._probes if self._until_probe <= 0 else self._table

    def scheduled(self, requests: int, drafted: int) -> None:
        """A step of so many requests, from 1 on, has been scheduled by `table`.

        Args:
            drafted: nodes for each of them; none where nobody wants any, whatever the table says.
        """
        self._last = self._table[requests]
        if self._last != self._probes[requests]:  # else this step can be no probe
            if self._until_probe > 0:
                self._until_probe -= 1
            elif drafted:
                none = self._last == 0
                self._until_probe = self._interval if none else PROBE_EVERY
                self._interval = min(2 * self._interval, LAST_PROBE) if none else FIRST_PROBE
        self._planned -= 1
        if self._planned <= 0:
            self._planned = PLANNED_FOR
            self._look_again()

    def observe(self, nodes: int, accepted: int) -> None:
        """Take note of one request's verification, see `AcceptedTokens.observe`."""
        self._verified = True
        self.accepted.observe(nodes, accepted)

    def rates(self) -> Array:
        """Expected tokens per second by requests and size, ``[most_requests, sizes]``."""
        tokens = 1 + self.accepted.of_all()[self.sizes]
        return self._requests * tokens / self._seconds

    def ranges(self) -> list[tuple[int, int, int]]:
        """The present table as ``(first, last, nodes)`` of numbers of requests."""
        starts = [n for n in range(1, len(self._table)) if self._table[n] != self._table[n - 1]]
        starts = sorted({1, *starts})
        ends = [*(n - 1 for n in starts[1:]), len(self._table) - 1]
        return [(a, b, self._table[a]) for a, b in zip(starts, ends, strict=True)]

    def gist(self) -> str:
        """The present table in words, such as ``1-8: 16, 9-256: none``."""
        return ", ".join(
            f"{first if first == last else f'{first}-{last}'}: {nodes or 'none'}"
            for first, last, nodes in self.ranges()
        )

    def _look_again(self) -> None:
        accepted, expected = self.accepted.learn()
        if not self._verified:
            self.accepted.forget(REMEMBERED)
        self._verified = False
        if self._last == 0 and accepted > 2 * expected:  # it fits again: the next probe comes soon
            self._interval = FIRST_PROBE
            self._until_probe = min(self._until_probe, FIRST_PROBE)
        self._table, self._probes = self._plan()

    def _plan(self) -> tuple[list[int], list[int]]:
        """The table, and that of a probe's step.

        A size stays until another is better by `MARGIN`, but never below the rate of no drafts.
        """
        rates = self.rates()
        rows = np.arange(len(rates))
        best = rates.argmax(axis=1)
        own, none = rates[rows, self._chosen], rates[:, 0]
        stays = (own * MARGIN >= rates[rows, best]) & (own >= none)
        self._chosen = np.where(stays, self._chosen, best)
        # The next larger size; without drafts the one that would come first.
        probes = np.minimum(self._chosen + 1, len(self.sizes) - 1)
        if len(self.sizes) > 1:
            probes = np.where(self._chosen == 0, rates[:, 1:].argmax(axis=1) + 1, probes)
        return [0, *self.sizes[self._chosen].tolist()], [0, *self.sizes[probes].tolist()]
