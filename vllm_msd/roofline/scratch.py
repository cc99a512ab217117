"""Memory that drafting and verification need beside weights and KV cache, in bytes.

These are the large tensors only. vLLM's memory profile runs drafting with as many requests as
``max_num_seqs`` allows, and what it takes there is lost to the KV cache for good.
"""

from vllm_msd.tree.config import TreeConfig

INT64, FLOAT32 = 8, 4
# vLLM makes verified logits float32 in pieces of at most this
# (vllm/v1/worker/gpu/spec_decode/rejection_sampler.py, MAX_CHUNK_BYTES).
MAX_FLOAT_BYTES = 2**30


def drafting_bytes(
    requests: int, tree: TreeConfig, vocab: int, *, fused: bool, element_bytes: int = 2
) -> dict[str, int]:
    """What drafting holds at its peak, in a level's ranking, by kind.

    Args:
        vocab: words of the draft's head.
        fused: ranking reads half-precision logits as they are; otherwise a float32 copy and its
            log-softmax stand beside them.

    Returns:
        ``candidates``: score, token and parent of every node proposed, ``[requests, k +
        (depth - 1) k^2]``; ``masks``: an int64 of ancestors for each row of a level; ``logits``:
        of one level, ``[requests * k, vocab]``.
    """
    proposed = tree.top_k + (tree.depth - 1) * tree.top_k**2
    copies = 0 if fused else 2 * FLOAT32
    return {
        "candidates": requests * proposed * (FLOAT32 + 2 * INT64),
        "masks": requests * tree.top_k * INT64,
        "logits": requests * tree.top_k * vocab * (element_bytes + copies),
    }


def verification_bytes(
    requests: int,
    nodes: int,
    vocab: int,
    *,
    max_tokens: int | None = None,
    element_bytes: int = 2,
) -> int:
    """Logits of a step that verifies ``nodes`` and the root of each request.

    Half-precision rows as the head writes them, and vLLM's float32 copy of at most
    `MAX_FLOAT_BYTES` of them at a time (or of one request, if that is more).

    Args:
        max_tokens: rows of a step at most (``max_num_batched_tokens``); None for no limit.
    """
    rows = requests * (nodes + 1)
    if max_tokens is not None:
        rows = min(rows, max_tokens)
    one_request = (nodes + 1) * vocab * FLOAT32
    floats = min(rows * vocab * FLOAT32, max(MAX_FLOAT_BYTES, one_request))
    return rows * vocab * element_bytes + floats
