"""A line in the log, now and then, about what the budget allowed.

For people who read the log; `drafted_nodes.py` has the same for Prometheus.
"""

import time
from collections.abc import Callable, Sequence


class Tally:
    """Counts steps, and tells about them every so many seconds.

    Args:
        tell: takes the line.
        interval: seconds between two lines.
        clock: seconds now.
    """

    def __init__(
        self,
        tell: Callable[[str], None],
        interval: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._tell, self._interval, self._clock = tell, interval, clock
        self._begin()

    def _begin(self) -> None:
        self._next = self._clock() + self._interval
        self._steps = self._drafting = self._requests = self._drafted = self._allowed = 0

    def add(self, nodes: int, lengths: Sequence[int]) -> None:
        """Count a step that drafted ``nodes`` for each request; ``lengths``: the nodes allowed."""
        self._steps += 1
        if nodes:
            self._drafting += 1
            self._requests += len(lengths)
            self._drafted += nodes * len(lengths)
            self._allowed += sum(lengths)
        if self._clock() < self._next:
            return
        line = f"MSD drafted in {self._drafting} of {self._steps} steps"
        if self._requests:
            drafted, allowed = self._drafted / self._requests, self._allowed / self._requests
            line += f": {drafted:.1f} nodes a request, of which {allowed:.1f} were to be verified"
        self._tell(line + ".")
        self._begin()
