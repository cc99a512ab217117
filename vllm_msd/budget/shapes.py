"""A chain or a tree: decided once, at start, from costs and the draft's prior.

A prefix of a best-first tree accepts at least as much as a chain of its size, and drafting it costs
more. How much more is in the cost table; how much it brings is estimated from a draft's acceptance
by depth, with the other children as likely as they usually are.
"""

import heapq
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vllm_msd.budget.costs import CostTable
from vllm_msd.budget.rule import best_rate
from vllm_msd.tree.config import TreeConfig

AUTO = "auto"  # what users write in the place of a number of tokens

# Where the first child is wrong, the second, third, ... is right this often (of those times).
OTHERS = (0.45, 0.2, 0.1, 0.06, 0.04, 0.03, 0.02, 0.02, 0.01)
COMPARED_AT = (1, 4, 16)  # requests


def expected_tree(
    shape: TreeConfig, by_depth: Sequence[float]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Chances of being accepted and depths of a usual tree's nodes, best-first, both ``[nodes]``.

    Args:
        shape: of the tree.
        by_depth: ``[D]`` share of a chain's verifications that accept at least 1, 2, ... tokens;
            deeper than that the last ratio goes on.
    """
    ratios = [b / a if a else 0.0 for a, b in zip((1.0, *by_depth), by_depth, strict=False)]
    open_nodes = [(-1.0, 0)]  # minus the chance, depth
    chances: list[float] = []
    depths: list[int] = []
    while open_nodes and len(chances) < shape.num_nodes + 1:
        minus, depth = heapq.heappop(open_nodes)
        chances.append(-minus)
        depths.append(depth)
        if depth < shape.depth:
            first = min(ratios[min(depth, len(ratios) - 1)], 1.0)
            children = [first, *((1 - first) * share for share in OTHERS)][: shape.top_k]
            for chance in children:
                heapq.heappush(open_nodes, (minus * chance, depth + 1))
    return np.array(chances[1:]), np.array(depths[1:], dtype=np.int64)


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
