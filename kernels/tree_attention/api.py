"""The public call: checks its arguments, then runs the Triton kernel or the eager twin."""

import torch
from torch import Tensor

from ..checks import describe, expect, expect_contiguous_rows, runs_kernels
from .eager import tree_attention_eager
from .launch import LaunchConfig, TreeAttentionWorkspace, launch_tree_attention

HEAD_SIZES = (64, 80, 96, 128, 256)
QUERY_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)


def tree_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start: Tensor,
    tree_start: Tensor | None,
    ancestors: Tensor | None,
    scale: float,
    *,
    out: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    max_query_len: int | None = None,
    max_seq_len: int | None = None,
    num_splits: int | None = None,
    workspace: TreeAttentionWorkspace | None = None,
    config: LaunchConfig | None = None,
    check: bool = True,
) -> Tensor:
    """Attention over a paged KV cache in which a request's last tokens may form a tree.

    A request is a sequence of ``seq_lens[r]`` cached positions, of which the last
    ``query_start[r + 1] - query_start[r]`` are the queries of this call (their keys and values are
    in the cache already). If the request carries a tree, the root lies at position
    ``tree_start[r]`` and node j at ``tree_start[r] + j``, parents before children. Everything
    before the tree is visible to all of it; inside the tree a token sees its ancestors and itself,
    which is bit j of its mask for node j. For a context of three tokens::

        the tree            slot  key | c c c | 0 1 2 3 4 5    ancestors
                            3     0   | x x x | x              0b000001
            0               4     1   | x x x | x x            0b000011
           / \\              5     2   | x x x | x   x          0b000101
          1   2             6     3   | x x x | x x   x        0b001011
         / \\   \\            7     4   | x x x | x x     x      0b010011
        3   4   5           8     5   | x x x | x   x     x    0b100101

    Exactly: the query at position p sees the key at position x if ``x <= p`` and (``x <
    tree_start`` or bit ``x - tree_start`` of its mask is set). So the rows of a prompt that stand
    before the root in the same call are causal, and a request with ``tree_start`` -1 is causal
    throughout, its masks ignored. Verification of trees, draft levels (the queries are the newest
    level, older levels lie in the cache), prefill chunks and ordinary decoding mix freely in a
    batch. ``ancestor_bits(parents)`` makes the masks of one tree.

    Args:
        q: [T, num_heads, head_size] fp16, bf16 or fp32; queries of all requests one after another.
            Head size 64, 80, 96, 128 or 256; the last dimension contiguous, here and below.
        k_cache, v_cache: [num_blocks, block_size, num_kv_heads, head_size], any strides (one head's
            slots of a block within 2^31 elements); the dtype of q, or float8 (e4m3fn, e5m2). vLLM's
            packed cache [num_blocks, num_kv_heads, block_size, 2 * head_size] fits as
            ``kv.transpose(1, 2).split(head_size, dim=-1)``.
        block_table: [R, max_blocks] int32; position x of request r lies in cache block
            ``block_table[r, x // block_size]``, slot ``x % block_size``.
        seq_lens: [R] int32, cached positions, the queries included.
        query_start: [R + 1] int32, non-decreasing from 0; rows of q past its last entry are
            padding and their output is left alone. Empty requests are allowed.
        tree_start: [R] int32, position of the root or -1; None if no request has a tree.
        ancestors: [T] int64 masks, bit 63 included (a tree has at most 64 slots); None if
            tree_start is.
        scale: factor on the scores, usually ``head_size ** -0.5``.
        out: [T, num_heads, head_size], written in place; allocated (as zeros) if None.
        k_scale, v_scale: float32 tensors of one element that a float8 cache is multiplied by.
        max_query_len, max_seq_len: upper bounds that help to pick tiles and splits; by default T
            and the capacity of the block table. They do not change the result beyond rounding.
        num_splits: parts a context is split into; by default enough to fill the device.
        workspace: buffers for split launches, needed under CUDA graphs so that replays find them;
            allocated per call if None.
        config: tile sizes, for tuning.
        check: False leaves out the checks of the arguments, for the other layers of a pass whose
            first one was checked; they take the host longer than the launch.

    Returns:
        ``out``, of q's dtype.

    On CUDA tensors the Triton kernel runs, and it reads no tensor on the host: with ``out`` and
    ``workspace`` given, a call can be captured in a CUDA graph and replayed with other contents.
    With ``TRITON_INTERPRET=1`` the kernel runs in Triton's interpreter on CPU tensors too.
    Otherwise the eager twin computes the same, slowly, and ignores the launch arguments.

    Raises:
        ValueError: a shape, dtype, device or stride that does not fit. Contents (block numbers,
            lengths, masks) are not checked: that would have to wait for the device.
    """
    batch = (q, k_cache, v_cache, block_table, seq_lens, query_start, tree_start, ancestors, scale)
    if check:
        _check(*batch)
        _check_scales(k_cache, k_scale, v_scale, q.device)
        _check_launch(q, k_cache, out, num_splits, config)
    if out is None:
        out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    if q.shape[0] == 0 or seq_lens.shape[0] == 0:
        return out
    if runs_kernels(q):
        return launch_tree_attention(
            *batch,
            out=out,
            k_scale=k_scale,
            v_scale=v_scale,
            max_query_len=max_query_len,
            max_seq_len=max_seq_len,
            num_splits=num_splits,
            workspace=workspace,
            config=config,
        )
    return tree_attention_eager(*batch, out=out, k_scale=k_scale, v_scale=v_scale)


