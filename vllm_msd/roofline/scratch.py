"""Memory that drafting and verification need beside weights and KV cache, in bytes.

These are the large tensors only. vLLM's memory profile runs drafting with as many requests as
``max_num_seqs`` allows, and what it takes there is lost to the KV cache for good.
"""

from vllm_msd.kernels.top_k.api import PART_COLUMNS
from vllm_msd.tree.config import TreeConfig

INT64, INT32, FLOAT32 = 8, 4, 4
# vLLM makes verified logits float32 in pieces of at most this
# (vllm/v1/worker/gpu/spec_decode/rejection_sampler.py, MAX_CHUNK_BYTES).
MAX_FLOAT_BYTES = 2**30


def drafting_bytes(
    requests: int,
    tree: TreeConfig,
    vocab: int,
    *,
    hidden: int,
    max_tokens: int,
    element_bytes: int = 2,
) -> dict[str, int]:
    """What drafting holds at its peak under Model Runner V2, by kind.

    Args:
        requests: ``max_num_seqs``.
        vocab: columns of the draft's head on a device.
        hidden: of the draft's rows.
        max_tokens: rows of a step at most (``max_num_batched_tokens``).
        element_bytes: of logits and hidden rows.

    Returns:
        ``logits``: of one level, of as many requests as are drafted for at once (a chain's are of
        all). ``growth``: what `vllm_msd.tree.GrowthBuffers` hold for these: the best tokens of a
        level, candidates, beams. ``trees``: of all requests, parents, depths and ancestors by slot.
        ``roots``: of all requests, what the draft's prefill left.
    """
    if tree.is_chain:
        return {"logits": requests * vocab * element_bytes}
    k, levels = tree.top_k, tree.depth - 1
    at_once = tree.shape.requests_at_once(requests, max_tokens, vocab, element_bytes)
    rows, parts = at_once * k, -(-vocab // PART_COLUMNS)
    best = rows * parts * (k + 1) * INT64 + rows * k * (FLOAT32 + INT32)
    candidates = at_once * tree.shape.num_candidates * (FLOAT32 + 2 * INT32)
    beams = levels * rows * (INT32 + INT64) + at_once * INT32
    return {
        "logits": rows * vocab * element_bytes,
        "growth": best + candidates + beams,
        "trees": 3 * (requests + 1) * (tree.num_nodes + 1) * INT64,
        "roots": requests * (hidden * element_bytes + INT64),
    }


def verification_rows(requests: int, nodes: int, max_tokens: int | None = None) -> int:
    """Rows of logits of the largest step that verifies ``nodes`` and the root of each request.

    Args:
        max_tokens: rows of a step at most (``max_num_batched_tokens``); None for no limit.
    """
    rows = requests * (nodes + 1)
    return rows if max_tokens is None else min(rows, max_tokens)


def float_rows(rows: int, nodes: int, vocab: int) -> int:
    """How many of them vLLM has in float32 at a time: of `MAX_FLOAT_BYTES`, or of one request."""
    return min(rows, max(MAX_FLOAT_BYTES // (vocab * FLOAT32), nodes + 1))


def verification_bytes(
    requests: int,
    nodes: int,
    vocab: int,
    *,
    max_tokens: int | None = None,
    element_bytes: int = 2,
) -> int:
    """Logits of such a step: as the head writes them, and vLLM's copy of some in float32."""
    rows = verification_rows(requests, nodes, max_tokens)
    return rows * vocab * element_bytes + float_rows(rows, nodes, vocab) * vocab * FLOAT32
