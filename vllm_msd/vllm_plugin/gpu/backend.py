"""Model Runner V2: what draft trees do differently on a GPU and on the CPU, chosen here only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from vllm_msd.tree import TreeRows

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.worker.gpu.block_table import BlockTables


def register_attention(device: torch.device) -> None:
    """Put our attention backend in the place of vLLM's; call it before the target is loaded."""
    if device.type == "cpu":
        from vllm_msd.vllm_plugin.cpu.attention import register
    else:
        from vllm_msd.vllm_plugin.gpu.attention import register
    register()


def reserve_kv(kv_cache_config: KVCacheConfig, vllm_config: VllmConfig) -> None:
    """Make room in the KV cache, in place; call it before the cache is allocated."""
    if vllm_config.device_config.device_type == "cpu":
        from vllm_msd.vllm_plugin.cpu.scratch import add_scratch, scratch_blocks

        add_scratch(kv_cache_config, scratch_blocks(vllm_config))


class Settle(Protocol):
    """Moves the accepted nodes' KV to the slots behind the root's, in every target layer."""

    def __call__(self, tree: TreeRows, root_rows: Tensor, nodes: Tensor) -> None:
        """Settle one step, after its forward pass and before the next.

        Args:
            tree: the step's trees, ``tree_start`` of every request with accepted nodes set.
            root_rows: ``[R]`` int64 row of each request's root.
            nodes: ``[R, T]`` int64 accepted nodes, padded with -1.
        """


def bind_kv(
    vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, block_tables: BlockTables
) -> Settle:
    """Get to know the KV caches once they are allocated.

    Raises:
        RuntimeError: the layout of the cache does not fit.
        ConfigError: an attention layer would ignore the trees.
    """
    layers = vllm_config.compilation_config.static_forward_context
    if vllm_config.device_config.device_type == "cpu":
        from vllm_msd.vllm_plugin.cpu.attention import settle_cpu
        from vllm_msd.vllm_plugin.cpu.scratch import bind_scratch

        bind_scratch(kv_cache_config, layers)
        return settle_cpu

    from vllm_msd.kernels import LayerCaches, settle
    from vllm_msd.vllm_plugin.gpu.attention import check_backend

    groups = []
    for number, group in enumerate(kv_cache_config.kv_cache_groups):
        members = [layers[n] for n in group.layer_names]
        check_backend(members)
        caches = [
            layer.kv_cache.transpose(1, 2)
            for layer in members
            if not getattr(layer, "is_draft_layer", False)
        ]
        if not caches:
            continue
        got, expected = caches[0].shape[1], block_tables.block_sizes[number]
        if got != expected:
            raise RuntimeError(
                f"draft trees: the attention splits KV blocks of {expected} slots into {got}. Set "
                f"block_size to {got}, or leave tree_depth and tree_top_k out to draft chains."
            )
        groups.append((LayerCaches.of(caches), block_tables.input_block_tables[number]))

    def settle_on_device(tree: TreeRows, root_rows: Tensor, nodes: Tensor) -> None:
        num_reqs = len(nodes)
        for caches, block_table in groups:
            settle(caches, block_table[:num_reqs], tree.tree_start[:num_reqs], nodes)

    return settle_on_device
