"""Stand-ins in plain PyTorch for Triton kernels, which take seconds a step when interpreted.

Each counts as one launch. As a kernel would, the attention reads lengths from its tensors when it
runs; and it complains if the host's bounds, frozen by a graph, do not hold for them. The kernels
that grow trees have their eager twins, which unit tests compare with them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from tests.common.cuda_graphs.graph import as_kernel


def _attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, seq_lens: Tensor,
    query_start: Tensor, tree_start: Tensor | None, ancestors: Tensor | None, scale: float,
    out: Tensor, max_query_len: int, max_seq_len: int,
) -> None:  # fmt: skip
    starts, lengths = query_start.tolist(), seq_lens.tolist()
    roots = [-1] * len(lengths) if tree_start is None else tree_start.tolist()
    block_size = k_cache.shape[1]
    for request, (length, root) in enumerate(zip(lengths, roots, strict=True)):
        begin, end = starts[request : request + 2]
        if begin == end or length == 0:
            continue
        assert length <= max_seq_len, f"a graph's max_seq_len {max_seq_len} is below {length}"
        assert end - begin <= max_query_len, f"max_query_len {max_query_len}, got {end - begin}"
        blocks = block_table[request, : -(-length // block_size)].long()
        keys = k_cache[blocks].flatten(0, 1)[:length]
        values = v_cache[blocks].flatten(0, 1)[:length]
        position = torch.arange(length - (end - begin), length)[:, None]
        key = torch.arange(length)
        visible = key <= position
        if root >= 0:
            node = key - root
            bits = (ancestors[begin:end, None] >> node.clamp(0, 63)) & 1
            visible &= (node < 0) | ((node < 64) & bits.bool())
        seen = visible.any(0)[:, None, None]  # what nobody looks at can hold anything
        keys, values = (x.masked_fill(~seen, 0).transpose(0, 1) for x in (keys, values))
        result = torch.nn.functional.scaled_dot_product_attention(
            q[begin:end].transpose(0, 1)[None], keys[None], values[None], visible,
            scale=scale, enable_gqa=True,
        )  # fmt: skip
        out[begin:end] = result[0].transpose(0, 1)


def _write_cache(
    key: Tensor, value: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor
) -> None:
    kept = slots >= 0
    slots = slots[kept]
    block, offset = slots // k_cache.shape[1], slots % k_cache.shape[1]
    k_cache[block, offset] = key[: len(kept)][kept]
    v_cache[block, offset] = value[: len(kept)][kept]


run_attention = as_kernel("attention", _attention)
run_write_cache = as_kernel("write_cache", _write_cache)


def _unified(q, k, v, out, cu_seqlens_q, max_seqlen_q, seqused_k, max_seqlen_k, softmax_scale,
             block_table, **rest: Any) -> None:  # fmt: skip
    run_attention(q, k, v, block_table, seqused_k, cu_seqlens_q, None, None, softmax_scale, out,
                  max_seqlen_q, max_seqlen_k)  # fmt: skip


def _tree(*batch: Any, out: Tensor, max_query_len: int, max_seq_len: int, **rest: Any) -> Tensor:
    run_attention(*batch, out, max_query_len, max_seq_len)
    return out


def _reshape_and_cache(key, value, key_cache, value_cache, slot_mapping, *rest: Any) -> None:
    run_write_cache(key, value, key_cache, value_cache, slot_mapping)


GROWING = {
    "top_k": ("top_k_parts_eager",),
    "beam_step": ("beam_step_eager",),
    "rerank": ("rerank_eager",),
    "place_trees": ("place_trees_eager",),
    "draft_prefill": ("draft_prefill_eager",),
}


@contextmanager
def fast_growing() -> Iterator[None]:
    """Trees grow by the kernels' eager twins, also where ``TRITON_INTERPRET`` is set."""
    from vllm_msd.tree import fused

    with ExitStack() as stack:
        for folder, twins in GROWING.items():
            api = import_module(f"vllm_msd.kernels.{folder}.api")
            stack.enter_context(mock.patch.object(api, "runs_kernels", lambda _: False))
            for name in twins:
                twin = as_kernel(name, getattr(api, name))
                stack.enter_context(mock.patch.object(api, name, twin))
        # Its twin returns what the call copies, so here the whole call is the launch.
        merge = as_kernel("merge_top_k", fused.merge_top_k)
        stack.enter_context(mock.patch.object(fused, "merge_top_k", merge))
        yield


@contextmanager
def fast_kernels() -> Iterator[None]:
    """Puts these in the place of vLLM's Triton attention and of the plugin's kernels."""
    from vllm.v1.attention.backends import triton_attn

    from vllm_msd.kernels.tree_attention import api

    with (
        fast_growing(),
        mock.patch.object(triton_attn, "unified_attention", _unified),
        mock.patch.object(triton_attn, "triton_reshape_and_cache_flash", _reshape_and_cache),
        mock.patch.object(api, "launch_tree_attention", _tree),
    ):
        yield
