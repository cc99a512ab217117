"""What a node is worth: how likely it is to be accepted, learned from what was accepted.

The draft's own probability of a node (the product along its path) says which of two nodes is more
likely to be accepted, not how likely. A small monotone map, one value for each of a few ranges of
path probability, is set against what the target accepted; between ranges it is linear.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vllm_msd.errors import ConfigError

Array = NDArray[np.float64]

EDGES = np.array(
    [0, 1e-4, 1e-3, 3e-3, 0.01, 0.03, 0.06, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1]
)
CENTERS = (EDGES[1:] + EDGES[:-1]) / 2
PRIOR_WEIGHT = 4.0  # verified nodes that the prior counts for in each range
SCALE_WEIGHT = 4.0  # accepted nodes that the prior counts for as a whole
HALF_LIFE = 512  # verified nodes after which evidence counts half

# Where a draft's config says nothing: a chain's share of accepted tokens at each depth.
USUAL_BY_DEPTH = tuple(0.75**depth for depth in range(1, 11))


@dataclass(frozen=True)
class AcceptancePrior:
    """What is known of a draft before it has run here; ``msd_acceptance`` of its config.

    Attributes:
        by_depth: ``[D]`` share of verifications of a chain that accept at least 1, 2, ... tokens.
        by_probability: ``(path probability, share accepted)`` rising, or empty: taken at its word.
    """

    by_depth: tuple[float, ...] = USUAL_BY_DEPTH
    by_probability: tuple[tuple[float, float], ...] = ()

    def __post_init__(self) -> None:
        numbers = [*self.by_depth, *(x for pair in self.by_probability for x in pair)]
        known = [p for p, _ in self.by_probability]
        if not self.by_depth or not all(0 <= x <= 1 for x in numbers) or known != sorted(known):
            raise ConfigError(
                f"msd_acceptance: got by_depth {list(self.by_depth)} and by_probability "
                f"{[list(pair) for pair in self.by_probability]}, expected shares from 0 to 1, and "
                "pairs of a rising path probability and a share."
            )

    @classmethod
    def from_config(cls, value: Any) -> "AcceptancePrior":
        """From ``{"by_depth": [...], "by_probability": [[p, accepted], ...]}``; None: the usual.

        Raises:
            ConfigError: the value is none of these.
        """
        if value is None:
            return cls()
        if not isinstance(value, Mapping):
            raise ConfigError(f"msd_acceptance: got {value!r}, expected a table (JSON object).")
        try:
            pairs = tuple((float(p), float(a)) for p, a in value.get("by_probability") or ())
            by_depth = tuple(map(float, value.get("by_depth") or USUAL_BY_DEPTH))
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"msd_acceptance: got {dict(value)!r}, expected lists of numbers by_depth and of "
                "pairs by_probability."
            ) from error
        return cls(by_depth, pairs)

    def worth(self, probability: ArrayLike) -> Array:
        """Share accepted at path probabilities, the same shape."""
        p = np.asarray(probability, dtype=float)
        if not self.by_probability:
            return p
        x, y = zip(*self.by_probability, strict=True)
        return np.interp(p, x, np.maximum.accumulate(y))


USUAL = AcceptancePrior()


class Calibration:
    """The map from path probability to the chance of being accepted, learned as it goes.

    A range of few nodes follows the prior, scaled by how much more or less was accepted in all than
    the prior says. Old evidence fades: a node counts half once `HALF_LIFE` others were verified
    after it.
    """

    def __init__(self, prior: AcceptancePrior = USUAL) -> None:
        self._prior = prior.worth(CENTERS)
        self._seen = np.zeros(len(CENTERS))
        self._accepted = np.zeros(len(CENTERS))
        self._values = _rising(self._prior, np.ones(len(CENTERS)))

    def observe(self, probabilities: ArrayLike, accepted: ArrayLike) -> None:
        """Learn from verified nodes.

        Args:
            probabilities: ``[n]`` their path probabilities.
            accepted: ``[n]`` bool, whether each lay on the accepted path.
        """
        p = np.asarray(probabilities, dtype=float)
        if not len(p):
            return
        bins = np.clip(np.searchsorted(EDGES, p, side="right") - 1, 0, len(CENTERS) - 1)
        fade = 0.5 ** (len(p) / HALF_LIFE)
        hits = np.asarray(accepted, dtype=float)
        self._seen = fade * self._seen + np.bincount(bins, minlength=len(CENTERS))
        self._accepted = fade * self._accepted + np.bincount(bins, hits, len(CENTERS))
        said = float(self._seen @ self._prior)
        scale = (self._accepted.sum() + SCALE_WEIGHT) / (said + SCALE_WEIGHT)
        weights = self._seen + PRIOR_WEIGHT
        prior = np.minimum(scale * self._prior, 1.0)
        self._values = _rising((self._accepted + PRIOR_WEIGHT * prior) / weights, weights)

    def worth(self, probabilities: ArrayLike) -> Array:
        """Chance of being accepted at any path probabilities, the same shape; 0 at 0."""
        p = np.asarray(probabilities, dtype=float)
        return np.where(p > 0, np.interp(p, CENTERS, self._values), 0.0)


def _rising(values: Array, weights: Array) -> Array:
    """The nearest rising sequence by weighted squares (pool adjacent violators)."""
    blocks: list[list[float]] = []  # value, weight, count
    for value, weight in zip(values, weights, strict=True):
        blocks.append([value, weight, 1])
        while len(blocks) > 1 and blocks[-2][0] >= blocks[-1][0]:
            last, before = blocks.pop(), blocks[-1]
            total = before[1] + last[1]
            before[0] = (before[0] * before[1] + last[0] * last[1]) / total
            before[1], before[2] = total, before[2] + last[2]
    return np.repeat([block[0] for block in blocks], [int(block[2]) for block in blocks])
