"""The trees of one step under Model Runner V1, and those drafted for the steps to come."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

from vllm_msd.tree import DraftTree, chain_parents


@dataclass(frozen=True)
class StepTrees:
    """What a step verifies: one tree for each of its R requests, padded to T nodes.

    A request without drafts has a root only. The nodes' rows of a request are the last of its rows
    in the step, root first. "Node order" is request by request, node by node, without padding; the
    step's logits come in it.

    Attributes:
        tree: the trees, ``[R, T]``; the root's token is not filled in.
        num_nodes: ``[R]`` int64, the root included.
        is_node: ``[R, T]`` bool, False at the padding.
        rows: ``[nodes]`` int64 the nodes' rows in the step, in node order.
        root_rows: ``[R]`` int64 the roots' rows in the step.
        first_logits: ``[R]`` int64 the roots' rows among the logits.
        is_tree: ``[R]`` bool, False where the nodes are a chain.
        has_trees: whether it is True anywhere.
    """

    tree: DraftTree
    num_nodes: Tensor
    is_node: Tensor
    rows: Tensor
    root_rows: Tensor
    first_logits: Tensor
    is_tree: Tensor
    has_trees: bool

    @classmethod
    def build(
        cls, metadata: SpecDecodeMetadata, drafted: Sequence[tuple[Tensor, Tensor] | None]
    ) -> StepTrees:
        """Find each request's tree.

        Drafts that are not the beginning of what was drafted last for a request are a chain: with
        parents that do not belong to them, two siblings could hold the same token.

        Args:
            metadata: vLLM's record of the step's drafted tokens.
            drafted: tokens and parents of each request's last tree, ``[N + 1]`` int64 each, or
                None.
        """
        num_reqs = len(metadata.num_draft_tokens)
        num_nodes = torch.tensor(metadata.num_draft_tokens) + 1
        num_columns = metadata.max_spec_len + 1
        node = torch.arange(num_columns)
        is_node = node < num_nodes[:, None]
        is_drafted = is_node & (node > 0)
        tokens = torch.full((num_reqs, num_columns), -1)
        tokens[is_drafted] = metadata.draft_token_ids.long()

        chain = chain_parents(1, num_columns)[0]
        known = [(tokens[0], chain) if d is None else d for d in drafted]
        known_tokens = torch.stack([t[:num_columns] for t, _ in known])
        is_known = torch.tensor([d is not None for d in drafted])
        is_known &= ((known_tokens == tokens) | ~is_drafted).all(1)
        known_parents = torch.stack([p[:num_columns] for _, p in known])
        parents = torch.where(is_known[:, None], known_parents, chain)
        tree = DraftTree.from_parents(tokens, parents, check=False)

        first_logits = metadata.cu_num_sampled_tokens.long() - num_nodes
        rows = metadata.logits_indices.long()
        is_tree = ((tree.depths != node) & is_node).any(1)
        return cls(
            tree=tree,
            num_nodes=num_nodes,
            is_node=is_node,
            rows=rows,
            root_rows=rows[first_logits],
            first_logits=first_logits,
            is_tree=is_tree,
            has_trees=bool(is_tree.any()),
        )

    def in_node_order(self, values: Tensor) -> Tensor:
        """``[R, T]`` to ``[nodes]``, without the padding."""
        return values[self.is_node]

    def by_request(self, values: Tensor) -> Tensor:
        """``[nodes]`` to ``[R, T]``, 0 at the padding."""
        return values.new_zeros(self.is_node.shape).masked_scatter_(self.is_node, values)

    def rotary_offsets(self) -> Tensor:
        """``[nodes]`` int64, how far a node's rotary position lies from its slot: 0 or less."""
        node = torch.arange(self.is_node.shape[1])
        return self.in_node_order(self.tree.depths - node)
