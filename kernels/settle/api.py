"""The public call: the caches of all layers as one address, checks, then the kernel or its twin."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import describe, expect, expect_contiguous_rows, runs_kernels
from ..tree_attention.launch import power_of_two
from .eager import settle_eager

WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}
PROGRAM_BYTES = 4096  # of one row; two 16-byte loads for each of 128 threads


@dataclass(frozen=True)
class LayerCaches:
    """KV caches of several layers that one kernel can reach: made once, after they are allocated.

    Only addresses and shapes are kept, so the dtype does not matter. Rows are moved as integers of
    the widest word that every address and stride is a multiple of.

    caches: the tensors as given, ``[num_blocks, block_size, kv_heads, width]``.
    words: the first of them, seen as integers.
    offsets: ``[len(caches)]`` int64 on the device, distance of each from the first, in words.
    align: a power of two that divides every offset, at most 16 bytes' worth.
    """

    caches: tuple[Tensor, ...]
    words: Tensor
    offsets: Tensor
    align: int

    @classmethod
    def of(cls, caches: Sequence[Tensor]) -> "LayerCaches":
        """Take the caches of all layers that share a block table.

        Args:
            caches: each ``[num_blocks, block_size, kv_heads, width]``, any dtype; same shape,
                dtype, strides and device, the last dimension contiguous. Where K and V are packed
                as in vLLM (``[num_blocks, kv_heads, block_size, 2 * head_size]``), one tensor a
                layer, ``kv.transpose(1, 2)``; where they are not, K and V are two caches.

        Raises:
            ValueError: no caches, caches that differ, or one that is given twice (its rows would
                be moved twice).
        """
        if not caches:
            raise ValueError("expected at least one KV cache")
        first = caches[0]
        if first.dim() != 4:
            raise ValueError(
                f"cache 0 is {describe(first)}, expected [blocks, block_size, kv_heads, width]"
            )
        expect_contiguous_rows("cache 0", first)
        for i, cache in enumerate(caches):
            if describe(cache) != describe(first) or cache.stride() != first.stride():
                raise ValueError(
                    f"cache {i} is {describe(cache)} with strides {cache.stride()}, expected the "
                    f"same as cache 0: {describe(first)} with strides {first.stride()}"
                )
        addresses = [cache.data_ptr() for cache in caches]
        if len(set(addresses)) < len(addresses):
            raise ValueError("a KV cache is given twice: layers that share one count once")

        item = first.element_size()
        lengths = [address - addresses[0] for address in addresses] + [addresses[0]]
        lengths += [item * n for n in (*first.stride()[:3], first.shape[3])]
        word = next(w for w in WORDS if all(n % w == 0 for n in lengths))
        offsets = [(address - addresses[0]) // word for address in addresses]
        align = next(a for a in (16, 8, 4, 2, 1) if all(o * word % a == 0 for o in offsets))
        # Pinned, so that the host does not wait for the device.
        on_host = torch.tensor(offsets, dtype=torch.int64, pin_memory=first.is_cuda)
        return cls(
            caches=tuple(caches),
            words=first.view(WORDS[word]),
            offsets=on_host.to(first.device, non_blocking=True),
            align=max(1, align // word),
        )


def settle(caches: LayerCaches, block_table: Tensor, tree_start: Tensor, nodes: Tensor) -> None:
    """Move the KV rows of each request's accepted path to the front of its tree, in every layer.

    A tree's nodes lie in the cache one after another, node j at position ``tree_start[r] + j``.
    Once a path through it is accepted, its rows are moved together, and what is left is an
    ordinary sequence. For the path 0, 2, 5 of the tree drawn in ``tree_attention``::

        position    c c c | 0 1 2 3 4 5        c c c | 0 2 5 . . .
                            ^   ^     ^   ->           what follows is not looked at any more

    Args:
        caches: of all layers, see `LayerCaches`; written in place.
        block_table: [R, max_blocks] int32; position x of request r lies in cache block
            ``block_table[r, x // block_size]``, slot ``x % block_size``.
        tree_start: [R] int32, position of the root; -1 leaves the request alone.
        nodes: [R, T] int64, the accepted nodes in increasing order, the root (0) first, padded
            with -1 behind them. T is at least 1.

    On CUDA tensors one launch moves everything; it reads no tensor on the host and can be captured
    in a CUDA graph. With ``TRITON_INTERPRET=1`` the kernel runs in Triton's interpreter on CPU
    tensors too. Otherwise the eager twin does the same, slowly. Two requests must not share a block
    that has a tree in it; no paged cache does, since trees are written.

    Raises:
        ValueError: a shape, dtype, device or stride that does not fit. Contents are not checked.
    """
    words = caches.words
    if nodes.dim() != 2 or nodes.shape[1] < 1:
        raise ValueError(f"nodes is {describe(nodes)}, expected [requests, nodes]")
    num_requests, num_nodes = nodes.shape
    expect("nodes", nodes, torch.int64, (num_requests, num_nodes), words.device)
    expect("tree_start", tree_start, torch.int32, (num_requests,), words.device)
    if block_table.dim() != 2:
        raise ValueError(f"block_table is {describe(block_table)}, expected [requests, blocks]")
    shape = (num_requests, block_table.shape[1])
    expect("block_table", block_table, torch.int32, shape, words.device)
    if num_requests == 0 or num_nodes == 1:
        return
    if not runs_kernels(words):
        settle_eager(caches.caches, block_table, tree_start, nodes)
        return

    from .triton_kernel import settle_kernel

    _, block_size, num_heads, width = words.shape
    num_columns = num_heads * width
    columns = min(PROGRAM_BYTES // words.element_size(), power_of_two(num_columns))
    grid = (-(-num_columns // columns), len(caches.caches), num_requests)
    settle_kernel[grid](
        words,
        caches.offsets,
        block_table,
        tree_start,
        nodes,
        num_nodes,
        num_columns,
        block_table.stride(0),
        nodes.stride(0),
        *words.stride()[:3],
        WIDTH=width,
        BLOCK_SIZE=block_size,
        COLUMNS=columns,
        NODES=power_of_two(num_nodes),
        ALIGN=caches.align,
        num_warps=4,
    )
