"""Settling as its definition reads: one request and one cache at a time, rows gathered first."""

from collections.abc import Sequence

import torch
from torch import Tensor


def settle_eager(
    caches: Sequence[Tensor], block_table: Tensor, tree_start: Tensor, nodes: Tensor
) -> None:
    """Same as ``settle``, over the caches themselves; waits for the device."""
    block_size = caches[0].shape[1]

    def cells(request: int, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Block and slot of each position."""
        return block_table[request, positions // block_size].long(), positions % block_size

    for request in range(nodes.shape[0]):
        root = tree_start[request].item()
        if root < 0:
            continue
        path = nodes[request][nodes[request] >= 0]
        come_from = cells(request, root + path)
        to = cells(request, root + torch.arange(len(path), device=path.device))
        for cache in caches:
            cache[to] = cache[come_from]  # the right side is a copy
