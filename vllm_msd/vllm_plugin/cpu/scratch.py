"""Scratch blocks behind the KV cache, for the paths of trees on the CPU.

vLLM puts all layers into one allocation. It is made larger here; the room at its end belongs to no
layer, and every layer reaches it as blocks of its own with high numbers. The layers run one after
another, so they share it.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

KERNEL_BLOCK_SIZE = 32  # slots per block as the attention sees it: a path copies up to one block
MIN_BLOCKS = 4  # a path of 64 nodes takes 3
MAX_BLOCKS = 256


@dataclass(frozen=True)
class Scratch:
    """One layer's way to the scratch blocks.

    Attributes:
        cache: ``[first_block + num_blocks, kv_heads, block_size, 2 * head_size]``, the layer's own
            blocks and, from ``first_block`` on, the scratch blocks. What lies between belongs to
            other layers.
        blocks: ``[num_blocks, kv_heads, block_size, 2 * head_size]`` the scratch blocks.
        first_block: number of the first scratch block in ``cache``.
    """

    cache: Tensor
    blocks: Tensor
    first_block: int

    @classmethod
    def behind(cls, kv_cache: Tensor, used_bytes: int) -> Scratch:
        """The blocks behind the first ``used_bytes`` of the storage, seen from one layer.

        Args:
            kv_cache: ``[blocks, kv_heads, block_size, 2 * head_size]`` the layer's cache.
            used_bytes: what vLLM itself uses of the storage, from its start.

        Raises:
            RuntimeError: the blocks of a layer do not lie one after another, or no room is left.
        """
        block = kv_cache.stride(0)
        if not kv_cache[0].is_contiguous() or block != kv_cache[0].numel():
            raise RuntimeError(
                "Draft trees on the CPU need a KV cache whose blocks lie one after another, got "
                f"shape {tuple(kv_cache.shape)} with strides {kv_cache.stride()}. Unset "
                "VLLM_KV_CACHE_LAYOUT, or leave tree_depth out for a chain."
            )
        start, size = kv_cache.storage_offset(), kv_cache.element_size()
        first = -(-(used_bytes // size - start) // block)
        end = (kv_cache.untyped_storage().nbytes() // size - start) // block
        if end <= first:
            raise RuntimeError("Draft trees on the CPU: the KV cache was allocated without scratch")
        cache = kv_cache.as_strided((end, *kv_cache.shape[1:]), kv_cache.stride(), start)
        return cls(cache, cache[first:], first)


def scratch_blocks(vllm_config: VllmConfig) -> int:
    """How many scratch blocks an engine gets: all paths of a full batch, within limits.

    A step that needs more than there are is served in several calls.
    """
    nodes = vllm_config.speculative_config.num_speculative_tokens
    # Two blocks hold the path of a usual tree: the end of the context, and what follows.
    wanted = 2 * nodes * vllm_config.scheduler_config.max_num_seqs
    return min(max(wanted, MIN_BLOCKS), MAX_BLOCKS)


def add_scratch(kv_cache_config: KVCacheConfig, num_blocks: int) -> None:
    """Make room for scratch blocks, in place; call it before the cache is allocated.

    The room is extra memory, beyond what vLLM's profile allows the cache.

    Args:
        kv_cache_config: what the cache will be allocated from.
        num_blocks: scratch blocks of `KERNEL_BLOCK_SIZE` slots.

    Raises:
        RuntimeError: the cache is not one allocation.
    """
    from vllm.logger import init_logger

    tensors = kv_cache_config.kv_cache_tensors
    if len({tensor.size for tensor in tensors}) != 1:
        raise RuntimeError("Draft trees on the CPU need a KV cache in one allocation")
    # One block more, as a layer's blocks need not line up with the end.
    extra = (num_blocks + 1) * max(_kernel_page(kv_cache_config, tensor) for tensor in tensors)
    for tensor in tensors:
        tensor.size += extra
    init_logger("vllm.vllm_msd").info(
        "Draft trees: %d scratch blocks behind the KV cache, %.1f MiB beyond its budget.",
        num_blocks,
        extra / 2**20,
    )


def with_scratch(kv_cache_config: KVCacheConfig, num_blocks: int) -> KVCacheConfig:
    """A copy of the config with room for scratch blocks; see `add_scratch`."""
    kv_cache_config = deepcopy(kv_cache_config)
    add_scratch(kv_cache_config, num_blocks)
    return kv_cache_config


def bind_scratch(kv_cache_config: KVCacheConfig, layers: dict[str, Any]) -> None:
    """Show every attention layer the scratch blocks; call it once the caches are bound.

    Args:
        kv_cache_config: what the cache was allocated from.
        layers: vLLM's static forward context, layers by name.

    Raises:
        RuntimeError: the config had no `add_scratch`, or the layout of the cache does not fit.
    """
    used = max(_end(kv_cache_config, tensor) for tensor in kv_cache_config.kv_cache_tensors)
    for tensor in kv_cache_config.kv_cache_tensors:
        for name in tensor.layers:
            layer = layers[name]
            layer.impl.scratch = Scratch.behind(layer.kv_cache, used)


def _spec(kv_cache_config: KVCacheConfig, tensor: Any) -> Any:
    name = tensor.layers[0]
    group = next(g for g in kv_cache_config.kv_cache_groups if name in g.layer_names)
    return getattr(group.kv_cache_spec, "kv_cache_specs", {}).get(name, group.kv_cache_spec)


def _kernel_page(kv_cache_config: KVCacheConfig, tensor: Any) -> int:
    """Bytes of one block as the attention sees it."""
    spec = _spec(kv_cache_config, tensor)
    return spec.page_size_bytes * KERNEL_BLOCK_SIZE // spec.block_size


def _end(kv_cache_config: KVCacheConfig, tensor: Any) -> int:
    """The first byte behind a tensor's layers."""
    last_layer = (len(tensor.layers) - 1) * tensor.layer_stride
    last_block = (kv_cache_config.num_blocks - 1) * tensor.block_stride
    page = _spec(kv_cache_config, tensor).page_size_bytes
    return tensor.offset + last_layer + last_block + page
