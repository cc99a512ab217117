"""The draft's head as its levels use it: this rank's columns, and what they stand for."""

from __future__ import annotations

from typing import Any

import torch
from vllm.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_gather
from vllm.utils.math_utils import cdiv

from vllm_msd.kernels.top_k.api import PART_COLUMNS
from vllm_msd.tree.fused import Vocabulary


class DraftHead:
    """Logits for `grow_tree_fused`.

    Under tensor parallelism each rank looks at its own columns, and the best of each are exchanged
    instead of the logits. Ranks exchange equally many parts; where the last one would have fewer,
    logits are gathered, as vLLM does.

    Attributes:
        columns: of the logits that this rank looks at.
        vocabulary: what the columns are.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.columns, self.vocabulary = model.num_columns, Vocabulary(model.token_ids)
        ranks, head = get_tensor_model_parallel_world_size(), model.lm_head
        if ranks == 1:
            return
        width = head.num_embeddings_per_partition
        last = self.columns - (ranks - 1) * width
        if cdiv(last, PART_COLUMNS) == cdiv(width, PART_COLUMNS):
            self.columns = head.shard_indices.num_org_elements
            self.vocabulary = Vocabulary(
                model.token_ids,
                first_column=head.shard_indices.org_vocab_start_index,
                gather=lambda parts: tensor_model_parallel_all_gather(parts, dim=1),
            )

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[rows, H]`` to ``[rows, columns]``."""
        if self.vocabulary.gather is None:
            return self.model.column_logits(hidden)
        return self.model.local_logits(hidden)[:, : self.columns]
