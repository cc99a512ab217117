"""Model Runner V2: which nodes of the drafted trees are accepted."""

from __future__ import annotations

import numpy as np
import torch
from typing_extensions import override
from vllm.config import SpeculativeConfig
from vllm.config.model import PROCESSED_LOGPROBS_MODES
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.worker.gpu.sample.gumbel import gumbel_sample
from vllm.v1.worker.gpu.sample.sampler import Sampler
from vllm.v1.worker.gpu.sample.states import NO_LOGPROBS
from vllm.v1.worker.gpu.spec_decode.rejection_sampler import RejectionSampler

from vllm_msd.tree import TreeStore, path_index
from vllm_msd.vllm_plugin.patches.overrides import check_overrides


class TreeRejectionSampler(RejectionSampler):
    """Draws one token after every node as vLLM's sampler would there, and walks along the draws.

    The noise of a draw depends on the request's seed and the position alone, so a seeded request
    gets the tokens that it would get without speculation.
    """

    def __init__(
        self,
        sampler: Sampler,
        store: TreeStore,
        spec_config: SpeculativeConfig,
        device: torch.device,
    ) -> None:
        check_overrides(TreeRejectionSampler)
        super().__init__(sampler, spec_config, device)
        self.store = store
        self._processed_logprobs = sampler.logprobs_mode in PROCESSED_LOGPROBS_MODES

    @override
    def _verify(
        self,
        logits: torch.Tensor,
        draft_logits: torch.Tensor | None,
        draft_sampled: torch.Tensor,
        pos: torch.Tensor,
        cu_num_logits: torch.Tensor,
        idx_mapping: torch.Tensor,
        idx_mapping_np: np.ndarray,
        expanded_idx_mapping: torch.Tensor,
        expanded_local_pos: torch.Tensor,
        seq_lens_upper_bound_np: np.ndarray,
        verify_draft_sampled: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As the base class: processed logits, sampled tokens ``[R, T]`` and how many of them.

        ``pos`` holds the linear positions of the rows; a row is sampled for the one of its depth.
        """
        sampler = self.sampler
        pos = pos + self.store.next_shifts(len(pos))
        processed = sampler.apply_sampling_params(
            logits,
            expanded_idx_mapping,
            idx_mapping,
            idx_mapping_np,
            pos,
            draft_sampled,
            expanded_local_pos,
            seq_lens_upper_bound_np,
        )
        drawn = gumbel_sample(
            processed,
            expanded_idx_mapping,
            sampler.sampling_states.temperature.gpu,
            sampler.sampling_states.seeds.gpu,
            pos,
            apply_temperature=False,
            is_drafting=False,
            use_fp64=sampler.use_fp64_gumbel,
        )
        accepted = self.store.accept(idx_mapping, cu_num_logits, drawn, verify_draft_sampled)
        if self._processed_logprobs or sampler.return_sampling_mask:
            processed = processed[_path_rows(cu_num_logits, accepted.nodes, len(processed))]
        return processed, accepted.tokens, (accepted.lengths + 1).int()

    @override
    def _get_logprobs_tensors(
        self,
        sampled: torch.Tensor,
        num_sampled: torch.Tensor,
        logits: torch.Tensor,
        cu_num_logits: torch.Tensor,
        cu_num_logits_np: np.ndarray,
        max_num_logprobs: int,
    ) -> LogprobsTensors | None:
        """As the base class, whose i-th row is the i-th accepted token's; here they are nodes."""
        if max_num_logprobs != NO_LOGPROBS and not self._processed_logprobs:
            logits = logits[_path_rows(cu_num_logits, self.store.accepted[-1].nodes, len(logits))]
        return super()._get_logprobs_tensors(
            sampled, num_sampled, logits, cu_num_logits, cu_num_logits_np, max_num_logprobs
        )


def _path_rows(cu_num_logits: torch.Tensor, nodes: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Where to find the rows of the accepted nodes, each request's first ones in their order."""
    return path_index(cu_num_logits[:-1].long(), nodes, num_rows)
