"""Growing a dynamic tree: expand a beam level by level, then keep the most probable nodes.

Source: EAGLE-2's dynamic trees (arXiv 2406.16858) as used by MSD. Nothing here knows the draft
model; it is handed in as a function.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from vllm_msd.errors import ConfigError
from vllm_msd.kernels import MAX_NODES
from vllm_msd.tree.record import DraftTree

LOGITS_BYTES = 128 << 20  # at most, of the logits of one level


@dataclass(frozen=True)
class TreeShape:
    """Size of a dynamic tree.

    ``total_tokens`` nodes are kept, the root included. ``depth`` expansions of the first level are
    made, so nodes lie up to ``depth + 1`` below the root. ``top_k`` is the beam width and the
    number of children each beam node proposes.
    """

    total_tokens: int
    depth: int
    top_k: int

    def __post_init__(self) -> None:
        if self.depth < 0 or self.top_k < 1:
            raise ConfigError(
                f"tree: got depth {self.depth} and top_k {self.top_k}, expected depth at least 0 "
                "and top_k at least 1."
            )
        largest = min(MAX_NODES, self.num_candidates + 1)
        if not 2 <= self.total_tokens <= largest:
            raise ConfigError(
                f"tree: got total_tokens {self.total_tokens}, expected 2 to {largest} for depth "
                f"{self.depth} and top_k {self.top_k}. Choose fewer nodes, or a deeper or wider "
                "tree."
            )

    @property
    def num_candidates(self) -> int:
        """Nodes proposed, of which ``total_tokens - 1`` are kept."""
        return self.top_k + self.depth * self.top_k**2

    def requests_at_once(
        self, max_requests: int, max_rows: int, columns: int, element_bytes: int
    ) -> int:
        """For how many requests a level is drafted at once; more are drafted for in turn.

        Args:
            max_requests: of a batch.
            max_rows: that fit the draft's buffers.
            columns, element_bytes: of the logits, which are kept to `LOGITS_BYTES` a level.
        """
        by_logits = LOGITS_BYTES // (self.top_k * columns * element_bytes)
        return max(1, min(max_requests, max_rows // self.top_k, by_logits))

    def cut(self, num_nodes: int) -> "TreeShape":
        """Of the first ``num_nodes`` drafted nodes (at least 1) of a tree of this shape.

        `grow_tree` grows the very same nodes of it, in as few levels as they can need: all that
        stand before a node are at least as probable, its ancestors among them, so of n nodes none
        lies deeper than n.
        """
        return TreeShape(
            min(num_nodes + 1, self.total_tokens), self.levels_for(num_nodes), self.top_k
        )

    def levels_for(self, num_nodes: int) -> int:
        """Expansions that the first ``num_nodes`` nodes (at least 1) can need, see `cut`."""
        return min(num_nodes - 1, self.depth)

    def levels_of(self, sizes: Iterable[int]) -> set[int]:
        """`levels_for` of several numbers of nodes; none needs no levels at all."""
        return {self.levels_for(nodes) for nodes in sizes if nodes}

    def shallower(self, depth: int) -> "TreeShape":
        """Of a tree with ``depth`` expansions and as many of this one's nodes as it proposes.

        Its first ``depth + 1`` nodes are those of this shape, and all of them for the same depth.
        """
        most = self.top_k + depth * self.top_k**2 + 1
        return TreeShape(min(self.total_tokens, most), depth, self.top_k)


class ExpandFn(Protocol):
    """Feeds one beam to the draft."""

    def __call__(
        self, tokens: Tensor, hidden: Tensor, visible: Tensor, level: int
    ) -> tuple[Tensor, Tensor]:
        """Return the next tokens' logits and the draft's hidden states of a beam.

        Args:
            tokens: ``[B, k]`` the beam's tokens.
            hidden: ``[B, k, H]`` the draft's output for each beam node's parent.
            visible: ``[B, k, k * (level + 1)]`` bool, which of the columns fed by these calls a
                beam node sees: its ancestors and itself.
            level: 0, 1, ...: the call's number, and the beam's distance from the first row after
                the prompt.

        Returns:
            logits ``[B, k, V]`` and hidden states ``[B, k, H]``.
        """


def grow_tree(
    root_tokens: Tensor,
    root_logits: Tensor,
    root_hidden: Tensor,
    expand: ExpandFn,
    shape: TreeShape,
    token_ids: Tensor | None = None,
) -> DraftTree:
    """Grow one tree per request, with its ``scores``.

    Args:
        root_tokens: ``[B]`` int64 the sampled tokens.
        root_logits: ``[B, V]`` the draft's logits for the token after the root.
        root_hidden: ``[B, H]`` the draft's output that gave them.
        expand: feeds a beam to the draft.
        shape: size of the tree.
        token_ids: ``[V]`` the token of each column of the logits; None if it is the column's
            number.
    """
    k = shape.top_k
    batch = root_tokens.shape[0]
    device = root_tokens.device

    def best_tokens(logits: Tensor) -> tuple[Tensor, Tensor]:
        log_probs, columns = torch.log_softmax(logits.float(), -1).topk(k)
        return log_probs, columns if token_ids is None else token_ids[columns]

    scores, tokens = best_tokens(root_logits)
    hidden = root_hidden[:, None].expand(-1, k, -1)
    visible = torch.eye(k, dtype=torch.bool, device=device).expand(batch, k, k)
    beam = torch.arange(k, device=device).expand(batch, k)  # candidate number of each beam node
    # Candidates: the k nodes of level 1, then k * k per expansion, by parent and then by rank.
    all_scores, all_tokens = [scores], [tokens]
    all_parents = [torch.full_like(beam, -1)]

    for level in range(shape.depth):
        logits, out = expand(tokens, hidden, visible, level)
        child_scores, child_tokens = best_tokens(logits)
        child_scores = (child_scores + scores[..., None]).flatten(1)
        child_tokens = child_tokens.flatten(1)
        all_scores.append(child_scores)
        all_tokens.append(child_tokens)
        all_parents.append(beam.repeat_interleave(k, 1))

        best = _best(child_scores, k)
        from_beam = best // k
        scores, tokens = child_scores.gather(1, best), child_tokens.gather(1, best)
        beam = k + level * k * k + best
        hidden = out.gather(1, from_beam[..., None].expand(-1, -1, out.shape[-1]))
        inherited = visible.gather(1, from_beam[..., None].expand(-1, -1, visible.shape[-1]))
        own = torch.eye(k, dtype=torch.bool, device=device).expand(batch, k, k)
        visible = torch.cat([inherited, own], -1)

    scores, tokens, parents = (torch.cat(x, 1) for x in (all_scores, all_tokens, all_parents))
    return _rerank(root_tokens, scores, tokens, parents, keep=shape.total_tokens - 1)


def _best(scores: Tensor, count: int) -> Tensor:
    """Indices ``[B, count]`` of the highest scores, in descending order, the earlier one at a tie.

    The tie rule keeps trees well formed: a child of probability one scores as high as its parent,
    which comes earlier.
    """
    return scores.sort(dim=1, descending=True, stable=True).indices[:, :count]


def _rerank(
    root_tokens: Tensor, scores: Tensor, tokens: Tensor, parents: Tensor, keep: int
) -> DraftTree:
    """Keep the best candidates below a root, the most probable first.

    So every prefix of the nodes is the most probable tree of its size.
    """
    kept = _best(scores, keep)  # [B, keep] candidate numbers
    parents = parents.gather(1, kept)
    node_of = kept.new_zeros(scores.shape)  # of each candidate
    node_of.scatter_(1, kept, torch.arange(1, keep + 1, device=kept.device).expand_as(kept))
    nodes = torch.where(parents < 0, 0, node_of.gather(1, parents.clamp(min=0)))
    root = torch.full_like(root_tokens[:, None], -1)
    return DraftTree.from_parents(
        torch.cat([root_tokens[:, None], tokens.gather(1, kept)], 1),
        torch.cat([root, nodes], 1),
        check=False,
        scores=torch.nn.functional.pad(scores.gather(1, kept), (1, 0)),
    )
