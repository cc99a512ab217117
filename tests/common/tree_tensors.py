"""Tensors derived from a tree for verification."""

import torch
from torch import Tensor

from vllm_msd.tree.record import DraftTree


def tree_mask(tree: DraftTree) -> Tensor:
    """``[B, T, T]`` bool: True where the column is the row's ancestor or the row itself."""
    node = torch.arange(tree.num_nodes, device=tree.ancestors.device)
    return (tree.ancestors[..., None] >> node & 1).bool()


def retrieve_indices(parents: Tensor, lexicographic: bool = False) -> Tensor:
    """The root-to-leaf paths of one tree.

    Args:
        parents: ``[T]`` int64, -1 at the root.
        lexicographic: False orders rows by leaf number, True by their nodes. Rows are the same;
            no path is the beginning of another, so padding does not take part.

    Returns:
        ``[leaves, width]`` int64 node numbers root..leaf, right-padded with -1; width is the
        deepest leaf's path length.
    """
    up = parents.tolist()
    inner = set(up)
    paths = []
    for leaf in range(len(up)):
        if leaf in inner:
            continue
        path = [leaf]
        while up[path[0]] >= 0:
            path.insert(0, up[path[0]])
        paths.append(path)
    width = max(map(len, paths))
    if lexicographic:
        paths.sort()
    return torch.tensor([path + [-1] * (width - len(path)) for path in paths])
