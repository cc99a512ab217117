"""Model Runner V2: the target's side of draft trees, vLLM's hooks around `TreeStore`.

Rows get their tree's rotary positions and attention, and after acceptance the accepted path becomes
the chain that vLLM takes it for.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn
from typing_extensions import override
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.gpu.block_table import BlockTables
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.mm.encoder_cache import EncoderCache
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu.model_states.interface import ModelSpecificAttnMetadata
from vllm.v1.worker.gpu.states import RequestState
from vllm.v1.worker.utils import AttentionGroup

from vllm_msd.tree import TreeStore
from vllm_msd.vllm_plugin.configuration.tree_settings import tree_config
from vllm_msd.vllm_plugin.gpu.backend import bind_kv
from vllm_msd.vllm_plugin.gpu.sampler import TreeRejectionSampler
from vllm_msd.vllm_plugin.gpu.split import DraftsFirst, Split
from vllm_msd.vllm_plugin.patches.overrides import check_overrides
from vllm_msd.vllm_plugin.trees.attention import attach
from vllm_msd.vllm_plugin.trees.constrained import needs_chain


class TreeModelState(DefaultModelState):
    """Applies each request's tree to the target's passes.

    ``store``: the trees, under the slots of vLLM's request states. ``as_chain [slots]`` bool on the
    host: requests whose next trees have to be chains.
    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        model: nn.Module,
        encoder_cache: EncoderCache | None,
        device: torch.device,
    ) -> None:
        check_overrides(TreeModelState)
        super().__init__(vllm_config, model, encoder_cache, device)
        rows, slots = self.max_num_tokens, self.max_num_reqs
        self.store = TreeStore(slots, rows, tree_config(vllm_config).num_nodes + 1, device)
        self.as_chain = np.zeros(slots, dtype=np.bool_)
        self.has_trees = False  # whether the current step's passes follow trees
        # Rotary positions of the current step; CUDA graphs read this very tensor.
        self.positions = torch.zeros(rows, dtype=torch.int64, device=device)

    @override
    def add_request(self, req_index: int, new_req_data: NewRequestData) -> None:
        """A new request (or one that was preempted) starts with a chain."""
        super().add_request(req_index, new_req_data)
        self.store.put_chain(req_index)
        self.as_chain[req_index] = needs_chain(new_req_data.sampling_params)

    @override
    def initialize_kv_cache(
        self, kv_cache_config: KVCacheConfig, block_tables: BlockTables
    ) -> None:
        """Get to know the caches (more than once, if vLLM allocates them again)."""
        super().initialize_kv_cache(kv_cache_config, block_tables)
        self.settle = bind_kv(self.vllm_config, kv_cache_config, block_tables)

    @override
    def prepare_attn(
        self,
        input_batch: InputBatch,
        cudagraph_mode: CUDAGraphMode,
        block_tables: tuple[torch.Tensor, ...],
        slot_mappings: torch.Tensor,
        attn_groups: list[list[AttentionGroup]],
        kv_cache_config: KVCacheConfig,
        for_capture: bool = False,
        ubatch_idx: int = 0,
        model_specific_attn_metadata: ModelSpecificAttnMetadata | None = None,
    ) -> dict[str, Any]:
        """vLLM's metadata with the trees attached, where a request has drafts.

        And for full CUDA graphs, whoever has: a graph serves every step of its size.
        """
        in_graph = for_capture or cudagraph_mode == CUDAGraphMode.FULL
        split = Split.of(input_batch)
        self.has_trees = in_graph or split.requests > 0
        if self.has_trees and not in_graph and model_specific_attn_metadata is None:
            model_specific_attn_metadata = DraftsFirst(split)
        metadata = super().prepare_attn(
            input_batch,
            cudagraph_mode,
            block_tables,
            slot_mappings,
            attn_groups,
            kv_cache_config,
            for_capture,
            ubatch_idx,
            model_specific_attn_metadata,
        )
        tree = None
        if self.has_trees:
            tree = self.store.open_step(
                input_batch.num_reqs,
                input_batch.num_reqs_after_padding,
                input_batch.num_tokens_after_padding,
            )
        else:
            self.store.skip_step()
        attach(metadata, tree)
        return metadata

    @override
    def prepare_inputs(self, input_batch: InputBatch, req_states: RequestState) -> dict[str, Any]:
        """Lay the trees over the rows. A node's rotary position is its root's plus its depth."""
        inputs = super().prepare_inputs(input_batch, req_states)
        rows, linear = input_batch.num_tokens_after_padding, input_batch.positions
        positions = self.positions[:rows]
        if self.rope_state is not None:
            positions = linear = self.rope_state.get_positions(rows)
        else:
            inputs = {**inputs, "positions": positions}
        if self.has_trees:
            self.has_trees = False  # a profiling pass may come next, for which nothing is prepared
            self.store.place(
                input_batch.idx_mapping,
                input_batch.cu_num_logits,
                input_batch.query_start_loc,
                input_batch.seq_lens,
                linear,
                positions,
            )
        elif positions is not linear:
            positions.copy_(linear)
        return inputs

    def place_for_nobody(self) -> None:
        """Launch the kernel that lays out trees for padding alone, to have it compiled."""
        rows = self.max_num_tokens
        starts = torch.zeros(2, dtype=torch.int32, device=self.device)
        positions = linear = self.positions
        if self.rope_state is not None:
            positions = linear = self.rope_state.get_positions(rows)
        self.store.open_step(0, 1, rows)
        self.store.place(self.positions[:0], starts[:1], starts[:1], starts[:0], linear, positions)
        self.store.skip_step()

    @override
    def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> dict[str, Any]:
        """The buffers of `prepare_inputs`, for CUDA graphs to be captured with."""
        inputs = super().prepare_dummy_inputs(num_reqs, num_tokens)
        if self.rope_state is None:
            inputs["positions"] = self.positions[:num_tokens]
        return inputs

    @override
    def custom_sampler(self, sampler: Any) -> tuple[Any, Any]:
        """vLLM's sampler for steps without drafts, ours for the others."""
        config = self.vllm_config.speculative_config
        return sampler, TreeRejectionSampler(sampler, self.store, config, self.device)

    @override
    def postprocess_state(
        self,
        idx_mapping: torch.Tensor,
        num_sampled: torch.Tensor,
        num_computed_tokens: torch.Tensor | None = None,
    ) -> None:
        """After sampling and before drafting: move the accepted nodes' KV behind the root's."""
        super().postprocess_state(idx_mapping, num_sampled, num_computed_tokens)
        nodes, step = self.store.accepted_nodes(), self.store.step
        if nodes is not None and step is not None:
            self.settle(step.tree, step.root_rows, nodes)
