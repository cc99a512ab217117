"""Key/value cache of the draft for a batch of requests of unequal length."""

import torch
from torch import Tensor


class DraftCache:
    """Keys and values of all draft rows so far, one column per row fed, padding included.

    Columns are shared by the batch: a request that was fed less than another one has columns marked
    not valid, which no query sees. Positions are carried by the rotated keys, so holes do no harm.

    ``keys[layer]``, ``values[layer]``: ``[B, kv_heads, C, head_dim]``, keys already rotated;
    ``valid``: ``[B, C]`` bool.
    """

    def __init__(self) -> None:
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.valid: Tensor | None = None

    @property
    def num_columns(self) -> int:
        """Columns held (C), padding included."""
        return 0 if self.valid is None else self.valid.shape[1]

    def num_tokens(self) -> Tensor:
        """Rows held per request, padding not counted: ``[B]`` int64. The next position is this."""
        if self.valid is None:
            raise RuntimeError("the cache is empty: nothing was fed through the draft yet")
        return self.valid.sum(1)

    def extend_valid(self, valid: Tensor) -> Tensor:
        """Append the validity ``[B, S]`` of new columns; returns that of all columns."""
        self.valid = valid if self.valid is None else torch.cat([self.valid, valid], 1)
        return self.valid

    def update(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append ``[B, kv_heads, S, head_dim]`` to a layer; returns its keys and values."""
        if layer == len(self.keys):
            self.keys.append(key)
            self.values.append(value)
        else:
            self.keys[layer] = torch.cat([self.keys[layer], key], 2)
            self.values[layer] = torch.cat([self.values[layer], value], 2)
        return self.keys[layer], self.values[layer]

    def crop(self, num_columns: int) -> None:
        """Forget all columns from ``num_columns`` on (a drafted tree's, after it was grown)."""
        if self.valid is None or num_columns >= self.num_columns:
            return
        self.valid = self.valid[:, :num_columns]
        self.keys = [k[:, :, :num_columns] for k in self.keys]
        self.values = [v[:, :, :num_columns] for v in self.values]
