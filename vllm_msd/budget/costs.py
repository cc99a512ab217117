"""What a step costs: seconds of the target by requests and rows, of the draft by requests.

That is with greedy requests; each row that is drawn from costs more, by the way of drawing.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vllm_msd.storage import write_json

FORMAT = 2
GREEDY = "greedy"
Array = NDArray[np.float64]
T = TypeVar("T")


@dataclass(frozen=True)
class Curve:
    """Seconds over a count, linear between measured points and beyond them, never falling.

    Attributes:
        counts: ``[P]`` rising, P at least 1.
        seconds: ``[P]``.
    """

    counts: Array
    seconds: Array

    @classmethod
    def through(cls, points: Iterable[tuple[float, float]]) -> "Curve":
        """Through ``(count, seconds)`` in any order; a larger count never costs less.

        Raises:
            ValueError: no points, or a number that is none.
        """
        best: dict[float, float] = {}
        for count, seconds in points:  # of several measurements the quickest: the rest was noise
            best[count] = min(seconds, best.get(count, np.inf))
        counts = np.array(sorted(best), dtype=float)
        values = np.array([best[count] for count in counts], dtype=float)
        if not len(counts) or not np.isfinite([*counts, *values]).all() or (values < 0).any():
            raise ValueError(f"costs: got {best}, expected counts with seconds")
        return cls(counts, np.maximum.accumulate(values))

    def at(self, count: ArrayLike) -> Array:
        """Seconds at any counts, the same shape."""
        x = np.asarray(count, dtype=float)
        inside = np.interp(x, self.counts, self.seconds)
        return inside + self.slope * np.maximum(x - self.counts[-1], 0)

    @property
    def slope(self) -> float:
        """Seconds of one more beyond the last point: that of the last two; 0 for a single one."""
        if len(self.counts) == 1:
            return 0.0
        run = self.counts[-1] - self.counts[-2]
        return float((self.seconds[-1] - self.seconds[-2]) / run)

    def with_slope(self, slope: float) -> "Curve":
        """A curve of a single point, which goes on from there at ``slope`` seconds for each."""
        counts = np.append(self.counts, self.counts[-1] + 1)
        return Curve(counts, np.append(self.seconds, self.seconds[-1] + slope))


@dataclass(frozen=True)
class CostTable:
    """Measured or computed costs of one machine, model and shape of trees, in seconds.

    Attributes:
        step: ``(requests, rows, seconds)`` of a step of the target with that many requests and
            rows in all, sampling and what is around it included, drafting not.
        prefill: ``(rows, seconds)`` of the draft over a step's rows, its first logits included.
        level: ``(requests, seconds)`` of one more level of the draft.
        drawing: ``(way, seconds)`` that a row of the step costs more where it is drawn so.
        row: seconds that each row costs beside ``step``; not kept in files. See `drawn`.
    """

    step: tuple[tuple[int, int, float], ...]
    prefill: tuple[tuple[int, float], ...]
    level: tuple[tuple[int, float], ...]
    drawing: tuple[tuple[str, float], ...] = ()
    row: float = 0.0

    def __post_init__(self) -> None:
        if not self.step:
            raise ValueError("costs: got no steps, expected some (requests, rows, seconds)")
        if any(not 0 <= seconds < np.inf for _, seconds in self.drawing):
            raise ValueError(f"costs: got {self.drawing}, expected ways of drawing with seconds")
        _ = self._step, self._prefill, self._level  # refuses what is no number

    @cached_property
    def _step(self) -> list[tuple[int, Curve]]:
        by_requests: dict[int, list[tuple[float, float]]] = {}
        for requests, rows, seconds in self.step:
            by_requests.setdefault(requests, []).append((rows, seconds))
        curves: list[tuple[int, Curve]] = []
        for requests in sorted(by_requests):
            curve = Curve.through(by_requests[requests])
            # There may have been time for one point. A row costs no less than with fewer requests.
            if len(curve.counts) == 1 and curves:
                curve = curve.with_slope(curves[-1][1].slope)
            curves.append((requests, curve))
        return curves

    @cached_property
    def _prefill(self) -> Curve:
        return Curve.through(self.prefill)

    @cached_property
    def _level(self) -> Curve:
        return Curve.through(self.level)

    def step_seconds(self, requests: int, rows: ArrayLike) -> Array:
        """Seconds of a step of the target; ``rows``: in all, the same shape comes back."""
        below = max((i for i, (r, _) in enumerate(self._step) if r <= requests), default=0)
        low, curve = self._step[below]
        seconds = curve.at(rows)
        if below + 1 < len(self._step) and low < requests:
            high, other = self._step[below + 1]
            share = (requests - low) / (high - low)
            seconds = (1 - share) * seconds + share * other.at(rows)
        return seconds + self.row * np.asarray(rows, dtype=float)

    def draft_seconds(self, requests: int, rows: ArrayLike, depth: int) -> Array:
        """Seconds of drafting ``depth`` levels after a step of ``rows`` rows; 0 for depth 0."""
        if depth == 0:
            return np.zeros_like(np.asarray(rows, dtype=float))
        return self._prefill.at(rows) + (depth - 1) * self._level.at(requests)

    def drawn(self, way: str) -> "CostTable":
        """With what a row costs more where it is drawn so: nothing where that was not measured."""
        return replace(self, row=dict(self.drawing).get(way, 0.0))

    def gist(self) -> str:
        """The table in a few words, in milliseconds."""
        steps = []
        for requests in (1, 4, 16):
            one, five = (1e3 * float(self.step_seconds(requests, requests * n)) for n in (1, 5))
            steps.append(f"{requests}: {one:.1f} and {five:.1f}")
        level = 1e3 * float(self._level.at(1))
        drawing = [f"{way} {1e3 * seconds:.2f}" for way, seconds in self.drawing]
        return (
            f"a step of 1 and of 5 rows each, ms by requests: {', '.join(steps)}; a level of the "
            f"draft {level:.1f}" + (f"; more for a row {', '.join(drawing)}" if drawing else "")
        )

    def to_dict(self) -> dict[str, Any]:
        """As lists of numbers."""
        return {name: [list(point) for point in getattr(self, name)] for name in _FIELDS}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "CostTable":
        """From `to_dict`; drawing may be missing.

        Raises:
            ValueError, TypeError, KeyError: these are no costs.
        """
        known = {"drawing": (), **values}
        step, prefill, level, drawing = (tuple(map(tuple, known[name])) for name in _FIELDS)
        return cls(step, prefill, level, drawing)

    def save(self, path: Path, key: Mapping[str, Any]) -> None:
        """Write the table with what it holds for: ``key`` names machine, model, versions, ..."""
        write_json(path, {"format": FORMAT, "key": dict(key), **self.to_dict()})

    @classmethod
    def load(cls, path: Path, key: Mapping[str, Any]) -> "CostTable | None":
        """The table of a file, see `load_table`."""
        return load_table(path, FORMAT, key, cls.from_dict)


_FIELDS = ("step", "prefill", "level", "drawing")


def load_table(
    path: Path, form: object, key: Mapping[str, Any], read: Callable[[dict[str, Any]], T]
) -> T | None:
    """The costs of a file; None where there are none of this form and ``key``.

    A damaged file counts as none: it is a cache, and is measured and written again.

    Args:
        path: of the file.
        form: its ``format``.
        key: what the costs must hold for.
        read: makes them of the file's values; may raise ValueError, TypeError, KeyError.
    """
    try:
        values = json.loads(path.read_text())
        if values["format"] != form or values["key"] != dict(key):
            return None
        return read(values)
    except (OSError, ValueError, TypeError, KeyError):
        return None
