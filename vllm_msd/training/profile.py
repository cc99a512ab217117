"""The acceptance profile of a draft, which its config carries as ``msd_acceptance``.

A scheduler that has not seen the draft yet starts from it: how often a chain gets so deep, and how
often a node is accepted that the draft gives so much probability.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

# Lower ends of the ranges of path probability.
RANGES = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.97)
# What drafting one more token and checking it costs, in passes of the target. A draft of a 7B model
# takes 0.05 (LLaVA-1.5) to 0.11 (Qwen2-VL) by arithmetic (`vllm_msd.roofline`).
LEVEL_COST = 0.1
# Fewer verifications say too little, and so does a range of fewer nodes.
MIN_VERIFICATIONS, MIN_NODES = 50, 10


def preferred_tokens(by_depth: Sequence[float]) -> int:
    """How many tokens a chain had best draft: the most tokens for what they cost.

    A verification gives ``1 + sum(by_depth[:d])`` tokens and takes ``1 + LEVEL_COST d``.

    Args:
        by_depth: see `acceptance_profile`; at least one share. What is deeper was not measured.
    """
    tokens, best, best_rate = 1.0, 1, 0.0
    for depth, share in enumerate(by_depth, 1):
        tokens += share
        rate = tokens / (1 + LEVEL_COST * depth)
        if rate > best_rate:
            best, best_rate = depth, rate
    return best


def _zeros() -> list[float]:
    return [0.0] * len(RANGES)


@dataclass
class NodeCounts:
    """Drafted nodes by range of path probability: how many, the sum of it, and how many accepted.

    A node's path probability is the draft's own, of all tokens from the root to it.
    """

    nodes: list[float] = field(default_factory=_zeros)
    probability: list[float] = field(default_factory=_zeros)
    accepted: list[float] = field(default_factory=_zeros)

    def add(self, probability: float, is_accepted: bool) -> None:
        """Count one node."""
        place = max(i for i, low in enumerate(RANGES) if probability >= low)
        self.nodes[place] += 1
        self.probability[place] += probability
        self.accepted[place] += is_accepted

    def join(self, other: "NodeCounts") -> None:
        """Add another's counts."""
        for mine, theirs in (
            (self.nodes, other.nodes),
            (self.probability, other.probability),
            (self.accepted, other.accepted),
        ):
            mine[:] = [a + b for a, b in zip(mine, theirs, strict=True)]

    def table(self) -> list[list[float]]:
        """Pairs of mean path probability and share accepted, both rising.

        Neighbouring ranges that fall are joined (isotonic regression, by pooling).
        """
        pools: list[list[float]] = []
        for counts in zip(self.nodes, self.probability, self.accepted, strict=True):
            if counts[0] < MIN_NODES:
                continue
            pools.append(list(counts))
            while len(pools) > 1 and pools[-2][2] * pools[-1][0] >= pools[-1][2] * pools[-2][0]:
                last = pools.pop()
                pools[-1] = [a + b for a, b in zip(pools[-1], last, strict=True)]
        return [[round(p / n, 4), round(a / n, 4)] for n, p, a in pools]


def acceptance_profile(
    verifications: int, accepted_at: list[int], counts: NodeCounts
) -> dict[str, Any] | None:
    """The value of ``msd_acceptance``, or None where too few verifications were counted.

    Args:
        verifications: of chains.
        accepted_at: by depth, how many of them accepted so many tokens or more.
        counts: of the chains' nodes.

    Returns:
        ``by_depth``: share of verifications that accept 1, 2, ... tokens or more.
        ``by_probability``: see `NodeCounts.table`.
    """
    if verifications < MIN_VERIFICATIONS or not accepted_at:
        return None
    shares = [round(count / verifications, 4) for count in accepted_at]
    return {"by_depth": shares, "by_probability": counts.table()}
