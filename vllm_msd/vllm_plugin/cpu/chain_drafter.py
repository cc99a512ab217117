"""Model Runner V1's drafter for MSD: vLLM's EAGLE proposer with five mends.

Model Runner V2 needs none of them. Each mend concerns only which rows and positions the draft gets;
a wrong one changes no output, it costs accepted tokens.
"""

from typing import Any

import torch
from torch import nn
from typing_extensions import override
from vllm.lora.layers import BaseLayerWithLoRA
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.spec_decode.eagle import EagleProposer
from vllm.v1.worker.gpu_input_batch import CachedRequestState, InputBatch

from vllm_msd.vllm_plugin.configuration.request_options import node_limit


class MSDProposer(EagleProposer):
    """Drafts a chain with an MSD draft under Model Runner V1."""

    def __init__(self, vllm_config, device, runner=None) -> None:
        if vllm_config.speculative_config.disable_padded_drafter_batch:
            raise ValueError(
                "MSD under Model Runner V1: got disable_padded_drafter_batch=true, expected false. "
                "The image mask covers all scheduled rows; remove the option."
            )
        super().__init__(vllm_config, device, runner)
        self.runner = runner

    def load_model(self, target_model: nn.Module) -> None:
        """Load the draft and share the target's embedding and head with it."""
        # The stock code reads image_token_index of any target it does not list; Qwen2-VL is not
        # listed and calls it image_token_id.
        config = getattr(target_model, "config", None)
        if not hasattr(config, "image_token_index") and hasattr(config, "image_token_id"):
            config.image_token_index = config.image_token_id
        super().load_model(target_model)
        # The target's adapters are not the draft's; Model Runner V2 sees to it itself.
        embedding = self.model.model.embed_tokens
        if isinstance(embedding, BaseLayerWithLoRA):
            self.model.model.embed_tokens = embedding.base_layer
        # The runner stops drafting for the whole batch while any request is within
        # num_speculative_tokens of max_model_len, which leaves holes in the other requests' draft
        # caches. Drafting past the end is safe (such rows get the padding slot and the scheduler
        # cuts the drafts), so lift the limit by that much.
        self.runner.effective_drafter_max_model_len = (
            self.max_model_len + self.runner.num_spec_tokens
        )

    @override
    def propose(self, *args: Any, **kwargs: Any) -> torch.Tensor | list[list[int]]:
        """As the base class; a list where requests want fewer tokens than others."""
        return self._within_limits(super().propose(*args, **kwargs))

    def request_limits(self) -> list[int | None]:
        """How many nodes each request of the batch wants at most; None if it does not say."""
        requests = self.runner.requests
        return [
            node_limit(requests[req_id].sampling_params)
            for req_id in self.runner.input_batch.req_ids
        ]

    def _within_limits(self, tokens: torch.Tensor) -> torch.Tensor | list[list[int]]:
        """Cut ``[R, tokens]`` to what requests want."""
        limits = self.request_limits()
        if all(limit is None for limit in limits):
            return tokens
        return [own[:limit] for own, limit in zip(tokens.tolist(), limits, strict=True)]

    def prepare_next_token_ids_padded(
        self,
        sampled_token_ids: torch.Tensor,
        requests: dict[str, CachedRequestState],
        gpu_input_batch: InputBatch,
        discard_request_mask: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As the base class, but a prompt's unfinished chunk ends with the token that follows it.

        The base class puts the prompt's last token there; the row then poisons the draft's cache.
        """
        next_token_ids, valid_counts = super().prepare_next_token_ids_padded(
            sampled_token_ids, requests, gpu_input_batch, discard_request_mask
        )
        num_reqs = gpu_input_batch.num_reqs
        is_unfinished = self.runner.discard_request_mask.np[:num_reqs]
        if is_unfinished.any():
            seq_lens = self.runner.optimistic_seq_lens_cpu[:num_reqs].tolist()
            following = [
                requests[req_id].get_token_id(seq_len) if unfinished else 0
                for req_id, seq_len, unfinished in zip(
                    gpu_input_batch.req_ids, seq_lens, is_unfinished, strict=False
                )
            ]
            following = torch.tensor(following, dtype=next_token_ids.dtype).to(
                next_token_ids.device, non_blocking=True
            )
            next_token_ids = torch.where(discard_request_mask[:num_reqs], following, next_token_ids)
        return next_token_ids, valid_counts

    def set_inputs_first_pass(
        self,
        target_token_ids: torch.Tensor,
        next_token_ids: torch.Tensor,
        target_positions: torch.Tensor,
        target_hidden_states: torch.Tensor,
        token_indices_to_sample: torch.Tensor | None,
        cad: CommonAttentionMetadata,
        num_rejected_tokens_gpu: torch.Tensor | None,
    ) -> tuple[int, torch.Tensor, CommonAttentionMetadata]:
        """As the base class, but an M-RoPE target's draft gets plain sequential positions.

        The base class takes the temporal axis, which stands still inside an image.
        """
        result = super().set_inputs_first_pass(
            target_token_ids,
            next_token_ids,
            target_positions,
            target_hidden_states,
            token_indices_to_sample,
            cad,
            num_rejected_tokens_gpu,
        )
        if self.vllm_config.model_config.uses_mrope:
            num_tokens = target_token_ids.shape[0]
            self.positions[:num_tokens] = self.runner.positions[:num_tokens]
        return result
