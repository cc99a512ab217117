"""Model Runner V2: drafts a tree for each request instead of a chain.

The draft's prefill is vLLM's own, on rows moved along the accepted path; where all requests
verified a tree, it is a compact one (`compact_prefill`). The levels after it are in
`drafting_round`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from typing_extensions import override
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.gpu.block_table import BlockTables
from vllm.v1.worker.gpu.dp_utils import DPSyncState
from vllm.v1.worker.gpu.input_batch import InputBatch, InputBuffers
from vllm.v1.worker.gpu.model_states import resolve_model_state_cls
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu.model_states.interface import ModelState
from vllm.v1.worker.utils import AttentionGroup

from vllm_msd.errors import ConfigError
from vllm_msd.roofline.scratch import float_rows, verification_rows
from vllm_msd.tree.fused import GrowthBuffers
from vllm_msd.vllm_plugin.configuration.capture_sizes import drafted_by_requests
from vllm_msd.vllm_plugin.configuration.tree_settings import requests_at_once, tree_config
from vllm_msd.vllm_plugin.gpu.backend import provide_workspace, register_attention, reserve_kv
from vllm_msd.vllm_plugin.gpu.chain_speculator import ChainSpeculator
from vllm_msd.vllm_plugin.gpu.compact_prefill import CompactPrefill
from vllm_msd.vllm_plugin.gpu.drafting_round import DraftingRound
from vllm_msd.vllm_plugin.gpu.head import DraftHead
from vllm_msd.vllm_plugin.gpu.model_state import TreeModelState
from vllm_msd.vllm_plugin.gpu.tree_graphs import TreeCudaGraphManager
from vllm_msd.vllm_plugin.patches.overrides import check_overrides


class TreeSpeculator(ChainSpeculator):
    """EAGLE's speculator, growing a tree from the draft's last row on.

    A level feeds ``top_k`` rows a request to the draft, where `beam_step` puts them. More requests
    than `requests_at_once` are drafted for in turn, so that a level's rows fit vLLM's buffers and
    its logits stay small.
    """

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        for cls in (TreeSpeculator, ChainSpeculator, TreeCudaGraphManager):
            check_overrides(cls)
        register_attention()
        super().__init__(vllm_config, device)
        self.shape = tree_config(vllm_config).shape
        k = self.num_query_per_req = self.shape.top_k  # vLLM sizes its dummy runs by this
        requests = self.max_num_reqs
        self.query_starts = torch.arange(0, (requests + 1) * k, k, dtype=torch.int32, device=device)
        # What the draft's prefill leaves, out of the way of the levels' rows.
        self.first = torch.zeros(requests, dtype=torch.int64, device=device)
        self.root_hidden = torch.zeros(
            requests, self.hidden_states.shape[1], dtype=self.hidden_states.dtype, device=device
        )
        # In the memory profile there is no KV cache, and no request has a slot.
        self.block_table = torch.zeros(1, 1, dtype=torch.int32, device=device)
        self.kv_slots = torch.full((self.max_num_tokens,), -1, dtype=torch.int64, device=device)
        self.block_size = 1
        self.compact, self.round = CompactPrefill(self), DraftingRound(self)
        # An attribute beside vLLM's own, so that vLLM finds it when it measures graphs' memory.
        self.compact_cudagraph_manager: TreeCudaGraphManager | None = None

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

        def make_state(*args: Any, **kwargs: Any) -> TreeModelState:
            # Known from here on: vLLM's memory profile drafts before it calls `set_attn`.
            self.model_state = TreeModelState(*args, **kwargs)
            return self.model_state

        target_model.get_model_state_cls = lambda: make_state
        self.target_logits = target_model.compute_logits
        provide_workspace(self.vllm_config, self.device)
        self.head = DraftHead(self.model)
        columns = self.head.columns
        self.requests_at_once = requests_at_once(self.vllm_config, columns, self.dtype.itemsize)
        self.buffers = GrowthBuffers.allocate(
            self.shape, self.requests_at_once, columns, self.device
        )

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
        groups = kv_cache_config.kv_cache_groups
        (group,) = {
            number
            for number, group in enumerate(groups)
            for name in group.layer_names
            if name in self.draft_attn_layer_names
        }
        self.kv_slots = block_tables.slot_mappings[group]
        self.block_table = block_tables.block_tables[group].gpu
        self.block_size = block_tables.block_sizes[group]

    @override
    def init_cudagraph_manager(self, cudagraph_mode: CUDAGraphMode) -> None:
        """As the base class, with graphs of whole rounds in the place of a chain's steps."""
        super().init_cudagraph_manager(cudagraph_mode)
        mode = CUDAGraphMode.NONE
        # Otherwise each level needs metadata that the host has built.
        if self.supports_decode_metadata_update and (
            cudagraph_mode.decode_mode() == CUDAGraphMode.FULL
        ):
            mode = CUDAGraphMode.FULL_DECODE_ONLY
        drafted = drafted_by_requests(self.vllm_config)
        levels = {n: self.shape.levels_of(nodes) for n, nodes in drafted.items()}
        self.decode_cudagraph_manager = TreeCudaGraphManager(
            self.vllm_config,
            self.device,
            mode,
            self.shape.top_k,
            most_requests=self.requests_at_once,
            levels=levels,
        )
        width = self.compact.width
        self.compact_cudagraph_manager = TreeCudaGraphManager(
            self.vllm_config,
            self.device,
            mode,
            width,
            most_requests=self.max_num_reqs,
            least_rows=width,
        )

    @override
    def capture(self) -> None:
        """As the base class, and the compact prefill."""
        super().capture()
        self.compact.capture()

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

        A schedule asks for fewer nodes in some steps: no more levels are drafted than their tree
        can have, and none where it asks for no nodes.

        Returns:
            ``[R, n]`` int64 for all n nodes of a whole tree, the nodes' tokens; their parents go to
            the store. The nodes asked for come first.
        """
        num_reqs, slots = input_batch.num_reqs, input_batch.idx_mapping
        if not dummy_run and num_speculative_tokens != 0 and self.compact.fits(input_batch):
            self.compact.run(input_batch, last_hidden_states, last_sampled)
        else:
            if not dummy_run:
                self.model_state.store.move_accepted(input_batch.input_ids, last_hidden_states)
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
        shape = self.shape
        if num_speculative_tokens is not None:
            shape = shape.shallower(shape.levels_for(num_speculative_tokens))
        self.round.run(
            num_reqs,
            shape.depth,
            input_batch.seq_lens_cpu_upper_bound[:num_reqs],
            with_attention=not (dummy_run and skip_attn_for_dummy_run),
            eager=is_profile,
        )
        if is_profile:
            self._profile_verification(last_hidden_states)
        if not dummy_run:  # a dummy batch names the slots of real requests
            as_chain = self.model_state.as_chain[input_batch.idx_mapping_np]
            if as_chain.any():
                turn = async_tensor_h2d(as_chain, device=self.device)
                drafted = self.draft_tokens[:num_reqs, : shape.total_tokens - 1]
                self.model_state.store.turn_into_chains(slots, drafted, turn)
        return self.draft_tokens[:num_reqs]

    def _profile_verification(self, hidden: torch.Tensor) -> None:
        """Take the memory of the largest verification's logits, for vLLM's profile to see.

        vLLM's own dummy step has one row of logits a request.

        Args:
            hidden: ``[rows, H]`` the target's, of as many rows as a step has at most.
        """
        nodes = self.num_speculative_steps
        rows = verification_rows(self.max_num_reqs, nodes, len(hidden))
        logits = self.target_logits(hidden[:rows])
        logits[: float_rows(rows, nodes, logits.shape[1])].float()

    def refresh_block_tables(self) -> None:
        """Bring up to date what the draft's graphs read of the batch's block tables."""
        for groups in self.attn_groups:
            for group in groups:
                group.map_to_kernel_block_table(
                    self.block_tables.input_block_tables[group.kv_cache_group_id]
                )

    @override
    def _generate_fused_drafts(
        self,
        num_reqs: int,
        num_tokens_padded: int,
        attn_metadata: dict[str, Any] | None,
        slot_mappings: dict[str, torch.Tensor] | None,
        num_tokens_across_dp: torch.Tensor | None,
        cudagraph_runtime_mode: CUDAGraphMode,
        num_speculative_steps: int = 0,
    ) -> None:
        """What vLLM captures: ``num_speculative_steps`` levels, over one metadata object.

        What the parent of our attention prepares on the device is not brought up to date: every row
        of a level is in a tree, and takes the tree kernel.
        """
        self.round.keep_roots(num_reqs)
        self.round.grow(
            slice(0, num_reqs), num_speculative_steps, slot_mappings, lambda level: attn_metadata
        )
