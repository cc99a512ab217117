"""Model Runner V2: drafts a tree for each request instead of a chain.

The draft's prefill is vLLM's own, on rows gathered along the accepted path. The levels
after it run eagerly, also where the target runs in CUDA graphs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from typing_extensions import override
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backends.utils import PAD_SLOT_ID
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.gpu.attn_utils import build_slot_mappings_by_layer
from vllm.v1.worker.gpu.block_table import BlockTables
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor
from vllm.v1.worker.gpu.dp_utils import DPSyncState
from vllm.v1.worker.gpu.input_batch import InputBatch, InputBuffers
from vllm.v1.worker.gpu.model_states import resolve_model_state_cls
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu.model_states.interface import ModelState
from vllm.v1.worker.gpu.spec_decode.eagle.speculator import EagleSpeculator
from vllm.v1.worker.gpu.spec_decode.target_dependent_ar.cudagraph_utils import (
    SpeculatorCudaGraphManager,
)
from vllm.v1.worker.utils import AttentionGroup

from vllm_msd.errors import ConfigError
from vllm_msd.tree import (
    DraftLevels,
    DraftTree,
    TreeRows,
    draft_level,
    grow_tree,
    lay_out_chains,
)
from vllm_msd.vllm_plugin.configuration.tree_settings import check_level_rows, tree_config
from vllm_msd.vllm_plugin.gpu.backend import register_attention, reserve_kv
from vllm_msd.vllm_plugin.gpu.model_state import TreeModelState
from vllm_msd.vllm_plugin.patches.overrides import check_overrides
from vllm_msd.vllm_plugin.trees.attention import attach


class TreeSpeculator(EagleSpeculator):
    """EAGLE's speculator, growing a tree from the draft's last row on.

    A level feeds ``top_k`` rows a request to the draft, where `DraftLevels` says they stand.
    """

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        check_overrides(TreeSpeculator)
        check_level_rows(vllm_config)
        register_attention(device)
        super().__init__(vllm_config, device)
        self.shape = tree_config(vllm_config).shape
        k = self.num_query_per_req = self.shape.top_k  # vLLM sizes its dummy runs by this
        self.query_starts = torch.arange(
            0, (self.max_num_reqs + 1) * k, k, dtype=torch.int32, device=device
        )

    @override
    def load_model(self, target_model: nn.Module) -> None:
        """Load the draft, and give the target the model state that knows trees."""
        super().load_model(target_model)
        state = resolve_model_state_cls(self.vllm_config, target_model)
        if state is not DefaultModelState:
            raise ConfigError(
                f"MSD's draft trees do not work with this target: vLLM keeps {state.__name__} for "
                "it. Leave tree_depth and tree_top_k out to draft chains."
            )
        target_model.get_model_state_cls = lambda: TreeModelState

    @override
    def set_attn(
        self,
        model_state: ModelState,
        kv_cache_config: KVCacheConfig,
        block_tables: BlockTables,
        target_input_buffers: InputBuffers,
        target_attn_groups: list[list[AttentionGroup]],
    ) -> None:
        """vLLM calls this right before it allocates the KV cache by this config."""
        super().set_attn(
            model_state, kv_cache_config, block_tables, target_input_buffers, target_attn_groups
        )
        reserve_kv(kv_cache_config, self.vllm_config)

    @override
    def init_cudagraph_manager(self, cudagraph_mode: CUDAGraphMode) -> None:
        """As the base class, without graphs for the draft levels."""
        super().init_cudagraph_manager(cudagraph_mode)
        self.decode_cudagraph_manager = SpeculatorCudaGraphManager(
            self.vllm_config, self.device, CUDAGraphMode.NONE, decode_query_len=1
        )

    @override
    def sample_draft(
        self, hidden_states: torch.Tensor, sample_src_positions: torch.Tensor, *args, **kwargs
    ) -> torch.Tensor:
        """The draft prefill's one draw; the tree starts from the logits and does not use it."""
        return torch.zeros_like(sample_src_positions)

    @override
    @torch.inference_mode()
    def propose(
        self,
        input_batch: InputBatch,
        attn_metadata: dict[str, Any],
        slot_mappings: dict[str, torch.Tensor],
        last_hidden_states: torch.Tensor,
        aux_hidden_states: list[torch.Tensor] | None,
        num_sampled: torch.Tensor,
        num_rejected: torch.Tensor,
        last_sampled: torch.Tensor,
        next_prefill_tokens: torch.Tensor,
        temperature: torch.Tensor,
        seeds: torch.Tensor,
        dp_sync_state: DPSyncState | None = None,
        dummy_run: bool = False,
        skip_attn_for_dummy_run: bool = False,
        mm_inputs: tuple[list[torch.Tensor], torch.Tensor] | None = None,
        is_profile: bool = False,
        num_speculative_tokens: int | None = None,
    ) -> torch.Tensor:
        """Draft a tree for each request of the batch.

        Returns:
            ``[R, num_speculative_tokens]`` int64, the nodes' tokens; their parents go to the
            store.
        """
        num_reqs, slots = input_batch.num_reqs, input_batch.idx_mapping
        rows = self.model_state.store.path_rows(len(last_hidden_states)) if not dummy_run else None
        if rows is not None:
            input_batch.input_ids.copy_(input_batch.input_ids[rows])
            last_hidden_states = last_hidden_states[rows]
        drafts = super().propose(
            input_batch,
            attn_metadata,
            slot_mappings,
            last_hidden_states,
            aux_hidden_states,
            num_sampled,
            num_rejected,
            last_sampled,
            next_prefill_tokens,
            temperature,
            seeds,
            dp_sync_state,
            dummy_run,
            skip_attn_for_dummy_run,
            mm_inputs,
            is_profile,
            num_speculative_tokens=0 if num_speculative_tokens == 0 else 1,
        )
        if num_speculative_tokens == 0:
            return drafts
        tree = self._grow(
            last_sampled[slots, 0],
            input_batch.seq_lens_cpu_upper_bound[:num_reqs],
            with_attention=not (dummy_run and skip_attn_for_dummy_run),
        )
        if not dummy_run:  # a dummy batch names the slots of real requests
            as_chain = self.model_state.as_chain[input_batch.idx_mapping_np]
            if as_chain.any():
                tree = lay_out_chains(tree, async_tensor_h2d(as_chain, device=self.device))
            self.model_state.store.put(slots, tree)
        self.draft_tokens[:num_reqs] = tree.tokens[:, 1:]
        return self.draft_tokens[:num_reqs]

    def _grow(
        self, root_tokens: torch.Tensor, seq_lens_cpu: torch.Tensor, with_attention: bool
    ) -> DraftTree:
        """Grow trees from what the draft prefill left in the buffers.

        Args:
            root_tokens: ``[R]`` int64.
            seq_lens_cpu: ``[R]`` int32 on the host, at least the requests' lengths.
            with_attention: False in the memory profile, where there is no KV cache yet.
        """
        k, buffers = self.shape.top_k, self.input_buffers
        num_reqs = len(root_tokens)
        num_rows = num_reqs * k
        last_hidden = self.hidden_states[:num_reqs].clone()
        levels = DraftLevels(
            buffers.positions[:num_reqs] + 1, self.shape.depth, k, self.max_model_len
        )
        tree_start = levels.tree_start()
        tree: TreeRows | None = None
        buffers.query_start_loc.copy_(self.query_starts.clamp(max=num_rows))
        longest = int(seq_lens_cpu.max()) + self.shape.depth * k
        self.draft_max_seq_len = min(longest, self.max_model_len)
        step = BatchExecutionDescriptor(
            cg_mode=CUDAGraphMode.NONE, num_tokens=num_rows, num_reqs=num_reqs
        )

        def expand(
            tokens: torch.Tensor, hidden: torch.Tensor, visible: torch.Tensor, level: int
        ) -> tuple[torch.Tensor, torch.Tensor]:
            nonlocal tree
            tree = draft_level(tree_start, visible, tree)
            buffers.input_ids[:num_rows] = tokens.flatten()
            self.hidden_states[:num_rows] = hidden.flatten(0, 1)
            metadata = slot_mappings = None
            if with_attention:
                slot_mappings = self._slot_mappings(*levels.kv_positions(level), num_reqs)
                buffers.seq_lens[:num_reqs] = levels.seq_lens(level)
            buffers.positions[:num_rows] = levels.rotary_positions(level)
            if with_attention:
                metadata = self._build_uniform_attn_metadata(
                    step, num_reqs, k, seq_lens_cpu, (level + 1) * k
                )
                attach(metadata, tree)
            last, out = self._run_model(num_rows, metadata, slot_mappings, None)
            logits = self.compute_draft_logits(last[:num_rows], 0)
            return logits.unflatten(0, (num_reqs, k)), out[:num_rows].unflatten(0, (num_reqs, k))

        root_logits = self.compute_draft_logits(last_hidden, 0)
        return grow_tree(root_tokens, root_logits, last_hidden, expand, self.shape)

    def _slot_mappings(
        self, positions: torch.Tensor, is_past: torch.Tensor, num_reqs: int
    ) -> dict[str, torch.Tensor]:
        """KV slots of a level's rows by layer, from `DraftLevels.kv_positions` of R requests."""
        slots = self.block_tables.compute_slot_mappings(
            self.idx_mapping[:num_reqs],
            self.input_buffers.query_start_loc[: num_reqs + 1],
            positions,
            len(positions),
        )
        slots.masked_fill_(is_past, PAD_SLOT_ID)
        return build_slot_mappings_by_layer(slots, self.kv_cache_config)
