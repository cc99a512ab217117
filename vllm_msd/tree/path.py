"""Gathering rows along the accepted path: after acceptance a tree becomes the chain it accepted.

The rows of one step (hidden states, token ids, logits) hold each request's tree in node order.
With row ``path[i]`` moved to row ``i`` an ordinary chain stands there, rejected rows behind it.
"""

import torch
from torch import Tensor


def path_index(root_rows: Tensor, nodes: Tensor, num_rows: int) -> Tensor:
    """Where each row comes from: ``rows[path_index(...)]`` has the accepted nodes in front.

    Reads nothing on the host.

    Args:
        root_rows: ``[R]`` int64 row of each request's root; its node n lies n rows further.
        nodes: ``[R, T]`` int64 accepted nodes, the root first, padded with -1.
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


def path_moves(root_rows: Tensor, nodes: Tensor) -> tuple[Tensor, Tensor]:
    """The rows that move: ``rows[to] = rows[come_from]`` brings the accepted nodes to the front.

    As `path_index`, for few rows among many: padding moves the root onto itself.

    Args:
        root_rows, nodes: as in `path_index`.

    Returns:
        ``to`` and ``come_from``, ``[R, T]`` int64.
    """
    offset = torch.arange(nodes.shape[1], device=nodes.device)
    to = torch.where(nodes >= 0, offset, 0)
    return root_rows[:, None] + to, root_rows[:, None] + nodes.clamp(min=0)
