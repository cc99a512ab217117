"""Where the rows of the draft's levels stand: the arithmetic of growing a tree in a paged cache."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class DraftLevels:
    """The levels of one drafting round, each of ``top_k`` rows for each of R requests.

    All rows of level l (from 0) have rotary position ``first + l``, as they lie equally deep. In
    the KV cache the levels follow each other: row j of level l stands at
    ``first + l * top_k + j``. For ``top_k`` 3::

        level            0            1            2
        rotary      5    5    5  6    6    6  7    7    7        first is 5
        KV          5    6    7  8    9   10 11   12   13

    Near the model's limit rows run past it: they get no KV slot, and no position or length beyond
    the limit. Everything is computed without reading a tensor on the host.

    Attributes:
        first: ``[R]`` int64 position behind the draft's last real row.
        num_levels: levels that are fed to the draft.
        top_k: rows of a level.
        limit: positions that a request may have (``max_model_len``).
    """

    first: Tensor
    num_levels: int
    top_k: int
    limit: int

    def rotary_positions(self, level: int) -> Tensor:
        """``[R * top_k]`` int64, below the limit."""
        return (self.first + level).clamp(max=self.limit - 1).repeat_interleave(self.top_k)

    def kv_positions(self, level: int) -> tuple[Tensor, Tensor]:
        """``[R * top_k]`` int64, below the limit; and bool, the rows past it, which get no slot."""
        row = torch.arange(level * self.top_k, (level + 1) * self.top_k, device=self.first.device)
        position = (self.first[:, None] + row).flatten()
        return position.clamp(max=self.limit - 1), position >= self.limit

    def seq_lens(self, level: int) -> Tensor:
        """``[R]`` int64, keys that a request has once the level's rows are written."""
        return (self.first + (level + 1) * self.top_k).clamp(max=self.limit)

    def tree_start(self) -> Tensor:
        """``[R]`` int32 `TreeRows.tree_start`; -1 where not every level fits below the limit."""
        last = self.first + self.num_levels * self.top_k
        return torch.where(last <= self.limit, self.first, -1).int()
