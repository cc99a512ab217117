"""Tree attention on NVIDIA GPUs: vLLM's TRITON_ATTN backend, with our kernel for passes with trees.

Everything but the attention itself is the parent's: cache layout, cache update, metadata and what
it says about CUDA graphs. Under full graphs nothing here depends on the contents of a tensor, so a
graph captured with trees attached serves every later step, provided that the tensors of `TreeRows`
stay where they are.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override
from vllm import envs
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.triton_attn import (
    TritonAttentionBackend,
    TritonAttentionImpl,
    TritonAttentionMetadata,
)
from vllm.v1.kv_cache_interface import KVQuantMode

from vllm_msd.errors import ConfigError
from vllm_msd.kernels import TreeAttentionWorkspace, tree_attention
from vllm_msd.kernels.tree_attention.api import HEAD_SIZES
from vllm_msd.vllm_plugin.configuration.tree_settings import wants_trees
from vllm_msd.vllm_plugin.gpu.backend import attends_over_paths
from vllm_msd.vllm_plugin.patches.overrides import check_overrides
from vllm_msd.vllm_plugin.trees.attention import replace_backend, trees_for

# Larger batches are split less often; 67 MB for 32 heads of size 128.
WORKSPACE_TOKENS = 128
_CHAIN = "Draft a chain instead: set tree_top_k to 1."


def register() -> None:
    """Put this backend in the place of vLLM's TRITON_ATTN, for engines made from now on.

    On a CPU the place is that of the one backend there, where TRITON_ATTN already stands in it (see
    `backend.attends_over_paths`); the CPU's own stays.

    Call it in each worker process of an engine with trees, before the target is loaded: attention
    layers ask for the backend as they are built. Without trees on the metadata the backend does
    what its parent does.

    Raises:
        ConfigError: the platform has no such backend.
        PatchError: vLLM's backend has changed.
    """
    check_overrides(TreeTritonAttentionImpl)

    on_cpu = current_platform.is_cpu() and not attends_over_paths()
    if not (current_platform.is_cuda() or on_cpu):
        raise ConfigError(
            f"draft trees run on NVIDIA GPUs and on the CPU, not on {current_platform.device_name}."
            f" {_CHAIN}"
        )
    replace_backend("CPU_ATTN" if on_cpu else "TRITON_ATTN", TreeTritonAttentionBackend)


def check_backend(layers: Iterable[Any]) -> None:
    """Refuse attention layers that would ignore the trees.

    Raises:
        ConfigError: a layer uses another backend than this one.
    """
    for layer in layers:
        if not isinstance(layer.impl, TreeTritonAttentionImpl):
            raise ConfigError(
                f"attention_backend: got {layer.attn_backend.get_name()}, but draft trees on a GPU "
                f"need TRITON_ATTN. Leave it out or set it to TRITON_ATTN. {_CHAIN}"
            )


class TreeTritonAttentionBackend(TritonAttentionBackend):
    """TRITON_ATTN that follows the trees on the metadata (`vllm_msd.tree.TreeRows`)."""

    @staticmethod
    def get_impl_cls() -> type[TreeTritonAttentionImpl]:
        return TreeTritonAttentionImpl


class TreeTritonAttentionImpl(TritonAttentionImpl):
    """One layer's attention. In an engine with trees it has room for split launches.

    Raises:
        ConfigError: the engine has trees and this layer needs what the kernel cannot do.
    """

    workspace: TreeAttentionWorkspace | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = get_current_vllm_config()
        if self.attn_type != AttentionType.DECODER or not wants_trees(config):
            return
        check_layer(self, config)
        # A float8 cache is multiplied out inside the kernel; queries stay as they are.
        self.supports_quant_query_input = False
        device = config.device_config.device_type
        self.workspace = _workspace(self.num_heads, self.head_size, device)

    @override
    def fused_output_quant_supported(self, quant_key: Any) -> bool:
        """Not with trees: the kernel writes the type of its queries."""
        return self.workspace is None and super().fused_output_quant_supported(quant_key)

    @override
    def forward(
        self,
        layer: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: TritonAttentionMetadata | None,
        output: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """As the parent's; the metadata may carry trees. Reads no tensor on the host.

        Raises:
            RuntimeError: trees in an engine that was not made for them.
            ValueError: trees that do not fit the batch.
        """
        tree = trees_for(layer, attn_metadata)
        if tree is None:
            usual = (layer, query, key, value, kv_cache, attn_metadata, output)
            return super().forward(*usual, *args, **kwargs)
        if self.workspace is None:
            raise RuntimeError("Draft trees on the metadata of an engine that drafts none")
        rows, requests = attn_metadata.num_actual_tokens, len(attn_metadata.seq_lens)
        key_cache, value_cache = self.split_cache(kv_cache)
        quantized = key_cache.dtype == self.fp8_dtype
        tree_attention(
            query[:rows],
            key_cache,
            value_cache,
            attn_metadata.block_table[:requests],
            attn_metadata.seq_lens,
            attn_metadata.query_start_loc[: requests + 1],
            tree.tree_start[:requests],
            tree.ancestors[:rows],
            self.scale,
            out=output[:rows],
            k_scale=layer._k_scale if quantized else None,
            v_scale=layer._v_scale if quantized else None,
            max_query_len=attn_metadata.max_query_len,
            max_seq_len=attn_metadata.max_seq_len,
            workspace=self.workspace,
        )
        return output

    def split_cache(self, kv_cache: Tensor) -> tuple[Tensor, Tensor]:
        """Views of keys and values, ``[num_blocks, block_size, kv_heads, head_size]`` each.

        Args:
            kv_cache: ``[num_blocks, kv_heads, block_size, 2 * head_size]`` as vLLM binds it to the
                layer; a float8 cache comes as bytes.
        """
        if self._kv_quant_mode == KVQuantMode.FP8_PER_TENSOR:
            kv_cache = kv_cache.view(self.fp8_dtype)
        return kv_cache.transpose(1, 2).split(self.head_size, dim=-1)


def check_layer(impl: TritonAttentionImpl, config: VllmConfig) -> None:
    """Refuse a layer whose attention the tree kernel does not compute.

    Raises:
        ConfigError: with everything that stands in the way.
    """
    model = config.model_config
    cache_types = {"auto": model.dtype, "float16": torch.float16, "bfloat16": torch.bfloat16}
    plain = cache_types.get(impl.kv_cache_dtype) == model.dtype
    reasons = {
        f"head size {impl.head_size} (it does {', '.join(map(str, HEAD_SIZES))})": (
            impl.head_size not in HEAD_SIZES
        ),
        f"kv_cache_dtype {impl.kv_cache_dtype!r} with {model.dtype}": (
            not plain and impl._kv_quant_mode != KVQuantMode.FP8_PER_TENSOR
        ),
        "a sliding window": impl.sliding_window != (-1, -1) or model.rswa_window is not None,
        "chunked attention": impl.chunk_lookback >= 0,
        "ALiBi": impl.alibi_slopes is not None,
        "a soft cap on the scores": bool(impl.logits_soft_cap),
        "attention sinks": impl.sinks is not None,
        "attention that is not causal": (
            model.is_mm_prefix_lm or config.attention_config.use_non_causal
        ),
        "VLLM_BATCH_INVARIANT": envs.VLLM_BATCH_INVARIANT,
    }
    found = [name for name, is_so in reasons.items() if is_so]
    if found:
        raise ConfigError(
            f"draft trees: the attention kernel does not do {', nor '.join(found)}. {_CHAIN}"
        )


@cache
def _workspace(num_heads: int, head_size: int, device: str) -> TreeAttentionWorkspace:
    """Shared by all layers of a worker, so that CUDA graphs find it where it was.

    Made as the layers are, so that vLLM counts it when it measures free memory.
    """
    return TreeAttentionWorkspace.allocate(WORKSPACE_TOKENS, num_heads, head_size, device=device)
