"""Model Runner V1 with draft trees, on the CPU.

A step keeps its linear KV slots; a tree changes the rotary positions, the attention and the
acceptance. After acceptance the rows of the accepted path are moved to the front of the tree's
rows. From there on vLLM sees an ordinary chain with rejected rows behind it.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override
from vllm.config import VllmConfig
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.outputs import DraftTokenIds, SamplerOutput
from vllm.v1.sample.logits_processor import LogitBiasLogitsProcessor, MinPLogitsProcessor
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.gpu_input_batch import CachedRequestState

from vllm_msd.tree import DraftTree, TreeStore
from vllm_msd.vllm_plugin.configuration.tree_settings import auto_shapes, tree_config
from vllm_msd.vllm_plugin.cpu.attention import settle_cpu
from vllm_msd.vllm_plugin.cpu.auto_drafter import AutoProposer
from vllm_msd.vllm_plugin.cpu.cost_probe import prepare_budget
from vllm_msd.vllm_plugin.cpu.sampler import TreeRejectionSampler
from vllm_msd.vllm_plugin.cpu.scratch import bind_scratch, scratch_blocks, with_scratch
from vllm_msd.vllm_plugin.cpu.step import StepNodes
from vllm_msd.vllm_plugin.cpu.tree_drafter import TreeProposer
from vllm_msd.vllm_plugin.drafted_nodes import FROM_WORKER
from vllm_msd.vllm_plugin.patches.overrides import check_overrides
from vllm_msd.vllm_plugin.trees.attention import attach
from vllm_msd.vllm_plugin.trees.constrained import needs_chain


class TreeModelRunner(CPUModelRunner):
    """Verifies and drafts trees where the base class verifies and drafts chains.

    Order of a step: `_prepare_inputs` puts its trees into the store, which everything after it
    reads; `_build_attention_metadata`; the forward pass; `_sample` accepts and settles; then
    `propose_draft_token_ids` drafts the next trees.
    """

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        for cls in (TreeModelRunner, TreeProposer, AutoProposer, TreeRejectionSampler):
            check_overrides(cls)
        super().__init__(vllm_config, device)
        # vLLM leaves these two out where it speculates.
        processors = self.input_batch.logitsprocs
        processors.non_argmax_invariant.append(LogitBiasLogitsProcessor(vllm_config, device, False))
        processors.argmax_invariant.append(MinPLogitsProcessor(vllm_config, device, False))
        is_auto = bool(auto_shapes(vllm_config))
        self.drafter = (AutoProposer if is_auto else TreeProposer)(vllm_config, device, self)
        num_nodes = tree_config(vllm_config).num_nodes + 1
        self.store = TreeStore(self.max_num_reqs, self.max_num_tokens, num_nodes)
        self.rejection_sampler = TreeRejectionSampler(
            self.sampler, self.store, vllm_config.speculative_config, device
        )
        # The tree drafted last for each request: by its id, as rows of a batch move.
        self.drafted: dict[str, DraftTree] = {}
        self.step: StepNodes | None = None
        self.path_rows: Tensor | None = None

    @override
    def initialize_kv_cache_tensors(
        self,
        kv_cache_config: KVCacheConfig,
        kernel_block_sizes: list[int],
        kv_cache_allocation_context: AbstractContextManager | None = None,
    ) -> dict[str, Tensor]:
        """As the base class, with scratch blocks for tree attention behind the cache."""
        caches = super().initialize_kv_cache_tensors(
            with_scratch(kv_cache_config, scratch_blocks(self.vllm_config)),
            kernel_block_sizes,
            kv_cache_allocation_context,
        )
        bind_scratch(kv_cache_config, self.compilation_config.static_forward_context)
        return caches

    @override
    def initialize_kv_cache(
        self, kv_cache_config: KVCacheConfig, is_profiling: bool = False, *args: Any, **kwargs: Any
    ) -> None:
        """As the base class; then find out what steps cost, where sizes are chosen by that."""
        super().initialize_kv_cache(kv_cache_config, is_profiling, *args, **kwargs)
        if isinstance(self.drafter, AutoProposer) and not is_profiling:
            prepare_budget(self)

    @override
    def _on_request_state_removed(self, req_id: str, req_state: CachedRequestState | None) -> None:
        """Forget the request's tree."""
        super()._on_request_state_removed(req_id, req_state)
        self.drafted.pop(req_id, None)
        if isinstance(self.drafter, AutoProposer):
            self.drafter.backlog.drop(req_id)

    @override
    def _prepare_inputs(
        self, scheduler_output: SchedulerOutput, num_scheduled_tokens: np.ndarray
    ) -> tuple[Tensor, SpecDecodeMetadata | None, int]:
        """As the base class; then take the step's trees and write rotary positions.

        The base class has computed the KV slots from the linear positions by then.
        """
        result = super()._prepare_inputs(scheduler_output, num_scheduled_tokens)
        self.step = self.path_rows = None
        metadata = result[1]
        if metadata is not None and metadata.max_spec_len > 0:
            drafted = [self.drafted.get(req_id) for req_id in self.input_batch.req_ids]
            self.step = StepNodes.build(self.store, metadata, drafted)
            if self.step.has_trees:
                self._rotary_positions()[..., self.step.rows] += self.step.shift
        self.rejection_sampler.step = self.step
        return result

    def _rotary_positions(self) -> Tensor:
        """What the target rotates by: ``[rows]``, or ``[axes, rows]`` under M-RoPE."""
        return self.mrope_positions.gpu if self.uses_mrope else self.positions

    @override
    def _build_attention_metadata(
        self, num_tokens: int, num_reqs: int, max_query_len: int, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        """As the base class; the step's trees go to the attention backend with the metadata."""
        result = super()._build_attention_metadata(
            num_tokens, num_reqs, max_query_len, *args, **kwargs
        )
        step = self.step
        if step is not None:
            tree = self.store.begin_step(
                step.slots,
                step.nodes,
                step.rows,
                step.row_start,
                self.seq_lens[:num_reqs],
                num_reqs,
                num_tokens,
            )
            if step.has_trees:
                attach(result[0], tree)
        return result

    @override
    def _sample(
        self, logits: Tensor | None, spec_decode_metadata: SpecDecodeMetadata | None
    ) -> SamplerOutput:
        """As the base class; then settle the KV cache, and gather token ids and positions."""
        output = super()._sample(logits, spec_decode_metadata)
        step = self.step
        if step is not None and step.has_trees:
            tree, root_rows = self.store.step.tree, self.store.step.root_rows
            settle_cpu(tree, root_rows, self.store.accepted_nodes())
            tree.derived.clear()  # the attention backend keeps copies of keys and values there
            num_rows = len(tree.ancestors)
            self.path_rows = self.store.path_rows(num_rows)
            if self.path_rows is not None:
                input_ids = self.input_ids.gpu[:num_rows]
                input_ids.copy_(input_ids[self.path_rows])
            self._rotary_positions()[..., step.rows] -= step.shift
        if step is not None and isinstance(self.drafter, AutoProposer):
            drafted = [self.drafted.get(req_id) for req_id in self.input_batch.req_ids]
            self.drafter.learn(drafted, step, self.store.accepted_nodes())
        return output

    @override
    def propose_draft_token_ids(
        self,
        scheduler_output: SchedulerOutput,
        sampled_token_ids: Tensor | list[list[int]],
        sampling_metadata: SamplingMetadata,
        hidden_states: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor | list[list[int]]:
        """As the base class, from the accepted path's hidden states; remembers the trees."""
        if self.path_rows is not None:
            hidden_states = hidden_states[self.path_rows]
        req_ids = self.input_batch.req_ids
        self.drafter.as_chain = torch.tensor([self._needs_chain(req_id) for req_id in req_ids])
        self.drafter.limits = self._limits()
        tokens = super().propose_draft_token_ids(
            scheduler_output, sampled_token_ids, sampling_metadata, hidden_states, *args, **kwargs
        )
        if self.drafter.drafted is not None:
            self.drafted.update(zip(req_ids, self.drafter.drafted.by_request(), strict=True))
        return tokens

    @override
    def take_draft_token_ids(self) -> DraftTokenIds | None:
        """As the base class; says how many nodes were drafted, of which some may be handed over."""
        taken = super().take_draft_token_ids()
        if taken is not None:
            tree = self.drafter.drafted
            nodes = 0 if tree is None else tree.tokens[:, 1:].numel()
            setattr(taken, FROM_WORKER, nodes)
        return taken

    def _limits(self) -> list[int]:
        """The most nodes that each request of the batch may have; 0 while its prompt is read."""
        is_unfinished = self.discard_request_mask.np[: self.input_batch.num_reqs].tolist()
        limits = []
        for wanted, unfinished in zip(self.drafter.request_limits(), is_unfinished, strict=True):
            most = self.store.num_nodes if wanted is None else wanted
            limits.append(0 if unfinished else most)
        return limits

    def _needs_chain(self, req_id: str) -> bool:
        """Whether the logits of this request depend on the drafted rows before them."""
        request = self.requests[req_id]
        params = request.sampling_params
        # vLLM counts drafted rows, not depths, to find out when min_tokens is reached.
        return needs_chain(params) or len(request.output_token_ids) < params.min_tokens
