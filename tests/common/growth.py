"""A toy draft whose output shows every input that growing a tree has to give it.

Its rows attend over a paged cache: a row's output depends on the tokens of the drafted rows it
sees, found by KV slots and ancestor bits, on its rotary position and on its parent's hidden row. So
a wrong slot, mask, position, token or parent changes logits, and with them the tree.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from vllm_msd.kernels import Beams, Candidates, DraftPlace, LevelInputs
from vllm_msd.tree import (
    DraftTree,
    GrowthBuffers,
    TreeShape,
    Vocabulary,
    grow_tree,
    grow_tree_fused,
)

HIDDEN, BLOCK_SIZE = 24, 4


@dataclass
class ToyDraft:
    """Random weights; with ``ties`` the log-probabilities of a row are exactly 0, -64, -128, ..."""

    vocabulary: int
    seed: int
    dtype: torch.dtype = torch.float32
    ties: bool = False
    device: str = "cpu"

    def __post_init__(self) -> None:
        g = torch.Generator().manual_seed(self.seed)
        self.embedding, self.mix, self.head, self.rotary = (
            torch.randn(shape, generator=g, dtype=torch.double).to(self.device) / scale
            for shape, scale in (
                ((self.vocabulary, HIDDEN), 1),
                ((HIDDEN, HIDDEN), 4),
                ((HIDDEN, self.vocabulary), 1),
                ((512, HIDDEN), 2),
            )
        )

    def logits(self, hidden: Tensor) -> Tensor:
        logits = hidden.double() @ self.head
        if self.ties:  # below the first all are too small to count in a sum
            logits = -64.0 * logits.argsort(-1, descending=True).argsort(-1)
        return logits.to(self.dtype)

    def output(self, tokens: Tensor, seen: Tensor, parents: Tensor, positions: Tensor) -> Tensor:
        """Hidden rows ``[..., H]`` of rows that see the ``seen`` ones of ``tokens [..., n]``."""
        fed = (self.embedding[tokens.long()] * seen[..., None]).sum(-2)
        return torch.tanh(fed + parents.double() @ self.mix + self.rotary[positions]).float()


@dataclass
class GrowthBatch:
    """Requests of unequal length in one paged cache; those with slot -1 only pad the batch."""

    draft: ToyDraft
    shape: TreeShape
    place: DraftPlace
    root_hidden: Tensor

    @classmethod
    def make(
        cls, draft: ToyDraft, shape: TreeShape, slots: list[int], seed: int = 0
    ) -> "GrowthBatch":
        """Positions start anywhere that leaves room for the drafted rows."""
        g = torch.Generator().manual_seed(seed)
        per_slot = 20
        table = torch.randperm((max(slots) + 1) * per_slot, generator=g).view(-1, per_slot).int()
        first = torch.randint(0, per_slot * BLOCK_SIZE, (len(slots),), generator=g)
        first = (first - shape.depth * shape.top_k).clamp(min=0)
        place = DraftPlace(first, torch.tensor(slots), table, BLOCK_SIZE, 400)
        place = DraftPlace(*(t.to(draft.device) for t in place[:3]), *place[3:])
        hidden = torch.randn(len(slots), HIDDEN, generator=g).to(draft.device)
        return cls(draft, shape, place, hidden)

    def by_definition(self, token_ids: Tensor | None = None) -> DraftTree:
        """Trees of all requests; what padding gets does not matter."""
        fed = []

        def expand(tokens, hidden, visible, level):
            fed.append(tokens)
            seen = torch.cat(fed, 1)[:, None].expand(visible.shape)
            positions = (self.place.first + level).clamp(max=self.place.max_model_len - 1)
            positions = positions[:, None].expand(tokens.shape)
            out = self.draft.output(seen, visible, hidden, positions)
            return self.draft.logits(out), out

        roots = torch.zeros(len(self.root_hidden), dtype=torch.int64, device=self.draft.device)
        root_logits = self.draft.logits(self.root_hidden)
        return grow_tree(roots, root_logits, self.root_hidden, expand, self.shape, token_ids)

    def inputs(self) -> LevelInputs:
        """Buffers longer than the batch needs, full of what nobody may read."""
        device = self.draft.device
        rows, num_requests = (len(self.root_hidden) + 1) * self.shape.top_k, len(self.root_hidden)
        full = partial(torch.full, fill_value=7, device=device)
        return LevelInputs(
            full((rows,), dtype=torch.int32),
            full((rows,), dtype=torch.int64),
            full((rows,), dtype=torch.int64),
            full((num_requests + 1,), dtype=torch.int32),
            full((rows, HIDDEN), dtype=torch.float32),
        )

    def buffers(self) -> GrowthBuffers:
        return GrowthBuffers.allocate(
            self.shape, len(self.root_hidden) + 1, self.draft.vocabulary, self.draft.device
        )

    def relations(self) -> tuple[Tensor, Tensor, Tensor]:
        slots, nodes = len(self.place.block_table), self.shape.total_tokens
        return tuple(
            torch.zeros(slots + 1, nodes, dtype=torch.int64, device=self.draft.device)
            for _ in range(3)
        )

    def expand_paged(self, inputs: LevelInputs):
        """What `grow_tree_fused` calls; reads the inputs and the ancestor bits alone."""
        place, k = self.place, self.shape.top_k
        num_rows = len(self.root_hidden) * k
        cache = torch.zeros(place.block_table.numel() * BLOCK_SIZE + 1, device=self.draft.device)

        def expand(level, ancestors, tree_start):
            slots = place.slots.clamp(min=0).repeat_interleave(k)
            cache[inputs.kv_slots[:num_rows]] = inputs.input_ids[:num_rows].float()  # -1: the last
            bit = torch.arange((level + 1) * k, device=ancestors.device)
            seen = (ancestors[:, None] >> bit & 1).bool()
            position = tree_start.clamp(min=0).repeat_interleave(k)[:, None] + bit
            block = place.block_table[slots[:, None], position // BLOCK_SIZE].long()
            tokens = cache[block * BLOCK_SIZE + position % BLOCK_SIZE]
            out = self.draft.output(
                tokens, seen, inputs.hidden[:num_rows], inputs.positions[:num_rows]
            )
            return self.draft.logits(out), out

        return expand

    def prepared(self, vocabulary: Vocabulary | None = None, levels: int | None = None):
        """A call that grows by kernels into buffers of its own, and one that looks at the trees.

        With ``levels`` only so many are fed; of the nodes that this cannot reach nothing is true.
        """
        inputs, relations, buffers = self.inputs(), self.relations(), self.buffers()
        expand = self.expand_paged(inputs)
        drafts = torch.zeros(
            len(self.root_hidden) + 1, self.shape.total_tokens - 1, dtype=torch.int64
        ).to(self.draft.device)
        kept = self.shape.total_tokens
        if levels is not None:
            for t in (*buffers.candidates, *buffers.beams):
                t.zero_()  # as certain as can be, from an earlier round
            buffers = buffers.shallower(levels)
            kept = buffers.shape.total_tokens

        def grow() -> None:
            grow_tree_fused(
                self.draft.logits(self.root_hidden), self.root_hidden, expand,
                buffers, inputs, self.place, [x[:, :kept] for x in relations],
                drafts[:, : kept - 1], vocabulary or Vocabulary(),
            )  # fmt: skip

        def trees() -> DraftTree:
            real = self.place.slots >= 0
            tokens = drafts[: len(real)][real]
            return DraftTree(
                torch.cat([tokens.new_zeros(len(tokens), 1), tokens], 1),
                *(x[self.place.slots[real]] for x in relations),
            )

        return grow, trees

    def by_kernels(self, vocabulary: Vocabulary | None = None) -> DraftTree:
        """Trees of the requests that are none of the padding."""
        grow, trees = self.prepared(vocabulary)
        grow()
        return trees()

    def capture(self):
        """Grow once into a CUDA graph; returns a call that replays it and gives the trees."""
        grow, trees = self.prepared()
        grow()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            grow()

        def replay() -> DraftTree:
            graph.replay()
            return trees()

        return replay

    def take_over(self, other: "GrowthBatch") -> None:
        """The contents of another batch of this size, in place."""
        self.root_hidden.copy_(other.root_hidden)
        for mine, its in zip(self.place[:3], other.place[:3], strict=True):
            mine.copy_(its)

    def assert_grows_the_same(self) -> None:
        expected, found = self.by_definition(), self.by_kernels()
        real = self.place.slots >= 0
        for name in ("tokens", "parents", "depths", "ancestors"):
            assert torch.equal(getattr(found, name), getattr(expected, name)[real]), name


def random_step(
    k: int, depth: int, level: int, slots: list[int], seed: int, max_model_len: int = 60
) -> dict:
    """Arguments of one `beam_step` in the middle of a growth, with ties among the scores."""
    g = torch.Generator().manual_seed(seed)
    num_requests, parents = len(slots), k if level else 1
    candidates = Candidates.allocate(num_requests + 1, depth, k, torch.device("cpu"))
    beams = Beams.allocate(num_requests + 1, depth, k, torch.device("cpu"))
    candidates.scores.copy_(-torch.randint(0, 6, candidates.scores.shape, generator=g).float())
    for t in (*candidates[1:], *beams):
        t.fill_(5)
    if level:
        before = k + (level - 2) * k * k if level > 1 else 0
        last = torch.stack([torch.randperm(k * k if level > 1 else k, generator=g)[:k]
                            for _ in range(num_requests)])  # fmt: skip
        beams.numbers[level - 1, :num_requests] = (before + last).int()
        bits = torch.randint(0, 2**62, (num_requests, k), generator=g)
        beams.ancestors[level - 1, :num_requests] = bits & ((1 << (level * k)) - 1)
    shape = (num_requests * parents, k)
    log_probs = -torch.randint(0, 6, shape, generator=g).float().sort(-1).values
    table = torch.randperm((max(slots) + 1) * 16, generator=g).view(-1, 16).int()
    first = torch.randint(0, 64 - depth * k if depth * k < 60 else 4, (num_requests,), generator=g)
    rows = (num_requests + 1) * k
    return {
        "log_probs": log_probs,
        "tokens": torch.randint(0, 1000, shape, generator=g, dtype=torch.int32),
        "level": level,
        "candidates": candidates,
        "beams": beams,
        "inputs": LevelInputs(
            torch.full((rows,), 7, dtype=torch.int32),
            torch.full((rows,), 7),
            torch.full((rows,), -7),
            torch.full((num_requests + 1,), 7, dtype=torch.int32),
            torch.full((rows, 20), 7.0, dtype=torch.bfloat16),
        ),
        "parent_hidden": torch.randn(num_requests * parents, 20, generator=g).bfloat16(),
        "place": DraftPlace(first, torch.tensor(slots), table, BLOCK_SIZE, max_model_len),
    }
