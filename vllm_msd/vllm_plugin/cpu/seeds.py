"""Seeded requests under draft trees: the same draws as without speculation, in any company.

A request's generator gives one draw to each token. The token after a node of depth d is the d-th
from now, so all nodes of that depth get the d-th draw from now, and the generator moves on by as
many draws as tokens were accepted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch


class DrawsByDepth:
    """The generators of one step's nodes.

    Attributes:
        of_rows: a generator for each node of a seeded request, by its row of logits.
    """

    def __init__(
        self,
        generators: Mapping[int, torch.Generator],
        row_start: Sequence[int],
        depths: Sequence[int],
        draw: Callable[[torch.Generator], object],
    ) -> None:
        """Find the state of each request's generator after every number of draws.

        Args:
            generators: of the seeded ones of R requests, by their number.
            row_start: ``[R + 1]`` first node of each request among the L nodes.
            depths: ``[L]`` of the nodes, 0 at the roots.
            draw: draws for one token.
        """
        self._requests = generators
        self._states: dict[int, list[torch.Tensor]] = {}
        self.of_rows: dict[int, torch.Generator] = {}
        for request, generator in generators.items():
            rows = range(row_start[request], row_start[request + 1])
            states = self._states[request] = [generator.get_state()]
            ahead = _copy(generator, states[0])
            for _ in range(max(depths[row] for row in rows) + 1):
                draw(ahead)
                states.append(ahead.get_state())
            for row in rows:
                self.of_rows[row] = _copy(generator, states[depths[row]])

    def settle(self, num_tokens: Sequence[int]) -> None:
        """Move each request's generator on by the tokens it got, ``[R]`` in all."""
        for request, generator in self._requests.items():
            generator.set_state(self._states[request][num_tokens[request]])


def _copy(generator: torch.Generator, state: torch.Tensor) -> torch.Generator:
    return torch.Generator(device=generator.device).set_state(state)
