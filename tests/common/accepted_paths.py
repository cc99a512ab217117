"""Caches, paths and trees with draws, for tests of settling and of the accepting walk."""

from math import prod

import torch
from torch import Tensor

from tests.common.tree_batches import chain, random_tree, star
from vllm_msd.kernels import AcceptedPaths, accept
from vllm_msd.tree import DraftTree

LAYOUTS = {  # physical order of layer, block, head, slot, content
    "layer, block, head, slot": (0, 1, 2, 3, 4),
    "layer, block, slot, head": (0, 1, 3, 2, 4),
    "layer, head, block, slot": (0, 2, 1, 3, 4),
    "block, layer, head, slot": (1, 0, 2, 3, 4),
}


def layer_views(
    shape: tuple[int, ...], dtype: torch.dtype, layout: str, generator: torch.Generator
) -> tuple[Tensor, list[Tensor]]:
    """A buffer of random bytes, and ``[blocks, slots, heads, content]`` views of its layers.

    ``shape`` is (layers, blocks, heads, slots, content).
    """
    order = LAYOUTS[layout]
    size = prod(shape) * dtype.itemsize
    backing = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator)
    physical = backing.view(dtype).view([shape[i] for i in order])
    logical = physical.permute([order.index(i) for i in range(5)])
    return backing, [layer.transpose(1, 2) for layer in logical]


def random_path(nodes: int, generator: torch.Generator) -> list[int]:
    """The root and a random increasing choice of the others."""
    keep = torch.rand(nodes, generator=generator) < 0.4
    return [0] + [j for j in range(1, nodes) if keep[j]]


def moved_one_by_one(
    views: list[Tensor], table: Tensor, roots: list[int], paths: list[list[int]]
) -> None:
    block_size = views[0].shape[1]
    for view in views:
        before = view.clone()
        for request, (root, path) in enumerate(zip(roots, paths, strict=True)):
            for i, node in enumerate(path if root >= 0 else []):
                to, come_from = divmod(root + i, block_size), divmod(root + node, block_size)
                view[table[request, to[0]], to[1]] = before[
                    table[request, come_from[0]], come_from[1]
                ]


def random_forest(sizes: list[int], nodes: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """tokens, parents, drawn [R, nodes], sizes [R]: few tokens, distinct among siblings.

    Half of the draws are a child's token, so walks of all lengths happen.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 5, (len(sizes), nodes), generator=generator)
    parents = torch.zeros(len(sizes), nodes, dtype=torch.int64)
    drawn = torch.randint(0, 5, (len(sizes), nodes), generator=generator)
    for i, size in enumerate(sizes):
        shapes = [random_tree(max(size, 1), generator), chain(max(size, 1)), star(max(size, 1))]
        parent = shapes[i % 4 % 3]
        parents[i, : len(parent)] = torch.tensor(parent)
        parents[i, 0] = -1
        for node in range(size):
            children = [j for j in range(node + 1, size) if parent[j] == node]
            names = torch.randperm(len(children) + 2, generator=generator)
            tokens[i, children] = names[: len(children)]
            if children and torch.rand((), generator=generator) < 0.5:
                pick = int(torch.randint(len(children), (), generator=generator))
                drawn[i, node] = tokens[i, children[pick]]
    return tokens, parents, drawn, torch.tensor(sizes)


def walked_one_by_one(
    tokens: Tensor, parents: Tensor, drawn: Tensor, sizes: Tensor
) -> AcceptedPaths:
    """What `accept` gives for these trees (all ``[R, T]``, sizes ``[R]``): plain loops, no rows."""
    paths, emitted = [], []
    for names, up, draws, size in zip(
        *(x.tolist() for x in (tokens, parents, drawn, sizes)), strict=True
    ):
        path = [0] if size else []
        while path:
            node = path[-1]
            children = [j for j in range(1, size) if up[j] == node and names[j] == draws[node]]
            if not children:
                break
            path.append(children[0])
        padding = [-1] * (len(names) - len(path))
        paths.append(path + padding)
        emitted.append([draws[node] for node in path] + padding)
    nodes = torch.tensor(paths)
    return AcceptedPaths((nodes > 0).sum(1), nodes, torch.tensor(emitted))


def accept_trees(tree: DraftTree, drawn: Tensor, sizes: Tensor | None = None) -> AcceptedPaths:
    """`accept` for trees and draws ``[R, T]``, of which the first ``sizes [R]`` nodes are real."""
    if sizes is None:
        sizes = torch.full((len(drawn),), tree.num_nodes)
    is_node = torch.arange(tree.num_nodes) < sizes[:, None]
    row_start = torch.nn.functional.pad(sizes.cumsum(0), (1, 0))
    return accept(drawn[is_node], tree.tokens[is_node], tree.parents, row_start)


def next_roots(accepted: AcceptedPaths) -> Tensor:
    """``[R]`` the last token emitted, which no draft proposed."""
    return accepted.tokens.gather(1, accepted.lengths[:, None])[:, 0]
