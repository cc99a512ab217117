"""Rows that the draft has not read yet, because nothing was drafted when they came.

Where drafting does not pay, the draft's own pass over a step's rows is left out too. What it would
have read is kept, and read in one go when drafting resumes: its weights are then read once instead
of in every step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MAX_BYTES = 64 << 20  # of hidden states


@dataclass
class Owed:
    """Rows of one request, ``[n]`` in a row from position ``first`` on.

    Attributes:
        first: position of the first.
        tokens: ``[n]`` int64 the token behind each row, which the draft reads with it.
        hidden: ``[n, H]`` the target's hidden states.
    """

    first: int
    tokens: Tensor
    hidden: Tensor

    @property
    def end(self) -> int:
        """The position behind the last."""
        return self.first + len(self.tokens)


class Backlog:
    """The owed rows of all requests, at most ``capacity`` in all.

    Args:
        max_rows: how many the draft can read in one pass.
        row_bytes: of one hidden state.
    """

    def __init__(self, max_rows: int, row_bytes: int) -> None:
        self.capacity = min(max_rows, MAX_BYTES // row_bytes)
        self.num_rows = 0
        self._owed: dict[str, Owed] = {}

    def has_room(self, rows: int) -> bool:
        """Whether as many more can be kept."""
        return self.num_rows + rows <= self.capacity

    def keep(self, req_id: str, first: int, tokens: Tensor, hidden: Tensor) -> None:
        """Keep a step's rows of one request; older ones that do not end there are forgotten.

        That is so where a request was preempted: its rows come again.
        """
        old = self._owed.get(req_id)
        if old is not None and old.end != first:
            self.drop(req_id)
            old = None
        self.num_rows += len(tokens)
        if old is None:
            self._owed[req_id] = Owed(first, tokens.clone(), hidden.clone())
        else:
            both = torch.cat([old.tokens, tokens]), torch.cat([old.hidden, hidden])
            self._owed[req_id] = Owed(old.first, *both)

    def take(self, req_ids: list[str], firsts: list[int]) -> dict[int, Owed]:
        """What some requests owe, by their number; it counts as read then.

        Args:
            req_ids: ``[R]``.
            firsts: ``[R]`` the position of each one's first row of the step.
        """
        found = {}
        for number, (req_id, first) in enumerate(zip(req_ids, firsts, strict=True)):
            owed = self._owed.get(req_id)
            if owed is not None:
                self.drop(req_id)
                if owed.end == first:
                    found[number] = owed
        return found

    def drop(self, req_id: str) -> None:
        """Forget a request."""
        owed = self._owed.pop(req_id, None)
        if owed is not None:
            self.num_rows -= len(owed.tokens)
