"""What whole steps cost where every request has the same number of nodes verified."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vllm_msd.budget.costs import Curve, load_table
from vllm_msd.storage import write_json

FORMAT = "sizes 1"
Array = NDArray[np.float64]


def candidate_sizes(nodes: int, most: int = 6) -> list[int]:
    """Numbers of nodes to choose from, rising: none, one, a whole tree, and some between.

    Those between lie as far apart as factors: 60 nodes give 0, 1, 3, 8, 22 and 60.

    Args:
        nodes: of the whole tree.
        most: how many sizes at most, from 2 on: each has CUDA graphs of its own.
    """
    parts = most - 2
    return sorted({0, nodes, *(round(nodes ** (part / parts)) for part in range(parts))})


@dataclass(frozen=True)
class SizeCosts:
    """Seconds of steps of one machine, model and shape of trees.

    Attributes:
        points: ``(requests, nodes, seconds)``: a step in which each request has so many nodes
            verified, and drafts as many for the next step. Everything is in it: the target,
            sampling, the draft's prefill and its levels.
    """

    points: tuple[tuple[int, int, float], ...]

    def __post_init__(self) -> None:
        for nodes in {0, *(nodes for _, nodes, _ in self.points)}:
            self._curve(nodes)  # refuses what is no number, and costs without those of no nodes

    def seconds(self, requests: ArrayLike, sizes: Sequence[int]) -> Array:
        """Seconds of a step, linear between measured numbers of requests.

        Beyond the most requests measured with a size it is taken to cost as much more as there are
        more requests, which no step does; steps without nodes go on as they did. So what was not
        measured never looks better than it is. A size that was not measured at all costs infinity.

        Args:
            requests: ``[B]`` integers from 1 on.
            sizes: C numbers of nodes.

        Returns:
            ``[B, C]``.
        """
        asked = np.asarray(requests, dtype=float)
        columns = []
        for nodes in sizes:
            if not any(n == nodes for _, n, _ in self.points):
                columns.append(np.full(len(asked), np.inf))
                continue
            curve = self._curve(nodes)
            seconds = curve.at(asked)
            if nodes:
                seconds = np.where(
                    asked > curve.counts[-1],
                    curve.seconds[-1] * asked / curve.counts[-1],
                    seconds,
                )
            columns.append(seconds)
        return np.stack(columns, axis=1)

    def _curve(self, nodes: int) -> Curve:
        return Curve.through((r, s) for r, n, s in self.points if n == nodes)

    def gist(self) -> str:
        """The table in a few words, in milliseconds."""
        most = max(nodes for _, nodes, _ in self.points)
        asked = [r for r in (1, 4, 16, 64) if r <= max(r for r, _, _ in self.points)]
        table = 1e3 * self.seconds(asked, [0, most])
        words = (f"{r}: {a:.1f} and {b:.1f}" for r, (a, b) in zip(asked, table, strict=True))
        return f"a step without drafts and with {most} each, ms by requests: {', '.join(words)}"

    def save(self, path: Path, key: Mapping[str, Any]) -> None:
        """Write the table with what it holds for: ``key`` names machine, model, versions, ..."""
        write_json(path, {"format": FORMAT, "key": dict(key), "points": self.points})

    @classmethod
    def load(cls, path: Path, key: Mapping[str, Any]) -> "SizeCosts | None":
        """The table of a file, see `load_table`."""
        return load_table(path, FORMAT, key, lambda values: cls.of(values["points"]))

    @classmethod
    def of(cls, points: Iterable[Iterable[Any]]) -> "SizeCosts":
        """From ``(requests, nodes, seconds)`` of any kind.

        Raises:
            ValueError, TypeError: these are no costs, or none of steps without nodes.
        """
        return cls(tuple((int(r), int(n), float(s)) for r, n, s in points))
