"""No compilation while serving: the variants of our kernels that an engine can come to launch.

Triton compiles a kernel for every combination of its constants. Here all of them are listed, and
each is launched once when the engine starts, over the engine's own buffers and for no request,
through vLLM's registry of such kernels. Most of a variant is fixed in an engine (types, heads,
block sizes, width and depth of trees). Left to the step are the attention's tiles and splits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from typing_extensions import override
from vllm.model_executor.warmup.jit_warmup import VllmJitKernel
from vllm.v1.kv_cache_interface import KVQuantMode

from vllm_msd.kernels import accept, tree_attention
from vllm_msd.kernels.tree_attention.launch import LaunchConfig, choices, is_hopper
from vllm_msd.tree import TreeRows
from vllm_msd.vllm_plugin.gpu.attention import TreeAttentionImpl
from vllm_msd.vllm_plugin.gpu.backend import attends_over_paths
from vllm_msd.vllm_plugin.patches.overrides import check_overrides

Key = tuple[Any, ...]


def register_kernels(runner: Any) -> None:
    """Have vLLM launch every variant before the first step; for a new runner that drafts trees."""
    check_overrides(TreeKernels)
    if not attends_over_paths():
        with runner.jit_warmup_registry.activate():
            TreeKernels(runner).register_warmup()


class TreeKernels(VllmJitKernel[Key]):
    """All kernels of a runner that drafts trees; a key names one launch of `launches`."""

    def __init__(self, runner: Any) -> None:
        super().__init__()
        self.runner = runner

    @override
    def get_warmup_keys(self, *args: Any, **kwargs: Any) -> list[Key]:
        """One for each launch; asked for once the KV cache is there."""
        return list(self.launches())

    @override
    def compile(self, compile_key: Key) -> None:
        """Launch what the key stands for."""
        with torch.inference_mode():
            self.launches()[compile_key]()

    def launches(self) -> dict[Key, Callable[[], Any]]:
        """Every launch that compiles something, by name."""
        speculator, state = self.runner.speculator, self.runner.model_state
        return {
            # Top-k and its merge, a beam step at the root, below and at the end, and reranking.
            ("growing",): speculator.round.for_nobody,
            ("placing",): state.place_for_nobody,
            ("compact prefill",): speculator.compact.for_nobody,
            ("accepting",): lambda: _accept_nothing(state.store),
            ("settling",): lambda: _settle_nothing(state),
            **self._attention(),
        }

    def _attention(self) -> dict[Key, Callable[[], Any]]:
        """Of layers that are alike, one; by its name, its tiles and its splits."""
        config = self.runner.vllm_config
        layers = config.compilation_config.static_forward_context
        found: dict[Key, Callable[[], Any]] = {}
        seen = set()
        for number, group in enumerate(self.runner.kv_cache_config.kv_cache_groups):
            table = self.runner.block_tables.input_block_tables[number]
            for name in group.layer_names:
                layer = layers[name]
                impl: TreeAttentionImpl = layer.impl
                keys, _ = impl.split_cache(layer.kv_cache)
                kind = (number, impl.num_heads, impl.head_size, keys.dtype, *keys.stride())
                if kind in seen:
                    continue
                seen.add(kind)
                dtype = config.model_config.dtype
                for tiles, splits in choices(
                    impl.num_heads // impl.num_kv_heads,
                    impl.head_size,
                    dtype.itemsize,
                    config.scheduler_config.max_num_batched_tokens,
                    config.model_config.max_model_len,
                    is_hopper(keys.device),
                ):
                    found["attention", name, tiles, splits] = _attention_of_nothing(
                        layer, dtype, table, tiles, splits
                    )
        return found


def _accept_nothing(store: Any) -> None:
    """The walk down the spare slot's tree, of no rows; types as the rejection sampler has them."""
    device = store.parents.device
    none = torch.zeros(1, dtype=torch.int64, device=device)
    starts = torch.zeros(2, dtype=torch.int32, device=device)
    accept(none, none.int(), store.parents[-1:].clone(), starts)


def _settle_nothing(state: Any) -> None:
    device = state.store.parents.device
    nobody = torch.full((1,), -1, dtype=torch.int32, device=device)
    nodes = torch.full((1, state.store.num_nodes), -1, dtype=torch.int64, device=device)
    state.settle(TreeRows(nobody, nodes[0], is_draft=False), nodes[:, 0], nodes)


def _attention_of_nothing(
    layer: Any, dtype: torch.dtype, block_table: torch.Tensor, config: LaunchConfig, splits: int
) -> Callable[[], Any]:
    """A launch for one request without rows: every program of it ends at once."""
    impl, device = layer.impl, block_table.device

    def launch() -> None:
        keys, values = impl.split_cache(layer.kv_cache)
        quantized = impl.kv_quant_mode == KVQuantMode.FP8_PER_TENSOR
        query = torch.zeros(1, impl.num_heads, impl.head_size, dtype=dtype, device=device)
        none = torch.zeros(2, dtype=torch.int32, device=device)
        tree_attention(
            query,
            keys,
            values,
            block_table[:1],
            none[:1],
            none,
            none[:1] - 1,
            torch.zeros(1, dtype=torch.int64, device=device),
            impl.scale,
            out=torch.zeros_like(query),
            k_scale=layer._k_scale if quantized else None,
            v_scale=layer._v_scale if quantized else None,
            num_splits=splits,
            workspace=impl.workspace,
            config=config,
        )

    return launch
