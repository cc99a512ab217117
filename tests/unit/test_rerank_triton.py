"""Reranking: the eager twin here, the Triton kernel in the interpreter.

What could go wrong in a kernel and not in its definition: equal scores, among them certain tokens,
which score like their parents, and candidates without any probability; the bit of the 64th node;
padding requests; a level's first and last candidate.

The interpreter must be on before Triton is imported, so this file runs itself a second time in a
process of its own, where the same calls take the kernel.
"""

import pytest
import torch

from tests.common.triton_interpreter import (
    INTERPRETED,
    mend_interpreter,
    run_again_interpreted,
)
from vllm_msd.kernels import Candidates, rerank
from vllm_msd.kernels.rerank.eager import rerank_eager


@pytest.mark.skipif(INTERPRETED, reason="starts the interpreter's process")
def test_in_the_interpreter():
    run_again_interpreted(__file__)


@pytest.fixture(autouse=True)
def _mended(monkeypatch):
    if INTERPRETED:
        mend_interpreter(monkeypatch)


def random_candidates(k, depth, num_requests, seed, ties):
    """Scores that never rise towards the leaves, as log-probabilities do."""
    g = torch.Generator().manual_seed(seed)
    candidates = Candidates.allocate(num_requests + 1, depth, k, torch.device("cpu"))
    scores, tokens, parents = candidates
    tokens.copy_(torch.randint(0, 1000, tokens.shape, generator=g))
    steps = -torch.rand(scores.shape, generator=g)
    if ties:
        steps = steps.mul(3).round()  # 0 is a certain token, which scores like its parent
        steps[0] = float("-inf")
    scores.copy_(steps)
    parents.fill_(-1)
    for level in range(depth):
        begin, before = k + level * k * k, max(0, k + (level - 1) * k * k)
        width = k if level == 0 else k * k
        for request in range(num_requests):
            beam = before + torch.randperm(width, generator=g)[:k].sort().values
            parents[request, begin : begin + k * k] = beam.int().repeat_interleave(k)
        children = slice(begin, begin + k * k)
        scores[:num_requests, children] += scores[:num_requests].gather(
            1, parents[:num_requests, children].long()
        )
    return candidates


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(
    ("k", "depth", "nodes"),
    [(1, 0, 2), (1, 8, 9), (2, 2, 2), (3, 0, 4), (4, 4, 25), (8, 1, 64), (10, 5, 61), (16, 4, 64)],
)
def test_rerank_equals_its_twin(k, depth, nodes, ties):
    slots = torch.tensor([2, -1, 0, 3], dtype=torch.int32)
    candidates = random_candidates(k, depth, len(slots), seed=k + nodes, ties=ties)
    relations, twin = (
        [torch.full((6, nodes), 77) for _ in range(3)] + [torch.full((5, nodes - 1), 77)]
        for _ in range(2)
    )
    rerank(candidates, k, slots, *relations)
    rerank_eager(candidates, slots, *twin)
    for name, ours, expected in zip(
        ("parents", "depths", "ancestors", "tokens"), relations, twin, strict=True
    ):
        assert torch.equal(ours, expected), name
    parents = relations[0]
    assert (parents[slots.long(), 1:] < torch.arange(1, nodes)).all()
    assert (parents[[1, 4]] == 77).all() and (parents[5] != 77).all()


def test_rerank_the_drawn_example():
    """The candidates in rerank's docstring, two levels of two."""
    candidates = Candidates(
        torch.tensor([[-0.5, -1, -0.9, -1.5, -1.1, -3]]),
        torch.tensor([[ord(c) for c in "abcdef"]], dtype=torch.int32),
        torch.tensor([[-1, -1, 0, 0, 1, 1]], dtype=torch.int32),
    )
    relations = [torch.zeros(2, 5, dtype=torch.int64) for _ in range(3)]
    drafts = torch.zeros(1, 4, dtype=torch.int64)
    rerank(candidates, 2, torch.tensor([0]), *relations, drafts)
    assert "".join(map(chr, drafts[0].tolist())) == "acbe"
    assert relations[0][0].tolist() == [-1, 0, 1, 0, 3]
    assert relations[1][0].tolist() == [0, 1, 2, 1, 2]
    assert relations[2][0].tolist() == [0b1, 0b11, 0b111, 0b1001, 0b11001]


def test_rerank_refuses_what_does_not_fit():
    candidates = random_candidates(2, 2, 2, seed=0, ties=False)
    square = torch.zeros(3, 5, dtype=torch.int64)
    good = [candidates, 2, torch.tensor([0, 1]), square, square, square, square[:, 1:]]
    good[-1] = good[-1].contiguous()
    for i, bad, message in (
        (1, 3, "10 candidates are no k"),
        (2, torch.zeros(2), "slots is torch.float32"),
        (3, torch.zeros(3, 65).long(), "T from 2 to 64"),
        (3, torch.zeros(3, 12).long(), "12 nodes with their root, but 10"),
        (5, square.int(), "ancestors is torch.int32"),
        (6, square, r"draft_tokens is torch.int64 \[3, 5\]"),
        (6, good[-1][:1], "1 rows for 2 requests"),
    ):
        with pytest.raises(ValueError, match=message):
            rerank(*good[:i], bad, *good[i + 1 :])
