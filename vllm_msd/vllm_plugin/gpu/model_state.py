"""Model Runner V2: the target's side of draft trees.

vLLM schedules a tree like a chain: node i of a request stands i rows after the root and its KV
goes to the i-th slot after the root's. Here rows get their tree's rotary positions and attention,
and after acceptance the accepted path becomes the chain that vLLM takes it for.
"""

from __future__ import annotations

from dataclasses import dataclass
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

from vllm_msd.tree import DraftTree, chain_parents, settle_index
from vllm_msd.vllm_plugin.configuration.tree_settings import tree_config
from vllm_msd.vllm_plugin.gpu.backend import bind_kv
from vllm_msd.vllm_plugin.gpu.sampler import TreeRejectionSampler
from vllm_msd.vllm_plugin.patches.overrides import check_overrides
from vllm_msd.vllm_plugin.trees.constrained import needs_chain
from vllm_msd.vllm_plugin.trees.rows import TreeRows, attach


@dataclass(frozen=True)
class Step:
    """The trees of one forward pass. ``root_rows [R]`` int64: the row of each request's root."""

    tree: TreeRows
    root_rows: torch.Tensor


class TreeModelState(DefaultModelState):
    """Holds each request's tree and applies it to the target's passes.

    Between steps a tree is kept under its request's slot, next to vLLM's draft tokens; a slot
    starts with a chain, for which vLLM's own behaviour is exact. A tree that is stale but
    consistent costs speed only, so parents are written in one place, with what follows from them.

    ``parents``, ``depths``, ``ancestors``: ``[slots, T]`` int64, as in `DraftTree`.
    ``as_chain [slots]`` bool on the host: requests whose next trees have to be chains.
    ``accepted``: ``[R, T]`` int64 nodes accepted in this step, padded with -1, in batch order; None
    until the walk and where nobody had drafts.
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
        self.num_nodes = tree_config(vllm_config).num_nodes + 1
        parents = chain_parents(1, self.num_nodes, device)
        self.chain = DraftTree.from_parents(torch.zeros_like(parents), parents)
        self.parents, self.depths, self.ancestors = (
            relation.repeat(self.max_num_reqs, 1)
            for relation in (self.chain.parents, self.chain.depths, self.chain.ancestors)
        )
        self.as_chain = np.zeros(self.max_num_reqs, dtype=np.bool_)
        self.accepted: torch.Tensor | None = None
        self.step: Step | None = None
        # Of the current step. CUDA graphs read these very tensors, so they are written in place.
        rows = self.max_num_tokens
        self.positions = torch.zeros(rows, dtype=torch.int64, device=device)
        self.row_ancestors = torch.zeros(rows, dtype=torch.int64, device=device)
        self.tree_start = torch.full((self.max_num_reqs,), -1, dtype=torch.int32, device=device)

    def set_trees(self, slots: torch.Tensor | slice, tree: DraftTree) -> None:
        """Keep the trees of R requests under their slots (``[R]`` int64)."""
        self.parents[slots] = tree.parents
        self.depths[slots] = tree.depths
        self.ancestors[slots] = tree.ancestors

    def shift(self, slots: torch.Tensor, nodes: torch.Tensor) -> torch.Tensor:
        """Depth minus node number, int64: how far the nodes' positions are from linear ones."""
        return self.depths[slots, nodes] - nodes

    def settled_rows(self, num_rows: int) -> torch.Tensor | None:
        """Where each row of the settled step comes from (`settle_index`); None: all stay."""
        if self.accepted is None or self.step is None:
            return None
        return settle_index(self.step.root_rows, self.accepted, num_rows)

    @override
    def add_request(self, req_index: int, new_req_data: NewRequestData) -> None:
        """A new request (or one that was preempted) starts with a chain."""
        super().add_request(req_index, new_req_data)
        self.set_trees(slice(req_index, req_index + 1), self.chain)
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
        """vLLM's metadata with the trees attached.

        Also where nobody has a tree: a CUDA graph captured then serves steps that have.
        """
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
        batch, num_reqs = input_batch, input_batch.num_reqs
        num_nodes = batch.cu_num_logits.diff()
        self.tree_start.fill_(-1)
        self.tree_start[:num_reqs] = torch.where(
            num_nodes > 1, batch.seq_lens[:num_reqs] - num_nodes, -1
        )
        self.row_ancestors[batch.logits_indices] = self.ancestors[
            batch.expanded_idx_mapping, batch.expanded_local_pos
        ]
        tree = TreeRows(
            self.tree_start[: batch.num_reqs_after_padding],
            self.row_ancestors[: batch.num_tokens_after_padding],
            is_draft=False,
        )
        attach(metadata, tree)
        root_rows = (batch.query_start_loc[1 : num_reqs + 1] - num_nodes).long()
        self.step = Step(tree, root_rows)
        self.accepted = None
        return metadata

    @override
    def prepare_inputs(self, input_batch: InputBatch, req_states: RequestState) -> dict[str, Any]:
        """Rotary positions: a node's is its root's plus its depth."""
        inputs = super().prepare_inputs(input_batch, req_states)
        rows = input_batch.logits_indices
        shift = self.shift(input_batch.expanded_idx_mapping, input_batch.expanded_local_pos)
        if self.rope_state is not None:
            self.rope_state.positions[:, rows] += shift
            return inputs
        positions = self.positions[: input_batch.num_tokens_after_padding]
        positions.copy_(input_batch.positions)
        positions[rows] += shift
        return {**inputs, "positions": positions}

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
        return sampler, TreeRejectionSampler(sampler, self)

    @override
    def postprocess_state(
        self,
        idx_mapping: torch.Tensor,
        num_sampled: torch.Tensor,
        num_computed_tokens: torch.Tensor | None = None,
    ) -> None:
        """After sampling and before drafting: move the accepted nodes' KV behind the root's."""
        super().postprocess_state(idx_mapping, num_sampled, num_computed_tokens)
        if self.accepted is not None:
            self.settle(self.step.tree, self.step.root_rows, self.accepted)
