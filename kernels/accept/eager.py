"""The walk as its definition reads: one request at a time, from node to node."""

import torch
from torch import Tensor


def accept_eager(
    drawn: Tensor, tokens: Tensor, parents: Tensor, row_start: Tensor, out: tuple[Tensor, ...]
) -> None:
    """Same as ``accept``, into ``out`` (lengths, nodes, tokens); waits for the device."""
    # Plain lists: for the few small trees of a step on the CPU they take half of what tensors do.
    starts, draws, names = row_start.tolist(), drawn.tolist(), tokens.tolist()
    paths, emitted = [], []
    for request, parent in enumerate(parents.tolist()):
        begin = starts[request]
        size = min(starts[request + 1] - begin, len(parent))
        # By node and token; backwards, so that the first of equal ones stays.
        child: dict[tuple[int, int], int] = {}
        for node in range(size - 1, 0, -1):
            if parent[node] < node:
                child[parent[node], names[begin + node]] = node
        path = [0] if size else []
        while path and (found := child.get((path[-1], draws[begin + path[-1]]))) is not None:
            path.append(found)
        padding = [-1] * (len(parent) - len(path))
        paths.append(path + padding)
        emitted.append([draws[begin + node] for node in path] + padding)
    lengths, out_nodes, out_tokens = out
    nodes = torch.tensor(paths)
    lengths.copy_((nodes > 0).sum(1))
    out_nodes.copy_(nodes)
    out_tokens.copy_(torch.tensor(emitted))
