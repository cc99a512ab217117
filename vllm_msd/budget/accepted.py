"""How many tokens a verification accepts, by how many of a tree's nodes are verified.

All that is seen is how many nodes a request had verified and how many tokens it accepted, which is
a depth. A draft's prior says how likely a tree's first n nodes hold the right one at each depth,
given that they do one above. What is accepted scales that, depth by depth; other sizes follow by
the same factors. For chains this is the plain share of accepted tokens at each place. How a tree's
sizes stand to each other is learned too, but slowly, from what each was seen to accept itself.
"""

import numpy as np
from numpy.typing import NDArray

from vllm_msd.budget.usual import expected_tree
from vllm_msd.budget.worth import USUAL, AcceptancePrior
from vllm_msd.tree.config import TreeConfig

Array = NDArray[np.float64]

PRIOR_WEIGHT = 4.0  # accepted tokens that the prior counts for, at each depth and in all
HALF_LIFE = 256  # verifications that reach a depth, after which evidence there counts half
OWN_WEIGHT = 16.0  # accepted tokens that a size's relation to the others counts for, at each depth
OWN_HALF_LIFE = 8192  # verifications of that size
LEAST = 0.01  # a prior of zero could never be corrected


class AcceptedTokens:
    """Expected accepted tokens of one shape of trees, learned as it goes.

    Evidence at a depth fades by newer evidence at that depth alone: what is no longer tried keeps
    what was last known of it.

    Args:
        shape: the largest tree (or chain); others are its first nodes, best-first.
        prior: what to expect before anything was verified.
    """

    def __init__(self, shape: TreeConfig, prior: AcceptancePrior = USUAL) -> None:
        chances, depths = expected_tree(shape, prior.by_depth)
        at_depth = depths[:, None] == np.arange(1, shape.depth + 1)
        reached = np.zeros((len(chances) + 1, shape.depth))
        reached[1:] = np.cumsum(np.where(at_depth, chances[:, None], 0.0), axis=0)
        above = np.concatenate([np.ones((len(reached), 1)), reached[:, :-1]], axis=1)
        ratios = np.clip(reached / np.maximum(above, 1e-9), LEAST, 1.0)
        present = np.zeros(reached.shape, dtype=bool)
        present[1:] = np.cumsum(at_depth, axis=0) > 0
        # [nodes, depth]: accepted at a depth, of those accepted one above; 0 where no node lies.
        self._ratios = np.where(present, ratios, 0.0)
        self._seen = np.zeros((len(reached), shape.depth + 1))
        self._trials, self._expected, self._hits = (np.zeros(shape.depth) for _ in range(3))
        # Of each size by itself: a chain's places are the same in all sizes.
        self._usual, self._is_chain = self._ratios, shape.is_chain
        self._own_expected, self._own_hits = (np.zeros(reached.shape) for _ in range(2))

    def observe(self, nodes: int, accepted: int) -> None:
        """Take note of one verification: of so many nodes, so many tokens accepted."""
        self._seen[min(nodes, len(self._seen) - 1), min(accepted, self._seen.shape[1] - 1)] += 1

    def learn(self) -> tuple[float, float]:
        """Learn from what was noted since the last call.

        Returns:
            tokens accepted in those verifications, and how many were expected before.
        """
        seen, depth = self._seen, self._seen.shape[1] - 1
        accepted = float(seen.sum(0) @ np.arange(depth + 1))
        expected = float(seen.sum(1) @ self.of_all())
        # Verifications of n nodes that accepted at least 0, 1, ... tokens, [nodes, depth + 1].
        reached = seen[:, ::-1].cumsum(1)[:, ::-1]
        present = self._ratios > 0
        tried, right = reached[:, :-1] * present, reached[:, 1:] * present
        trials = tried.sum(0)
        fade = 0.5 ** (trials / HALF_LIFE)
        self._trials = fade * self._trials + trials
        self._expected = fade * self._expected + (tried * self._ratios).sum(0)
        self._hits = fade * self._hits + right.sum(0)
        self._seen = np.zeros_like(seen)
        if not self._is_chain:
            fade = 0.5 ** (tried / OWN_HALF_LIFE)
            said = np.minimum(self._usual * self._scales(), 1.0)
            self._own_expected = fade * self._own_expected + tried * said
            self._own_hits = fade * self._own_hits + right
            own = (self._own_hits + OWN_WEIGHT) / (self._own_expected + OWN_WEIGHT)
            self._ratios = np.minimum(self._usual * own, 1.0)
        return accepted, expected

    def forget(self, trials: float) -> None:
        """Let evidence at each depth count for no more than so many verifications, above 0."""
        share = np.minimum(1.0, trials / np.maximum(self._trials, trials))
        for evidence in (self._trials, self._expected, self._hits):
            evidence *= share

    def of_all(self) -> Array:
        """Expected accepted tokens by nodes verified, from 0 to all: ``[nodes + 1]``, rising."""
        by_depth = np.minimum(self._ratios * self._scales(), 1.0).cumprod(axis=1)
        return np.maximum.accumulate(by_depth.sum(axis=1))

    def _scales(self) -> Array:
        """By how much more than the prior says is accepted at each depth, ``[depth]``."""
        usual = (self._hits.sum() + PRIOR_WEIGHT) / (self._expected.sum() + PRIOR_WEIGHT)
        return (self._hits + PRIOR_WEIGHT * usual) / (self._expected + PRIOR_WEIGHT)
