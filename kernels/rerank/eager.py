"""Reranking as its definition reads: one request at a time, node by node."""

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from ..beam_step.api import Candidates


def rerank_eager(
    candidates: "Candidates",
    slots: Tensor,
    parents: Tensor,
    depths: Tensor,
    ancestors: Tensor,
    draft_tokens: Tensor,
) -> None:
    """Same as ``rerank``; waits for the device."""
    num_nodes = parents.shape[1]
    for request, slot in enumerate(slots.tolist()):
        scores, tokens, above = (x[request].tolist() for x in candidates)
        best = sorted(range(len(scores)), key=lambda c: (-scores[c], c))[: num_nodes - 1]
        node_of = {-1: 0} | {candidate: i + 1 for i, candidate in enumerate(best)}
        up, depth, mask = [-1], [0], [1]
        for node, candidate in enumerate(best, start=1):
            parent = node_of[above[candidate]]
            up.append(parent)
            depth.append(depth[parent] + 1)
            mask.append(mask[parent] | 1 << node)
        mask = [m - 2**64 if m >= 2**63 else m for m in mask]  # bit 63 is the sign
        for row, values in ((parents, up), (depths, depth), (ancestors, mask)):
            row[slot] = row.new_tensor(values)  # slot -1 is the last row
        draft_tokens[request] = draft_tokens.new_tensor([tokens[c] for c in best])
