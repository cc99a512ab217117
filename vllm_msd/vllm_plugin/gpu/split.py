"""Which requests of a pass have drafts. Model Runner V2 puts them first, so one number parts them.

They go through the tree kernel, all others through the backend that the engine would have without
trees. A full CUDA graph holds one way for all of its requests, so there nothing is parted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from typing_extensions import override
from vllm.v1.attention.backend import AttentionMetadataBuilder, CommonAttentionMetadata
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_states.interface import ModelSpecificAttnMetadata
from vllm.v1.worker.ubatch_utils import UBatchSlice, split_attn_metadata

REST = "msd_rest"  # the attribute of vLLM's attention metadata that holds a `Rest`


@dataclass(frozen=True)
class Split:
    """The requests with drafts, which stand first.

    ``requests`` and ``rows``: how many, rows of prompts before their trees included.
    ``max_query_len``: rows of the longest of them, 0 if there are none.
    """

    requests: int
    rows: int
    max_query_len: int

    @classmethod
    def of(cls, input_batch: InputBatch) -> Split:
        """Part a batch.

        Raises:
            RuntimeError: vLLM has not sorted the batch.
        """
        drafts = input_batch.num_draft_tokens_per_req
        requests = 0 if drafts is None else int(np.count_nonzero(drafts))
        if requests == 0:
            return cls(0, 0, 0)
        if not drafts[:requests].all():
            raise RuntimeError(
                f"draft trees: expected the {requests} requests with drafts first, got drafts of "
                f"{drafts.tolist()}"
            )
        rows = input_batch.num_scheduled_tokens[:requests]
        return cls(requests, int(rows.sum()), int(rows.max()))


@dataclass(frozen=True)
class Rest:
    """What is left of a pass behind a `Split`: the parent's metadata, of those requests alone."""

    split: Split
    metadata: Any


class DraftsFirst(ModelSpecificAttnMetadata):
    """Brings a `Split` to the builders that take one, see `TreeMetadataBuilder`."""

    def __init__(self, split: Split) -> None:
        self.split = split

    @override
    def get_extra_attn_kwargs(self, attn_metadata_builder: Any, num_reqs: int) -> dict[str, Any]:
        takes = isinstance(attn_metadata_builder, TreeMetadataBuilder)
        return {"split": self.split} if takes and self.split.requests < num_reqs else {}


class TreeMetadataBuilder(AttentionMetadataBuilder):
    """Mixed into the parent's builder: builds metadata of the rest of a batch, too."""

    @override
    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
        split: Split | None = None,
    ) -> Any:
        """As the parent's. With a split, its attribute ``msd_rest`` is a `Rest`.

        The metadata of the whole batch is then for the draft's one layer, the rest's for all of the
        target's: what the parent prepares on the device, in one buffer, it prepares for the rest.
        """
        if split is None:
            return super().build(common_prefix_len, common_attn_metadata, fast_build)
        whole = super().build(common_prefix_len, common_attn_metadata, fast_build=True)
        common = common_attn_metadata
        rest = UBatchSlice(
            slice(split.requests, common.num_reqs), slice(split.rows, common.num_actual_tokens)
        )
        (behind,) = split_attn_metadata([rest], common)
        # Copies: Triton compiles a kernel again for a tensor that begins anywhere.
        behind.seq_lens = behind.seq_lens.clone()
        behind.block_table_tensor = behind.block_table_tensor.clone()
        setattr(whole, REST, Rest(split, super().build(common_prefix_len, behind, fast_build)))
        return whole
