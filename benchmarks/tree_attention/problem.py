"""Shapes and data of the benchmark: the question, its least cost, its answer.

All requests of a case have the same context and the same tree, because some of the alternatives
know only that. The cost of none depends on it.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vllm_msd.kernels import ancestor_bits
from vllm_msd.kernels.tree_attention.eager import tree_attention_eager

BLOCK_SIZE = 16
COLD_BYTES = 256 * 2**20  # caches taken in turn, so that none is left in the L2 cache
MAX_COPIES = 32


@dataclass(frozen=True)
class Model:
    """Attention of one model: query heads, KV heads, head size, layers."""

    heads: int
    kv_heads: int
    head_size: int
    layers: int


MODELS = {
    "llava-1.5-7b": Model(32, 32, 128, 32),
    "llava-1.5-13b": Model(40, 40, 128, 40),
    "qwen2-vl-7b": Model(28, 4, 128, 28),
}
TINY = "tiny"  # no model: so small that Triton's interpreter can do it
MODELS[TINY] = Model(heads=4, kv_heads=2, head_size=64, layers=2)


@dataclass(frozen=True)
class Case:
    """One layer's attention for ``batch`` trees of a root and ``nodes`` drafted tokens."""

    model: str
    batch: int
    context: int
    nodes: int

    @property
    def shape(self) -> Model:
        return MODELS[self.model]

    @property
    def queries(self) -> int:
        """Query rows of a request: the root and its nodes."""
        return self.nodes + 1

    @property
    def kv_bytes(self) -> int:
        """Keys and values of all requests, bf16."""
        keys = self.batch * (self.context + self.queries)
        return 2 * keys * self.shape.kv_heads * self.shape.head_size * 2

    @property
    def bytes(self) -> int:
        """What has to be moved at least: keys and values once, queries and results once."""
        rows = self.batch * self.queries * self.shape.heads * self.shape.head_size
        return self.kv_bytes + 2 * rows * 2

    @property
    def operations(self) -> int:
        """Multiplications and additions of both matrix products, without padding."""
        pairs = self.batch * self.queries * (self.context + self.queries)
        return 4 * pairs * self.shape.heads * self.shape.head_size


def random_parents(queries: int, seed: int = 0) -> list[int]:
    """A tree as a drafter might grow it: parents are among the first third of what is there."""
    generator = torch.Generator().manual_seed(seed)
    picks = torch.rand(queries, generator=generator)
    return [-1] + [int(picks[i] * math.ceil(i / 3)) for i in range(1, queries)]


