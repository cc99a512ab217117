"""What a user could take instead of our kernel, called on a `Problem` in the way that suits each.

Masks, plans and dense copies of the paged cache are made beforehand and are not timed, which
favours the alternatives: an engine would have to make them in every step. Results are views where
they can be, so that no copy is timed either.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from vllm_msd.kernels import TreeAttentionWorkspace, tree_attention

from .problem import BLOCK_SIZE, Problem

Call = Callable[[], Tensor]  # computes [rows, heads, head_size], or a view that reshapes to it


class Rival(NamedTuple):
    """``make`` returns one call per cache; ImportError and RuntimeError say why there is none."""

    make: Callable[[Problem], list[Call]]
    tree: bool  # False: computes causal attention over the same rows
    paged: bool  # False: on dense copies


def ours(problem: Problem, tree: bool = True) -> list[Call]:
    heads, head_size = problem.q.shape[1:]
    workspace = TreeAttentionWorkspace.allocate(128, heads, head_size, device=problem.q.device)
    out = torch.empty_like(problem.q)
    length = problem.case.context + problem.case.queries
    options = {"max_query_len": problem.case.queries, "max_seq_len": length}

    def call(copy: int) -> Call:
        arguments = problem.arguments(copy, tree)
        return lambda: tree_attention(*arguments, out=out, workspace=workspace, **options)

    return [call(i) for i in range(len(problem.caches))]


def ours_causal(problem: Problem) -> list[Call]:
    return ours(problem, tree=False)


def vllm_unified(problem: Problem) -> list[Call]:
    """The kernel of vLLM's TRITON_ATTN, with room for its split launches."""
    from vllm.v1.attention.ops.triton_unified_attention import unified_attention

    out = torch.empty_like(problem.q)
    rows, heads, head_size = problem.q.shape
    segments = torch.empty(rows, heads, 16, head_size, device=out.device)
    maxima, sums = torch.empty(2, rows, heads, 16, device=out.device)
    kv_heads = problem.case.shape.kv_heads
    scales = torch.ones(problem.case.batch, kv_heads, device=out.device)

    def call(copy: int) -> Call:
        k, v = problem.paged(copy)

        def run() -> Tensor:
            unified_attention(
                q=problem.q, k=k, v=v, out=out,
                cu_seqlens_q=problem.query_start, max_seqlen_q=problem.case.queries,
                seqused_k=problem.seq_lens,
                max_seqlen_k=problem.case.context + problem.case.queries,
                softmax_scale=problem.scale, causal=True, window_size=(-1, -1),
                block_table=problem.table, softcap=0, q_descale=None, k_descale=scales,
                v_descale=scales, seq_threshold_3D=128 // kv_heads, num_par_softmax_segments=16,
                softmax_segm_output=segments, softmax_segm_max=maxima, softmax_segm_expsum=sums,
            )  # fmt: skip
            return out

        return run

    return [call(i) for i in range(len(problem.caches))]


def flex_attention(problem: Problem) -> list[Call]:
    """PyTorch's FlexAttention, compiled, on dense keys and values, its block mask made before.

    On a CPU it runs as it is: there only the result counts.
    """
    from torch.nn.attention.flex_attention import create_block_mask
    from torch.nn.attention.flex_attention import flex_attention as flex

    case, ancestors, start = problem.case, problem.ancestors, problem.case.context

    def sees(batch, head, row, key):
        node = (key - start).clamp(min=0)
        return (key < start) | (((ancestors[row] >> node) & 1) != 0)

    length = case.context + case.queries
    mask = create_block_mask(sees, None, None, case.queries, length, device=problem.q.device)
    if problem.q.is_cuda:
        # Every case is a variant of its own; after eight of them PyTorch would stop compiling.
        torch.compiler.reset()
        flex = torch.compile(flex, dynamic=False)
    q = _by_request(problem).transpose(1, 2)

    def call(copy: int) -> Call:
        k, v = (x.transpose(1, 2) for x in problem.dense(copy))

        def run() -> Tensor:
            out = flex(q, k, v, block_mask=mask, scale=problem.scale, enable_gqa=True)
            return out.transpose(1, 2)

        return run

    return [call(i) for i in range(len(problem.caches))]


def sdpa(problem: Problem) -> list[Call]:
    """``scaled_dot_product_attention`` with a mask on dense keys and values.

    The heads of a group become rows, because the kernels that take a mask know no groups.
    """
    shape = problem.case.shape
    group = shape.heads // shape.kv_heads
    mask = problem.visible().repeat(group, 1)[None, None]
    q = _by_request(problem).unflatten(2, (shape.kv_heads, group)).permute(0, 2, 3, 1, 4)
    q = q.flatten(2, 3)  # [batch, kv_heads, group * queries, head_size]

    def call(copy: int) -> Call:
        k, v = (x.transpose(1, 2) for x in problem.dense(copy))

        def run() -> Tensor:
            out = torch.nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, scale=problem.scale
            )
            return out.unflatten(2, (group, -1)).permute(0, 3, 1, 2, 4)

        return run

    return [call(i) for i in range(len(problem.caches))]


