"""Settling: after acceptance a tree becomes the chain that was accepted.

The rows of one step (KV slots, hidden states, token ids, logits) hold each request's tree in node
order. Moving row ``path[i]`` to row ``i`` leaves an ordinary chain with rejected rows behind it.
Since ``path[i] >= i``, moves in increasing order never overwrite a row that is still needed.
"""

import torch
from torch import Tensor


def settle_index(root_rows: Tensor, nodes: Tensor, num_rows: int) -> Tensor:
    """Where each row of the settled step comes from: ``settled = rows[settle_index(...)]``.

    Reads nothing on the host.

    Args:
        root_rows: ``[B]`` int64 row of each request's root; its node n lies n rows further.
        nodes: ``[B, T]`` int64 accepted nodes, the root first, padded with -1.
        num_rows: rows of the step.

    Returns:
        ``[num_rows]`` int64; the identity wherever no accepted node moves to.
    """
    index = torch.arange(num_rows + 1, device=nodes.device)  # the last entry takes the padding
    offset = torch.arange(nodes.shape[1], device=nodes.device)
    real = nodes >= 0
    to = torch.where(real, root_rows[:, None] + offset, num_rows)
    come_from = torch.where(real, root_rows[:, None] + nodes, num_rows)
    return index.scatter(0, to.flatten(), come_from.flatten())[:num_rows]
