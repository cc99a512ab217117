"""vLLM's CPU attention with trees, layer by layer and without an engine.

The cache is allocated by vLLM itself, filled with large garbage and written by vLLM's own
operation, so what uses this knows nothing of the layout inside a block either.
"""

from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor
from vllm import _custom_ops as ops
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadata, _get_attn_isa
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheLayout,
    KVCacheTensor,
)
from vllm.v1.worker.utils import allocate_kv_cache

from vllm_msd.vllm_plugin.cpu.attention import TreeCPUAttentionImpl
from vllm_msd.vllm_plugin.cpu.scratch import add_scratch, bind_scratch
from vllm_msd.vllm_plugin.trees.attention import attach

GARBAGE = 1000.0


@dataclass
class CpuModel:
    """Attention layers of one shape over one cache; ``layers`` by name, in order."""

    layers: dict[str, SimpleNamespace]
    heads: int
    kv_heads: int
    head_size: int
    block_size: int
    dtype: torch.dtype

    @classmethod
    def build(
        cls,
        num_blocks: int,
        num_layers: int = 2,
        heads: int = 2,
        kv_heads: int = 1,
        head_size: int = 64,
        block_size: int = 32,
        dtype: torch.dtype = torch.float32,
        scratch_blocks: int = 64,
        manager_block_size: int | None = None,
    ) -> "CpuModel":
        """``num_blocks`` of ``manager_block_size`` slots, seen in blocks of ``block_size``."""
        config = VllmConfig()
        config.model_config = SimpleNamespace(dtype=dtype)
        manager_block_size = manager_block_size or block_size
        spec = FullAttentionSpec(
            block_size=manager_block_size, num_kv_heads=kv_heads, head_size=head_size, dtype=dtype
        )
        names = [f"layer.{i}" for i in range(num_layers)]
        page = spec.page_size_bytes
        cache = KVCacheConfig(
            num_blocks=num_blocks,
            kv_cache_tensors=[
                KVCacheTensor(num_layers * num_blocks * page, names, num_blocks * page, page)
            ],
            kv_cache_groups=[KVCacheGroupSpec(names, spec)],
        )
        add_scratch(cache, scratch_blocks)
        views = allocate_kv_cache(cache, torch.device("cpu"), KVCacheLayout.LBHNC, [block_size])
        layers = {}
        with set_current_vllm_config(config):
            for name in names:
                impl = TreeCPUAttentionImpl(
                    heads, head_size, head_size**-0.5, kv_heads, None, None, "auto"
                )
                layers[name] = SimpleNamespace(
                    impl=impl,
                    isa=_get_attn_isa(dtype, block_size, head_size, "auto"),
                    kv_cache=views[name],
                    _k_scale_float=1.0,
                    _v_scale_float=1.0,
                )
        bind_scratch(cache, layers)
        storage = views[names[0]].untyped_storage()
        torch.empty(0, dtype=dtype).set_(storage).fill_(GARBAGE)
        return cls(layers, heads, kv_heads, head_size, block_size, dtype)

    def write(self, name: str, keys: Tensor, values: Tensor, slots: Tensor) -> None:
        """Write rows ``[n, kv_heads, head_size]`` to a layer's slots."""
        layer = self.layers[name]
        layer.impl.do_kv_cache_update(
            layer, keys.to(self.dtype), values.to(self.dtype), layer.kv_cache, slots
        )

    def metadata(
        self, query_start: Tensor, seq_lens: Tensor, block_table: Tensor, slots: Tensor
    ) -> CPUAttentionMetadata:
        """What vLLM's builder makes of a causal batch."""
        layer = next(iter(self.layers.values()))
        scheduler_metadata = ops.cpu_attn_get_scheduler_metadata(
            num_reqs=len(seq_lens),
            num_heads=self.heads,
            num_kv_heads=self.kv_heads,
            head_dim=self.head_size,
            seq_lens=seq_lens,
            dtype=self.dtype,
            query_start_loc=query_start,
            causal=True,
            sliding_window_size=-1,
            isa=layer.isa,
            enable_kv_split=True,
        )
        return CPUAttentionMetadata(
            num_actual_tokens=int(query_start[-1]),
            max_query_len=int(query_start.diff().max()),
            query_start_loc=query_start,
            max_seq_len=int(seq_lens.max()),
            seq_lens=seq_lens,
            block_table=block_table,
            slot_mapping=slots,
            scheduler_metadata=scheduler_metadata,
        )

    def attend(
        self,
        name: str,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        metadata: CPUAttentionMetadata,
        tree=None,
    ) -> Tensor:
        """One layer's forward pass: write the step's rows, then attend."""
        layer = self.layers[name]
        keys, values = keys.to(self.dtype), values.to(self.dtype)
        attach({name: metadata}, tree)
        layer.impl.do_kv_cache_update(layer, keys, values, layer.kv_cache, metadata.slot_mapping)
        output = torch.zeros_like(query)
        return layer.impl.forward(layer, query, keys, values, layer.kv_cache, metadata, output)