@dataclass
class Problem:
    """A case's tensors on a device; ``caches`` are different layers' with the same block table."""

    case: Case
    parents: list[int]
    q: Tensor  # [batch * queries, heads, head_size]
    caches: list[Tensor]  # [blocks, kv_heads, BLOCK_SIZE, 2 * head_size] as vLLM packs them
    table: Tensor
    seq_lens: Tensor
    query_start: Tensor
    tree_start: Tensor
    ancestors: Tensor
    scale: float
    _dense: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    _exact: dict[bool, list[tuple[slice, Tensor, Tensor]]] = field(default_factory=dict)

    @classmethod
    def make(
        cls,
        case: Case,
        device: str = "cuda",
        dtype: torch.dtype = torch.bfloat16,
        max_copies: int = MAX_COPIES,
    ):
        generator = torch.Generator(device).manual_seed(0)
        shape, queries = case.shape, case.queries
        blocks = -(-(case.context + queries) // BLOCK_SIZE)
        copies = max(1, min(max_copies, -(-COLD_BYTES // case.kv_bytes)))

        def noise(*size: int) -> Tensor:
            return torch.randn(size, generator=generator, device=device, dtype=dtype)

        order = torch.randperm(case.batch * blocks, generator=generator, device=device)
        parents = random_parents(queries)
        whole = {"dtype": torch.int32, "device": device}
        return cls(
            case=case,
            parents=parents,
            q=noise(case.batch * queries, shape.heads, shape.head_size),
            caches=[
                noise(case.batch * blocks, shape.kv_heads, BLOCK_SIZE, 2 * shape.head_size)
                for _ in range(copies)
            ],
            table=order.view(case.batch, blocks).int(),
            seq_lens=torch.full((case.batch,), case.context + queries, **whole),
            query_start=torch.arange(case.batch + 1, **whole) * queries,
            tree_start=torch.full((case.batch,), case.context, **whole),
            ancestors=ancestor_bits(parents).to(device).repeat(case.batch),
            scale=shape.head_size**-0.5,
        )

    def paged(self, copy: int) -> tuple[Tensor, Tensor]:
        """Keys and values ``[blocks, BLOCK_SIZE, kv_heads, head_size]`` of one cache, as views."""
        k, v = self.caches[copy].transpose(1, 2).split(self.case.shape.head_size, dim=-1)
        return k, v

    def dense(self, copy: int) -> tuple[Tensor, Tensor]:
        """The same gathered per request, ``[batch, seq_len, kv_heads, head_size]``, contiguous."""
        if copy not in self._dense:
            length = self.case.context + self.case.queries
            self._dense[copy] = tuple(
                x[self.table.long()].flatten(1, 2)[:, :length].contiguous()
                for x in self.paged(copy)
            )
        return self._dense[copy]

    def visible(self) -> Tensor:
        """Bool ``[queries, seq_len]``: the mask of one request."""
        nodes = torch.arange(self.case.queries, device=self.q.device)
        bits = (self.ancestors[: self.case.queries, None] >> nodes) & 1
        return torch.nn.functional.pad(bits.bool(), (self.case.context, 0), value=True)

    def arguments(self, copy: int, tree: bool = True) -> tuple:
        """Arguments of ``tree_attention``."""
        trees = (self.tree_start, self.ancestors) if tree else (None, None)
        lengths = (self.table, self.seq_lens, self.query_start)
        return (self.q, *self.paged(copy), *lengths, *trees, self.scale)

    def worst_error(self, result: Tensor, tree: bool = True) -> float:
        """Largest error of the first and the last request, as a multiple of what rounding explains.

        Weights and result are each rounded once, by half a unit in the last place; 2.0 leaves room
        for another order of operations. ``result`` may be any view of [rows, heads, head_size].
        """
        if not result.isfinite().all():
            return math.inf
        result = result.reshape(self.q.shape)
        return max(
            ((result[rows].float() - exact).abs() / bound).max().item()
            for rows, exact, bound in self._references(tree)
        )

    def _references(self, tree: bool) -> list[tuple[slice, Tensor, Tensor]]:
        """Rows of the first and the last request, their float32 result, what rounding may change"""
        if tree not in self._exact:
            queries = self.case.queries
            q, k, v, table, seq_lens, starts, root, bits, scale = self.arguments(0)
            references = []
            for request in sorted({0, self.case.batch - 1}):
                rows = slice(request * queries, (request + 1) * queries)
                one = slice(request, request + 1)
                some = (table[one], seq_lens[one], starts[:2])
                some += (root[one], bits[rows]) if tree else (None, None)
                out = torch.zeros(queries, *q.shape[1:], device=q.device)
                exact = tree_attention_eager(q[rows], k, v, *some, scale, out=out.clone())
                # The weighted sum of absolute values; `abs` of the cache's blocks in use only.
                used = table[request].long()
                own = torch.arange(len(used), device=q.device, dtype=torch.int32)[None]
                sizes = tree_attention_eager(
                    q[rows], k[used], v[used].abs(), own, *some[1:], scale, out=out
                )
                bound = torch.finfo(q.dtype).eps / 2 * (sizes + exact.abs()) + 1e-5
                references.append((rows, exact, bound))
            self._exact[tree] = references
        return self._exact[tree]
