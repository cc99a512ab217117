"""The walk as its definition reads: from node to node, all requests at once."""

import torch
from torch import Tensor
from torch.nn.functional import pad


def accept_eager(
    drawn: Tensor, tokens: Tensor, parents: Tensor, row_start: Tensor, out: tuple[Tensor, ...]
) -> None:
    """Same as ``accept``, into ``out`` (lengths, nodes, tokens); waits for the device."""
    lengths, nodes, emitted = out
    num_nodes = parents.shape[1]
    index = torch.arange(num_nodes, device=parents.device)
    rows = row_start[:-1, None] + index
    is_node = rows < row_start[1:, None]
    drawn, tokens = (pad(values, (0, num_nodes))[rows] for values in (drawn, tokens))  # [R, T]

    nodes.fill_(-1)
    emitted.fill_(-1)
    node = is_node[:, :1].long() - 1  # [R, 1] where each walk stands: at the root; -1 at its end
    depth = 0
    while (goes_on := node >= 0).any():
        draw = drawn.gather(1, node.clamp(min=0))
        nodes[:, depth, None] = node.to(nodes.dtype)
        emitted[:, depth, None] = torch.where(goes_on, draw, -1).to(emitted.dtype)
        fits = (parents == node) & (tokens == draw) & (index > node) & is_node & goes_on
        node = torch.where(fits.any(1, keepdim=True), fits.int().argmax(1, keepdim=True), -1)
        depth += 1
    lengths.copy_((nodes > 0).sum(1))