def _check(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start: Tensor,
    tree_start: Tensor | None,
    ancestors: Tensor | None,
    scale: float,
) -> None:
    if q.dim() != 3 or q.dtype not in QUERY_DTYPES:
        raise ValueError(
            f"q is {describe(q)}, expected [tokens, heads, head_size] in fp16, bf16 or fp32"
        )
    num_tokens, num_heads, head_size = q.shape
    if head_size not in HEAD_SIZES:
        raise ValueError(f"head size {head_size} is not supported: expected one of {HEAD_SIZES}")
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if cache.dim() != 4 or cache.shape[3] != head_size or cache.device != q.device:
            raise ValueError(
                f"{name} is {describe(cache)}, expected [blocks, block_size, kv_heads, "
                f"{head_size}] on {q.device}"
            )
        if cache.dtype != q.dtype and cache.dtype not in FP8_DTYPES:
            raise ValueError(f"{name} is {cache.dtype}, expected {q.dtype} (as q) or a float8")
    if k_cache.shape != v_cache.shape or k_cache.dtype != v_cache.dtype:
        raise ValueError(f"k_cache is {describe(k_cache)} but v_cache is {describe(v_cache)}")
    if num_heads % k_cache.shape[2]:
        raise ValueError(f"{num_heads} query heads do not share {k_cache.shape[2]} KV heads evenly")

    num_requests = seq_lens.shape[0] if seq_lens.dim() else 0
    expect("seq_lens", seq_lens, torch.int32, (num_requests,), q.device)
    expect("query_start", query_start, torch.int32, (num_requests + 1,), q.device)
    if block_table.dim() != 2:
        raise ValueError(f"block_table is {describe(block_table)}, expected [requests, blocks]")
    expect("block_table", block_table, torch.int32, (num_requests, block_table.shape[1]), q.device)
    if (tree_start is None) != (ancestors is None):
        raise ValueError("give tree_start and ancestors together, or neither of them")
    if tree_start is not None and ancestors is not None:
        expect("tree_start", tree_start, torch.int32, (num_requests,), q.device)
        expect("ancestors", ancestors, torch.int64, (num_tokens,), q.device)
    for name, t in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache)):
        expect_contiguous_rows(name, t)
    if not scale > 0:
        raise ValueError(f"scale is {scale}: expected a positive number")


def _check_scales(
    k_cache: Tensor, k_scale: Tensor | None, v_scale: Tensor | None, device: torch.device
) -> None:
    for name, t in (("k_scale", k_scale), ("v_scale", v_scale)):
        if t is None:
            continue
        if k_cache.dtype not in FP8_DTYPES:
            raise ValueError(f"{name} is only for a float8 cache, this one is {k_cache.dtype}")
        if t.dtype != torch.float32 or t.numel() != 1 or t.device != device:
            raise ValueError(f"{name} is {describe(t)}, expected one float32 on {device}")


def _check_launch(
    q: Tensor,
    k_cache: Tensor,
    out: Tensor | None,
    num_splits: int | None,
    config: LaunchConfig | None,
) -> None:
    if num_splits is not None and num_splits < 1:
        raise ValueError(f"num_splits is {num_splits}: expected at least 1, or None")
    group = q.shape[1] // k_cache.shape[2]
    if config is not None and config.block_m < group:
        raise ValueError(f"config.block_m is {config.block_m}: expected at least the {group} heads")
    if out is None:
        return
    if out.shape != q.shape or out.dtype != q.dtype or out.device != q.device:
        raise ValueError(f"out is {describe(out)}, expected the same as q: {describe(q)}")
    if out.stride(-1) != 1:
        raise ValueError("out must be contiguous in its last dimension")
