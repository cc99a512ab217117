"""The public call: checks its arguments, then runs the Triton kernel or the eager twin."""

import torch
from torch import Tensor

from ..beam_step.api import Candidates
from ..checks import INTEGERS, describe, expect, expect_room, runs_kernels
from ..tree_attention.eager import MAX_NODES
from ..tree_attention.launch import power_of_two
from .eager import rerank_eager


def rerank(
    candidates: Candidates,
    k: int,
    slots: Tensor,
    parents: Tensor,
    depths: Tensor,
    ancestors: Tensor,
    draft_tokens: Tensor,
) -> None:
    """Keep the most probable candidates of each request as the nodes of its tree.

    Nodes stand in descending order of score, the earlier candidate first at a tie. A candidate
    never scores higher than its parent and comes after it, so parents come before their children,
    and the first n nodes are the most probable tree of n nodes, for every n::

        candidate    0    1    2    3    4    5        T = 5: the root and four nodes
        score       -.5  -1   -.9 -1.5  -1.1 -3
        parent       -1  -1    0    0    1    1        nodes    0 (root), then 0 2 1 4
        token        a   b    c    d     e    f        tokens      a  c  b  e
                                                       parents  -1 0  1  0  3

    Args:
        candidates: of R requests and d levels, ``k + d * k * k`` each, see `Candidates`.
        k: the beam's width.
        slots: [R] int32 or int64, each request's row in the three tensors after it; -1 is their
            last row. Requests that pad a batch share it; what it holds then means nothing.
        parents: [slots + 1, T] int64, written in place: an earlier node, -1 at the root. The first
            columns of wider tensors will do, all three with the same stride.
        depths: [slots + 1, T] int64, likewise: 0 at the root.
        ancestors: [slots + 1, T] int64, likewise: bit n where node n is an ancestor or the node.
        draft_tokens: [R or more, T - 1] int64, written in place: the nodes' tokens but the root's.

    On CUDA tensors one launch does everything; it reads no tensor on the host and can be captured
    in a CUDA graph. With ``TRITON_INTERPRET=1`` the kernel runs in Triton's interpreter on CPU
    tensors too. Otherwise the eager twin does the same, slowly.

    Raises:
        ValueError: a shape, dtype, device or stride that does not fit. Contents are not checked.
    """
    device, num_requests = slots.device, len(slots)
    if slots.dtype not in INTEGERS or slots.dim() != 1 or candidates.scores.dim() != 2:
        raise ValueError(
            f"slots is {describe(slots)}, expected int32 or int64 [R], and candidates.scores is "
            f"{describe(candidates.scores)}, expected [R, candidates]"
        )
    num_candidates = candidates.scores.shape[1]
    depth, rest = divmod(num_candidates - k, k * k)
    if depth < 0 or rest:
        raise ValueError(f"{num_candidates} candidates are no k + d * k * k with k {k}")
    if parents.dim() != 2 or not 2 <= parents.shape[1] <= MAX_NODES:
        raise ValueError(
            f"parents is {describe(parents)}, expected [slots + 1, T], T from 2 to {MAX_NODES}"
        )
    num_rows, num_nodes = parents.shape
    if num_nodes - 1 > num_candidates:
        raise ValueError(f"{num_nodes} nodes with their root, but {num_candidates} candidates")
    for name, t in (("parents", parents), ("depths", depths), ("ancestors", ancestors)):
        expect(name, t, torch.int64, (num_rows, num_nodes), device)
        if t.stride(0) != parents.stride(0):
            raise ValueError(
                f"{name} has rows {t.stride(0)} apart, parents {parents.stride(0)}: make them alike"
            )
    for name, t in candidates._asdict().items():
        dtype = torch.float32 if name == "scores" else torch.int32
        expect_room(f"candidates.{name}", t, dtype, (num_requests, num_candidates), device)
    expect("draft_tokens", draft_tokens, torch.int64, (len(draft_tokens), num_nodes - 1), device)
    if len(draft_tokens) < num_requests:
        raise ValueError(f"draft_tokens has {len(draft_tokens)} rows for {num_requests} requests")
    if num_requests == 0:
        return
    if not runs_kernels(slots):
        rerank_eager(candidates, slots, parents, depths, ancestors, draft_tokens)
        return

    from .triton_kernel import rerank_kernel

    rerank_kernel[(num_requests,)](
        parents,
        depths,
        ancestors,
        draft_tokens,
        *candidates,
        slots,
        num_nodes,
        num_candidates,
        num_rows - 1,
        parents.stride(0),
        candidates.scores.stride(0),
        draft_tokens.stride(0),
        K=k,
        CANDIDATES=power_of_two(num_candidates),
        NODES=power_of_two(num_nodes - 1),
        JUMPS=depth.bit_length(),
        num_warps=4,
    )
