"""The budget of one step: which nodes of all requests are worth the rows they take.

A step of R requests yields one token each, and every verified node adds its chance of being
accepted. What counts is tokens per second of the whole step, ``(R + sum of worths) / seconds``. The
nodes of all requests compete: the most valuable are taken as long as that raises the rate, down to
none. Nodes stand best-first, so each request's share is a prefix of them.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vllm_msd.budget.costs import CostTable

Array = NDArray[np.float64]


def prefix_lengths(
    worths: Sequence[Array], costs: CostTable, depth: int = 0, at_least: int = 0
) -> list[int]:
    """How many nodes each of R requests has verified.

    Args:
        worths: for each request the worths of its nodes in their order, ``[nodes]``, possibly none.
        costs: of the machine.
        depth: levels that were drafted, and will be again.
        at_least: nodes to verify in any case, where there are as many.
    """
    requests = len(worths)
    # A node is never taken before those in front of it, whatever rounding did to its worth.
    ordered = [np.minimum.accumulate(w) if len(w) else w for w in worths]
    flat = np.concatenate(ordered) if ordered else np.zeros(0)
    owner = np.repeat(np.arange(requests), [len(w) for w in worths])
    order = np.argsort(-flat, kind="stable")
    count = best_count(flat[order], requests, costs, depth)
    count = max(count, min(at_least, int((flat > 0).sum())))
    return np.bincount(owner[order[:count]], minlength=requests).tolist()


def best_count(worths: Array, requests: int, costs: CostTable, depth: int) -> int:
    """How many of ``worths [n]``, falling, make the rate highest; the fewest at a tie."""
    tokens = requests + np.concatenate([[0.0], np.cumsum(worths)])
    rows = requests + np.arange(len(tokens))
    seconds = costs.step_seconds(requests, rows) + costs.draft_seconds(requests, rows, depth)
    return int(np.argmax(tokens / seconds))


def best_rate(worths: Array, counts: Array, requests: int, costs: CostTable, depth: int) -> float:
    """The best tokens per second of a step with nodes like these.

    Args:
        worths: ``[n]`` falling.
        counts: ``[n]`` how many nodes of the step each of them stands for.
        requests: of that step.
        costs: of the machine.
        depth: levels drafted for them.
    """
    tokens = requests + np.concatenate([[0.0], np.cumsum(counts * worths)])
    rows = requests + np.concatenate([[0.0], np.cumsum(counts)])
    seconds = costs.step_seconds(requests, rows)
    return float((tokens / (seconds + costs.draft_seconds(requests, rows, depth))).max())
