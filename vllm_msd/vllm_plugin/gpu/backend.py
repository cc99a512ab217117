"""Model Runner V2: how draft trees attend and settle, chosen here only.

The attention backend that vLLM would use decides, not the device: in place of its CPU backend
attention runs over paths, in place of FLASH_ATTN and TRITON_ATTN through the tree kernel. Tests put
TRITON_ATTN in the CPU backend's place, and the kernels then run in Triton's interpreter.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from vllm_msd.tree import TreeRows

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.worker.gpu.block_table import BlockTables

    from vllm_msd.kernels import LayerCaches


def attends_over_paths() -> bool:
    """Whether vLLM's backend here is the CPU's, or ours in its place."""
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    return current_platform.is_cpu() and issubclass(
        AttentionBackendEnum.CPU_ATTN.get_class(), CPUAttentionBackend
    )


def register_attention() -> None:
    """Put our attention backend in the place of vLLM's; call it before the target is loaded."""
    if attends_over_paths():
        from vllm_msd.vllm_plugin.cpu.attention import register
    else:
        from vllm_msd.vllm_plugin.gpu.attention import register
    register()


def provide_workspace(vllm_config: VllmConfig, device: torch.device) -> None:
    """Make what this engine's attention needs beside the KV cache; call it with the draft loaded.

    vLLM then counts it when it measures free memory.
    """
    if not attends_over_paths():
        from vllm_msd.vllm_plugin.gpu import attention

        layers = vllm_config.compilation_config.static_forward_context
        attention.provide_workspace(layers.values(), device)


def reserve_kv(kv_cache_config: KVCacheConfig, vllm_config: VllmConfig) -> None:
    """Make room in the KV cache, in place; call it before the cache is allocated."""
    if attends_over_paths():
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
    if attends_over_paths():
        from vllm_msd.vllm_plugin.cpu.attention import settle_cpu
        from vllm_msd.vllm_plugin.cpu.scratch import bind_scratch

        bind_scratch(kv_cache_config, layers)
        return settle_cpu

    from vllm_msd.kernels import settle
    from vllm_msd.vllm_plugin.gpu.attention import check_backend

    groups = []
    for number, group in enumerate(kv_cache_config.kv_cache_groups):
        members = [layers[n] for n in group.layer_names]
        check_backend(members)
        targets = [layer for layer in members if not getattr(layer, "is_draft_layer", False)]
        if not targets:
            continue
        got, expected = targets[0].kv_cache.shape[2], block_tables.block_sizes[number]
        if got != expected:
            raise RuntimeError(
                f"draft trees: the attention splits KV blocks of {expected} slots into {got}. Set "
                f"block_size to {got}, or leave tree_depth and tree_top_k out to draft chains."
            )
        _caches(targets)  # what does not fit is refused here
        groups.append((targets, block_tables.input_block_tables[number]))
    # Kept from the first settling on: vLLM measures the memory of graphs with caches that it then
    # throws away, and views of them would keep them in memory.
    found: list[tuple[LayerCaches, Tensor]] = []

    def settle_on_device(tree: TreeRows, root_rows: Tensor, nodes: Tensor) -> None:
        if not found:
            found.extend((_caches(targets), table) for targets, table in groups)
        num_reqs = len(nodes)
        for caches, block_table in found:
            settle(caches, block_table[:num_reqs], tree.tree_start[:num_reqs], nodes)

    return settle_on_device


def _caches(layers: list[Any]) -> LayerCaches:
    from vllm_msd.kernels import LayerCaches

    return LayerCaches.of([layer.kv_cache.transpose(1, 2) for layer in layers])
