"""A usual tree: what it looks like and how likely its nodes are accepted, from a few numbers.

A draft's acceptance by depth says how often its first child is right; the other children are as
likely as they usually are.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vllm_msd.errors import ConfigError
from vllm_msd.tree.config import TreeConfig

# Where the first child is wrong, the second, third, ... is right this often (of those times).
OTHERS = (0.45, 0.2, 0.1, 0.06, 0.04, 0.03, 0.02, 0.02, 0.01)
# MSD's own tree, and the tokens per verification that others measured of it: LLaVA-1.5-7B, greedy,
# on 600 samples of six kinds (MMSpec, arXiv 2603.14989).
PAPER_TREE = TreeConfig(60, 6, 10)
PAPER_TOKENS = 4.75


@dataclass(frozen=True)
class UsualTree:
    """A tree of n nodes, best-first, without its root.

    Attributes:
        chances: ``[n]`` of being accepted.
        depths: ``[n]`` from 1 on.
        parents: ``[n]`` 0 is the root, i the i-th node.
    """

    chances: NDArray[np.float64]
    depths: NDArray[np.int64]
    parents: NDArray[np.int64]


def usual_tree(shape: TreeConfig, by_depth: Sequence[float]) -> UsualTree:
    """The most likely nodes of a usual tree.

    Args:
        shape: of the tree.
        by_depth: ``[D]`` share of a chain's verifications that accept at least 1, 2, ... tokens;
            deeper than that the last ratio goes on.
    """
    ratios = [b / a if a else 0.0 for a, b in zip((1.0, *by_depth), by_depth, strict=False)]
    open_nodes = [(-1.0, 0, 0)]  # minus the chance, depth, parent
    found: list[tuple[float, int, int]] = []
    while open_nodes and len(found) < shape.num_nodes + 1:
        minus, depth, parent = heapq.heappop(open_nodes)
        number = len(found)
        found.append((-minus, depth, parent))
        if depth < shape.depth:
            first = min(ratios[min(depth, len(ratios) - 1)], 1.0)
            children = [first, *((1 - first) * share for share in OTHERS)][: shape.top_k]
            for chance in children:
                heapq.heappush(open_nodes, (minus * chance, depth + 1, number))
    chances, depths, parents = zip(*found[1:], strict=True)
    return UsualTree(np.array(chances), np.array(depths), np.array(parents))


def expected_tree(
    shape: TreeConfig, by_depth: Sequence[float]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Chances of being accepted and depths of `usual_tree`'s nodes, both ``[nodes]``."""
    tree = usual_tree(shape, by_depth)
    return tree.chances, tree.depths


def ratio_for(tokens: float) -> float:
    """How often the draft's first choice has to be right for `PAPER_TREE` to yield so many tokens
    per verification, the target's own included.

    Raises:
        ConfigError: no draft yields that.
    """
    most = PAPER_TREE.depth + 1
    if not 1 < tokens < most:
        raise ConfigError(
            f"tokens per verification: got {tokens}, expected more than 1 and less than {most}, "
            f"which a tree {PAPER_TREE.depth} deep yields at most."
        )
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        if 1 + expected_tree(PAPER_TREE, [middle])[0].sum() < tokens:
            low = middle
        else:
            high = middle
    return (low + high) / 2