def flashinfer(problem: Problem) -> list[Call]:
    """FlashInfer's paged prefill with a custom mask, planned before; its own cache layout."""
    from flashinfer import BatchPrefillWithPagedKVCacheWrapper

    case, shape, device = problem.case, problem.case.shape, problem.q.device
    blocks = problem.table.shape[1]
    room = torch.empty(512 * 2**20, dtype=torch.uint8, device=device)
    wrapper = BatchPrefillWithPagedKVCacheWrapper(room, "NHD")
    pages = torch.arange(case.batch + 1, dtype=torch.int32, device=device) * blocks
    last = (problem.seq_lens - 1) % BLOCK_SIZE + 1
    wrapper.plan(
        problem.query_start, pages, problem.table.flatten(), last,
        shape.heads, shape.kv_heads, shape.head_size, BLOCK_SIZE,
        custom_mask=problem.visible().flatten().repeat(case.batch),
        sm_scale=problem.scale, q_data_type=problem.q.dtype, kv_data_type=problem.q.dtype,
    )  # fmt: skip
    out = torch.empty_like(problem.q)

    def call(copy: int) -> Call:
        cache = tuple(x.contiguous() for x in problem.paged(copy))
        return lambda: wrapper.run(problem.q, cache, out=out)

    return [call(i) for i in range(len(problem.caches))]


def _meta_tree_attention(problem: Problem, package: str) -> list[Call]:
    """Tree attention of xformers up to 0.0.35, later in mslk (on PyPI: mslk-cuda).

    A part for the context, one for the tree, and a merge. The part for the tree is Triton's split-K
    kernel; for the context mslk chooses between that and FlashAttention.
    """
    options = {}
    if package == "mslk":
        from mslk.attention.fmha.attn_bias import BlockDiagonalPaddedKeysMask as Mask
        from mslk.attention.fmha.tree_attention import tree_attention as attend
    else:
        from xformers.ops.fmha.attn_bias import BlockDiagonalPaddedKeysMask as Mask
        from xformers.ops.fmha.triton_splitk import FwOp
        from xformers.ops.tree_attention import tree_attention as attend

        # 0.0.35 cannot choose: it gives isinstance() a list, which raises TypeError.
        options["prefix_op"] = FwOp

    case, shape = problem.case, problem.case.shape
    if not case.context:
        raise RuntimeError("needs a context")
    grouped = (case.batch, -1, shape.kv_heads, shape.heads // shape.kv_heads, shape.head_size)
    q = problem.q.view(grouped)
    before = Mask.from_seqlens(
        q_seqlen=[case.queries] * case.batch,
        kv_padding=case.context,
        kv_seqlen=[case.context] * case.batch,
    )
    inside = problem.visible()[:, case.context :]
    bias = torch.zeros(inside.shape, dtype=q.dtype, device=q.device)
    bias.masked_fill_(~inside, float("-inf"))

    def call(copy: int) -> Call:
        # A stride of 0 over the heads of a group, as both ask for.
        parts = [
            part.contiguous()[:, :, :, None].expand(*part.shape[:3], *grouped[3:])
            for x in problem.dense(copy)
            for part in x.split([case.context, case.queries], dim=1)
        ]
        cache_k, tree_k, cache_v, tree_v = parts

        def run() -> Tensor:
            return attend(q, tree_k, tree_v, cache_k, cache_v, bias, before, **options)

        return run

    return [call(i) for i in range(len(problem.caches))]


def xformers(problem: Problem) -> list[Call]:
    return _meta_tree_attention(problem, "xformers")


def mslk(problem: Problem) -> list[Call]:
    return _meta_tree_attention(problem, "mslk")


def _by_request(problem: Problem) -> Tensor:
    return problem.q.view(problem.case.batch, problem.case.queries, *problem.q.shape[1:])


OURS, CAUSAL = "ours", "ours, causal"
RIVALS = {
    OURS: Rival(ours, tree=True, paged=True),
    CAUSAL: Rival(ours_causal, tree=False, paged=True),
    "vllm unified, causal": Rival(vllm_unified, tree=False, paged=True),
    "flashinfer": Rival(flashinfer, tree=True, paged=True),
    "sdpa, dense": Rival(sdpa, tree=True, paged=False),
    "xformers, dense": Rival(xformers, tree=True, paged=False),
    "mslk, dense": Rival(mslk, tree=True, paged=False),
    "flex, dense": Rival(flex_attention, tree=True, paged=False),
}
