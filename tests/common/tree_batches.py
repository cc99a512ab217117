"""Ragged batches of trees over a paged cache, and the attention of their unrolled paths.

The batch is built from dense keys and values per request, which are then scattered over shuffled
cache blocks; every slot that holds nothing is NaN, so reading one shows. The oracle sees only the
dense keys and the parents: no paging, no masks.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from vllm_msd.kernels import ancestor_bits

# Paths of the static trees that came with Medusa (63 nodes) and EAGLE (25): digits are the
# rank of the child at each depth.
MEDUSA_63 = (
    "0 00 1 01 2 000 10 02 3 03 4 04 20 05 001 5 06 6 07 010 11 7 08 002 30 09 8 9 100 020 12 003 "
    "40 21 004 005 0000 011 006 030 50 13 007 008 009 60 040 14 70 012 200 31 22 80 050 15 101 021 "
    "90 060 0001 16 070"
)
EAGLE_25 = (
    "0 1 2 3 00 01 02 10 11 20 21 30 000 001 002 010 011 020 021 100 0000 0001 0002 00000 00001"
)


def parents_from_paths(paths: str) -> list[int]:
    """Parents of root + nodes, breadth first: every parent before its children."""
    ordered = ["", *sorted(paths.split(), key=lambda p: (len(p), p))]
    return [-1] + [ordered.index(p[:-1]) for p in ordered[1:]]


def chain(nodes: int) -> list[int]:
    return list(range(-1, nodes - 1))


def star(nodes: int) -> list[int]:
    return [-1] + [0] * (nodes - 1)


def random_tree(nodes: int, generator: torch.Generator) -> list[int]:
    picks = [int(torch.randint(i, (1,), generator=generator)) for i in range(1, nodes)]
    return [-1, *picks]


@dataclass
class Request:
    """``context`` positions, then the nodes of the tree if there is one.

    The last ``queries`` positions are asked; by default the tree, or the last token.
    """

    context: int
    parents: list[int] | None = None
    queries: int | None = None

    @property
    def seq_len(self) -> int:
        return self.context + len(self.parents or [])

    @property
    def query_len(self) -> int:
        if self.queries is not None:
            return self.queries
        return len(self.parents) if self.parents else 1


@dataclass
class Batch:
    """Arguments of ``tree_attention`` in order, and the dense tensors they were made from."""

    args: tuple
    keys: list[Tensor] = field(repr=False)  # per request [seq_len, kv_heads, head_size]
    values: list[Tensor] = field(repr=False)
    requests: list[Request]


def make_batch(
    requests: list[Request],
    *,
    heads: int = 2,
    kv_heads: int = 1,
    head_size: int = 64,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    cache_dtype: torch.dtype | None = None,
    padding: int = 0,
    seed: int = 0,
    tree_values: float = 1.0,
) -> Batch:
    """Build a batch; ``padding`` adds rows of q that belong to no request.

    ``tree_values`` is a factor on the values inside the trees: large ones show a wrong mask also
    behind a long context, of which each node is a small part.
    """
    generator = torch.Generator().manual_seed(seed)
    cache_dtype = cache_dtype or dtype

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    blocks = [-(-r.seq_len // block_size) for r in requests]
    num_blocks = sum(blocks) + 2
    order = torch.randperm(num_blocks - 1, generator=generator)  # the last one stays unused
    cache = torch.full((2, num_blocks, block_size, kv_heads, head_size), float("nan"))
    table = torch.full((len(requests), max(blocks) + 1), num_blocks - 1, dtype=torch.int32)
    keys, values, bits, starts, taken = [], [], [], [0], 0
    for i, (request, count) in enumerate(zip(requests, blocks, strict=True)):
        table[i, :count] = order[taken : taken + count]
        taken += count
        dense = noise(2, request.seq_len, kv_heads, head_size)
        if request.parents:
            dense[1, request.context :] *= tree_values
        dense = dense.to(cache_dtype).float()
        position = torch.arange(request.seq_len)
        cache[:, table[i, position // block_size].long(), position % block_size] = dense
        keys.append(dense[0])
        values.append(dense[1])
        # Rows before the tree have masks nobody may look at.
        nodes = ancestor_bits(request.parents) if request.parents else torch.empty(0).long()
        before = torch.full((request.query_len,), 0x5555_5555_5555, dtype=torch.int64)
        bits.append(torch.cat([before, nodes])[len(nodes) :])
        starts.append(starts[-1] + request.query_len)

    tokens = starts[-1] + padding
    q = noise(tokens, heads, head_size).to(dtype)
    bits.append(torch.full((padding,), -1, dtype=torch.int64))
    args = (
        q,
        cache[0].to(cache_dtype),
        cache[1].to(cache_dtype),
        table,
        torch.tensor([r.seq_len for r in requests], dtype=torch.int32),
        torch.tensor(starts, dtype=torch.int32),
        torch.tensor([r.context if r.parents else -1 for r in requests], dtype=torch.int32),
        torch.cat(bits),
        head_size**-0.5,
    )
    return Batch(args, keys, values, requests)


def unrolled_attention(batch: Batch) -> Tensor:
    """Float64 [tokens, heads, head_size]: every root-to-leaf path as a causal sequence of its own.

    A node that several paths share is computed in each of them.
    """
    q = batch.args[0].double()
    scale = batch.args[-1]
    starts = batch.args[5].tolist()
    out = torch.zeros_like(q)
    for i, request in enumerate(batch.requests):
        keys, values = batch.keys[i].double(), batch.values[i].double()
        first_query = request.seq_len - request.query_len
        for path in _paths(request):
            sequence = [*range(request.context), *(request.context + node for node in path)]
            asked = [j for j, position in enumerate(sequence) if position >= first_query]
            rows = torch.tensor(
                [starts[i] + sequence[j] - first_query for j in asked], dtype=torch.long
            )
            group = q.shape[1] // keys.shape[1]
            k = keys[sequence].repeat_interleave(group, dim=1)
            v = values[sequence].repeat_interleave(group, dim=1)
            scores = torch.einsum("qhd,khd->hqk", q[rows], k) * scale
            later = torch.arange(len(sequence))[None, :] > torch.tensor(asked)[:, None]
            weights = scores.masked_fill(later, float("-inf")).softmax(-1)
            out[rows] = torch.einsum("hqk,khd->qhd", weights, v)
    return out


def _paths(request: Request) -> list[list[int]]:
    """Root-to-leaf node lists; one empty path for a request without a tree."""
    parents = request.parents or []
    leaves = set(range(len(parents))) - set(parents)
    paths = []
    for leaf in sorted(leaves):
        path = [leaf]
        while parents[path[0]] >= 0:
            path.insert(0, parents[path[0]])
        paths.append(path)
    return paths or [[]]
