"""The draft's own head: the rows of the target's head that a draft vocabulary names."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
)

from vllm_msd.draft.vocabulary import check_token_ids
from vllm_msd.errors import CheckpointError


def own_head(target_head: Any, token_ids: Tensor) -> ParallelLMHead:
    """A head of D rows, which are copies of the target's; spread over the ranks as any head is.

    Args:
        target_head: the target's head, or the embedding table where it is tied; this rank's part.
        token_ids: int64 ``[D]`` the target tokens of the rows, alike on every rank.

    Raises:
        CheckpointError: the target's head has no plain rows to copy.
        ConfigError: a token id that the target does not have.
    """
    target_head = getattr(
        target_head, "base_layer", target_head
    )  # the target's adapters are its own
    check_token_ids(token_ids, target_head.org_vocab_size, "the target's vocabulary")
    method = target_head.quant_method
    if not isinstance(method, UnquantizedEmbeddingMethod | UnquantizedLinearMethod):
        raise CheckpointError(
            f"draft vocabulary: the target's head is quantized ({type(method).__name__}), so its "
            "rows cannot be copied one by one. Serve the draft without a draft vocabulary, or a "
            "target whose head is not quantized."
        )
    weight, shard = target_head.weight, target_head.shard_indices
    with torch.device(weight.device):
        head = ParallelLMHead(len(token_ids), weight.shape[1], params_dtype=weight.dtype)
    # Each rank has some of the rows, and its part of the new head may want any of them.
    start, end = shard.org_vocab_start_index, shard.org_vocab_end_index
    is_here = (token_ids >= start) & (token_ids < end)
    rows = weight.data[(token_ids - start).clamp(0, max(0, end - start - 1))]
    rows = rows.masked_fill_(~is_here[:, None], 0)
    head.weight_loader(head.weight, tensor_model_parallel_all_reduce(rows))
    head.quant_method.process_weights_after_loading(head)
    return head
