"""Costs that follow what steps really take.

A table is made once, in a few seconds: perhaps while the machine was busy, and with short contexts.
So every step is set against it. What counts for a choice is how sizes compare, so the factors are
kept by size: by requests, and by drafted nodes of a request.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vllm_msd.budget.costs import GREEDY, CostTable

Array = NDArray[np.float64]

REQUESTS = np.array([1.0, 4.0, 16.0, 64.0])  # a step belongs to the nearest, in proportion
NODES = np.array([0.0, 1.5, 4.0, 8.0, 16.0])  # of a request; factors are linear between these
HALF_LIFE = 128  # steps after which evidence counts half
GENERAL_WEIGHT = 1.0  # steps that count for what all sizes have in common, at each size
LARGEST = 3.0  # a step further off than that was disturbed


class LearnedCosts:
    """A cost table and how far its entries are off, by what was observed; see the module.

    Stands in for the table wherever a rule asks what a step costs.

    Args:
        table: as measured.
        way: of drawing. What it adds to each row is part of a step, and of what is learned.
    """

    def __init__(self, table: CostTable, way: str = GREEDY) -> None:
        self.table = table
        self._row_seconds = table.row_seconds(way)
        self._weight = np.zeros((len(REQUESTS), len(NODES)))
        self._total = np.zeros_like(self._weight)  # of the logarithms of the factors
        self._logs = np.zeros_like(self._weight)
        self._drafting = [0.0, 0.0]  # weight, total

    def step_seconds(self, requests: int, rows: ArrayLike) -> Array:
        """As the table's."""
        nodes = np.asarray(rows, dtype=float) / max(requests, 1) - 1
        factor = np.exp(np.interp(nodes, NODES, self._logs[_group(requests)]))
        return self._told(requests, rows) * factor

    def draft_seconds(self, requests: int, rows: ArrayLike, depth: int) -> Array:
        """As the table's."""
        weight, total = self._drafting
        factor = np.exp(total / (weight + GENERAL_WEIGHT))
        return self.table.draft_seconds(requests, rows, depth) * factor

    def observe_step(self, requests: int, rows: int, seconds: float) -> None:
        """Learn from a step of the target that only decoded, drafting not counted.

        Args:
            requests, rows: of the step.
            seconds: it took.
        """
        found = _log_ratio(seconds, float(self._told(requests, rows)))
        nodes = np.clip(rows / requests - 1, NODES[0], NODES[-1])
        share = np.array([np.interp(nodes, NODES, unit) for unit in np.eye(len(NODES))])
        fade = 0.5 ** (1 / HALF_LIFE)
        self._weight *= fade
        self._total *= fade
        self._weight[_group(requests)] += share
        self._total[_group(requests)] += found * share
        everywhere = self._total.sum() / (self._weight.sum() + GENERAL_WEIGHT)
        weight, total = (x.sum(1, keepdims=True) for x in (self._weight, self._total))
        general = (total + GENERAL_WEIGHT * everywhere) / (weight + GENERAL_WEIGHT)
        self._logs = (self._total + GENERAL_WEIGHT * general) / (self._weight + GENERAL_WEIGHT)

    def observe_draft(self, requests: int, rows: int, depth: int, seconds: float) -> None:
        """Learn from a drafting of ``depth`` levels, at least 1, after a step of ``rows`` rows."""
        expected = float(self.table.draft_seconds(requests, rows, depth))
        fade = 0.5 ** (1 / HALF_LIFE)
        weight, total = self._drafting
        found = _log_ratio(seconds, expected)
        self._drafting = [fade * weight + 1, fade * total + found]

    def _told(self, requests: int, rows: ArrayLike) -> Array:
        """Seconds of a step by the table."""
        drawing = self._row_seconds * np.asarray(rows, dtype=float)
        return self.table.step_seconds(requests, rows) + drawing


def _group(requests: int) -> int:
    return int(np.abs(np.log(REQUESTS / max(requests, 1))).argmin())


def _log_ratio(seconds: float, expected: float) -> float:
    ratio = max(seconds, 1e-9) / max(expected, 1e-9)
    return float(np.log(np.clip(ratio, 1 / LARGEST, LARGEST)))
