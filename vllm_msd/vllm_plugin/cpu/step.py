"""The nodes of one step under Model Runner V1, and each request's tree put into the store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

from vllm_msd.tree import DraftTree, TreeStore


@dataclass(frozen=True)
class StepNodes:
    """What a step of R requests verifies: L nodes, request by request, as the step's logits come.

    A request without drafts has a root only. A request's slot in the store is its row in the batch,
    which holds for this step alone.

    Attributes:
        slots, nodes, rows: ``[L]`` int64, each node's request, its number, its row in the step.
        row_start: ``[R + 1]`` int64 the first node of each request.
        tokens: ``[L]`` int64 the drafted tokens, -1 at the roots.
        shift: ``[L]`` int64, how far a node's rotary position lies from its slot: 0 or less.
        has_trees: whether any request's nodes are more than a chain.
    """

    slots: Tensor
    nodes: Tensor
    rows: Tensor
    row_start: Tensor
    tokens: Tensor
    shift: Tensor
    has_trees: bool

    @classmethod
    def build(
        cls,
        store: TreeStore,
        metadata: SpecDecodeMetadata,
        drafted: Sequence[DraftTree | None],
    ) -> StepNodes:
        """Put each request's tree into the store and list the nodes.

        Drafts that are not the beginning of what was drafted last for a request are a chain: with
        parents that do not belong to them, two siblings could hold the same token.

        Args:
            store: written.
            metadata: vLLM's record of the step's drafted tokens.
            drafted: each request's last tree, ``[1, T]``, or None.
        """
        row_start = pad(metadata.cu_num_sampled_tokens.long(), (1, 0))
        num_nodes = row_start.diff()
        tokens = torch.full((int(row_start[-1]),), -1)
        is_drafted = torch.ones_like(tokens, dtype=torch.bool)
        is_drafted[row_start[:-1]] = False
        tokens[is_drafted] = metadata.draft_token_ids.long()
        of_request = tokens.split(num_nodes.tolist())
        for slot, (tree, own) in enumerate(zip(drafted, of_request, strict=True)):
            if tree is not None and torch.equal(tree.tokens[0, 1 : len(own)], own[1:]):
                store.put(slice(slot, slot + 1), tree)
            else:
                store.put_chain(slot)
        slots = torch.arange(len(num_nodes)).repeat_interleave(num_nodes)
        nodes = torch.arange(len(tokens)) - row_start[slots]
        shift = store.shift(slots, nodes)
        return cls(
            slots=slots,
            nodes=nodes,
            rows=metadata.logits_indices.long(),
            row_start=row_start,
            tokens=tokens,
            shift=shift,
            has_trees=bool(shift.any()),
        )
