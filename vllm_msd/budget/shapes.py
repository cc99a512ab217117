"""A chain or a tree: decided once, at start, from costs and the draft's prior.

A prefix of a best-first tree accepts at least as much as a chain of its size, and drafting it costs
more. How much more is in the cost table; how much it brings is estimated from a draft's acceptance
by depth (`usual`).
"""

import math
from collections.abc import Sequence

import numpy as np

from vllm_msd.budget.costs import CostTable
from vllm_msd.budget.rule import best_rate
from vllm_msd.budget.usual import expected_tree
from vllm_msd.tree.config import TreeConfig

AUTO = "auto"  # what users write in the place of a number of tokens

COMPARED_AT = (1, 4, 16)  # requests


def choose_shape(
    candidates: Sequence[tuple[TreeConfig, CostTable]], by_depth: Sequence[float]
) -> TreeConfig:
    """The one with the highest expected rate, in the geometric mean over a few batch sizes.

    Args:
        candidates: shapes with what they cost; the first one wins a tie.
        by_depth: see `expected_tree`.
    """

    def score(candidate: tuple[TreeConfig, CostTable]) -> float:
        shape, costs = candidate
        chances, depths = expected_tree(shape, by_depth)
        total = 0.0
        for requests in COMPARED_AT:
            rates = []
            for depth in range(shape.depth + 1):
                nodes = chances[depths <= depth]
                counts = np.full(len(nodes), float(requests))
                rates.append(best_rate(nodes, counts, requests, costs, depth))
            total += math.log(max(rates))
        return total

    return max(candidates, key=score)[0]
