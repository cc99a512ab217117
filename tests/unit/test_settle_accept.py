"""Settling and the accepting walk: the eager twins here, the Triton kernels in the interpreter.

What could go wrong in settling: a row overwritten before it was read, rows of other requests or
behind the path touched, a block boundary inside the tree, strides of another layout, words wider
than a row is aligned to, a layer's distance to the first. So the whole backing buffer is compared
byte by byte with a copy in which the rows were moved one at a time from a snapshot. In the walk:
ragged rows, equal tokens that are no siblings, drafts marked as never acceptable, ends at a leaf,
the 64th node. There the oracle walks down every tree in plain loops.

The interpreter must be on before Triton is imported, so this file runs itself a second time in a
process of its own, where the same calls take the kernels.
"""

import pytest
import torch

from tests.common.accepted_paths import (
    LAYOUTS,
    layer_views,
    moved_one_by_one,
    random_forest,
    random_path,
    walked_one_by_one,
)
from tests.common.launches import NoOperation
from tests.common.triton_interpreter import INTERPRETED, run_again_interpreted
from vllm_msd.kernels import AcceptedPaths, LayerCaches, accept, settle


@pytest.mark.skipif(INTERPRETED, reason="starts the interpreter's process")
def test_in_the_interpreter():
    run_again_interpreted(__file__)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("dtype", "heads", "width", "block_size"),
    [
        (torch.bfloat16, 2, 128, 16),
        (torch.float16, 3, 160, 48),  # head size 80
        (torch.float32, 1, 64, 5),
        (torch.float8_e4m3fn, 5, 256, 16),
        (torch.float8_e5m2, 2, 3, 16),  # rows that no wider word divides
    ],
)
def test_settle_moves_the_path_and_nothing_else(layout, dtype, heads, width, block_size):
    generator = torch.Generator().manual_seed(heads + width)
    trees = [64, 1, 20, 7, 33]
    roots = [3, 30, block_size - 1, 11, -1]
    blocks = [-(-(max(r, 0) + n) // block_size) for r, n in zip(roots, trees, strict=True)]
    shape = (3, sum(blocks) + 1, heads, block_size, width)
    backing, views = layer_views(shape, dtype, layout, generator)
    views = [views[2], views[0]]  # backwards, and one layer that is nobody's business
    order = torch.randperm(sum(blocks), generator=generator).split(blocks)
    table = torch.full((len(trees), max(blocks)), 2**30, dtype=torch.int32)  # out of bounds
    paths = [random_path(n, generator) for n in trees]
    nodes = torch.full((len(trees), 64), -1)
    for i, (own, path) in enumerate(zip(order, paths, strict=True)):
        table[i, : len(own)] = own
        nodes[i, : len(path)] = torch.tensor(path)

    original = backing.clone()
    moved_one_by_one(views, table, roots, paths)
    expected = backing.clone()
    assert not torch.equal(expected, original)
    backing.copy_(original)
    caches = LayerCaches.of(views)
    starts = torch.tensor(roots, dtype=torch.int32)
    settle(caches, table, starts, nodes)
    assert torch.equal(backing, expected)
    settle(caches, table, torch.full_like(starts, -1), nodes)
    assert torch.equal(backing, expected)


@pytest.mark.parametrize(
    ("path", "nodes"), [([0, 1, 2, 3], 8), ([0, 7], 8), ([0, 2, 3, 4, 5, 6, 7], 8), ([0], 1)]
)
def test_settle_short_paths(path, nodes):
    """Nothing to move; one far row; every row one slot down, each onto its predecessor."""
    cache = torch.arange(40.0).view(5, 4, 1, 2)
    rows = cache.view(20, 2).clone()
    table = torch.arange(5, dtype=torch.int32)[None]
    padded = torch.tensor([path + [-1] * (nodes - len(path))])
    settle(LayerCaches.of([cache]), table, torch.tensor([6], dtype=torch.int32), padded)
    rows[6 : 6 + len(path)] = rows[[6 + node for node in path]]
    assert torch.equal(cache.view(20, 2), rows)


def test_settle_beyond_32_bit_offsets():
    """Three heads 2^30 words apart, heads outside of blocks; untouched memory costs nothing."""
    apart, width = 2**30 + 6, 3
    flat = torch.empty(2 * apart + 8 * width, dtype=torch.uint8)
    cache = flat.as_strided((2, 4, 3, width), (4 * width, width, apart, 1))
    cache.copy_(torch.arange(72).view(2, 4, 3, width))
    expected = cache.clone()
    expected[0, 3], expected[1, 0] = cache[1, 1], cache[1, 3]
    start, nodes = torch.tensor([2], dtype=torch.int32), torch.tensor([[0, 3, 5]])
    settle(LayerCaches.of([cache]), torch.arange(2, dtype=torch.int32)[None], start, nodes)
    assert torch.equal(cache, expected)


def test_separate_key_and_value_caches_are_two_caches():
    key, value = torch.randn(2, 3, 4, 2, 8)
    expected = torch.stack([key, value]).flatten(1, 2)
    expected[:, 3] = expected[:, 5]
    start, nodes = torch.tensor([2], dtype=torch.int32), torch.tensor([[0, 3, -1, -1]])
    settle(LayerCaches.of([key, value]), torch.arange(3, dtype=torch.int32)[None], start, nodes)
    assert torch.equal(torch.stack([key, value]).flatten(1, 2), expected)


def test_caches_that_do_not_belong_together_are_refused():
    cache = torch.zeros(4, 16, 2, 64)
    with pytest.raises(ValueError, match="at least one"):
        LayerCaches.of([])
    with pytest.raises(ValueError, match="given twice"):
        LayerCaches.of([cache, cache])
    with pytest.raises(ValueError, match=r"cache 1 is torch\.float16"):
        LayerCaches.of([cache, cache.half()])
    with pytest.raises(ValueError, match="cache 1 is"):
        LayerCaches.of([cache, torch.zeros(4, 2, 16, 64).transpose(1, 2)])
    with pytest.raises(ValueError, match="cache 0 has stride"):
        LayerCaches.of([cache.transpose(2, 3)])


def test_settle_refuses_what_does_not_fit():
    caches = LayerCaches.of([torch.zeros(4, 16, 2, 64)])
    good = [torch.zeros(2, 4, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)]
    good.append(torch.zeros(2, 6, dtype=torch.int64))
    for i, (bad, message) in enumerate(
        [
            (good[0][0], "block_table is"),
            (good[1].long(), "tree_start is torch.int64"),
            (good[2].int(), "nodes is torch.int32"),
        ]
    ):
        with pytest.raises(ValueError, match=message):
            settle(caches, *good[:i], bad, *good[i + 1 :])


@pytest.mark.parametrize("nodes", [1, 2, 5, 9, 33, 63, 64])
def test_accept_equals_walking_down_one_by_one(nodes):
    generator = torch.Generator().manual_seed(nodes)
    sizes = torch.randint(1, nodes + 1, (24,), generator=generator).tolist()
    sizes[0] = nodes
    tokens, parents, drawn, counts = random_forest(sizes, nodes, seed=nodes)
    expected = walked_one_by_one(tokens, parents, drawn, counts)
    real = torch.arange(nodes) < counts[:, None]
    starts = torch.tensor([0, *counts.cumsum(0)], dtype=torch.int32)
    parents[~real] = 77  # behind a request's rows stands anything
    result = accept(drawn[real], tokens[real].int(), parents, starts)
    assert torch.equal(result.lengths, expected.lengths)
    assert torch.equal(result.nodes, expected.nodes)
    assert torch.equal(result.tokens, expected.tokens)
    assert nodes == 1 or result.lengths.max() > 0


def test_accept_the_drawn_example():
    """The batch in accept's docstring; letters are tokens."""
    drawn = torch.tensor([ord(c) for c in "bxexxyzfgh"])
    tokens = torch.tensor([ord(c) for c in ".abcde..fg"])
    parents = torch.tensor(
        [[-1, 0, 0, 1, 1, 2], [-1, 0, 0, 0, 0, 0], [-1, 0, 1, 0, 0, 0]], dtype=torch.int32
    )
    starts = torch.tensor([0, 6, 7, 10], dtype=torch.int32)
    out = AcceptedPaths(*(torch.full(s, 9, dtype=torch.int32) for s in ((3,), (3, 6), (3, 6))))
    assert accept(drawn, tokens, parents, starts, out=out) is out
    assert out.lengths.tolist() == [2, 0, 2]
    assert out.nodes.tolist() == [[0, 2, 5, -1, -1, -1], [0] + [-1] * 5, [0, 1, 2, -1, -1, -1]]
    texts = ["".join(chr(t) for t in row if t >= 0) for row in out.tokens.tolist()]
    assert texts == ["bey", "z", "fgh"]


def test_accept_without_rows_or_with_marked_drafts():
    """-1 marks a draft nobody may accept; a request without rows emits nothing."""
    parents = torch.tensor([[-1, 0, 1], [-1, 0, 0]])
    starts = torch.tensor([0, 3, 3])
    result = accept(torch.tensor([4, 5, 6]), torch.tensor([4, -1, -1]), parents, starts)
    assert result.lengths.tolist() == [0, 0]
    assert result.nodes.tolist() == [[0, -1, -1], [-1, -1, -1]]
    assert result.tokens.tolist() == [[4, -1, -1], [-1, -1, -1]]


def test_a_root_that_is_its_own_parent_does_not_hang():
    parents, starts = torch.tensor([[0, 0, 1]]), torch.tensor([0, 3])
    result = accept(torch.tensor([4, 9, 5]), torch.tensor([4, 4, 9]), parents, starts)
    assert result.nodes.tolist() == [[0, 1, 2]]


def test_of_equal_siblings_the_first_is_taken_and_parents_come_first():
    parents, starts = torch.tensor([[-1, 0, 0, 1, 2], [-1, 2, 0, 0, 0]]), torch.tensor([0, 5, 8])
    tokens = torch.tensor([0, 4, 4, 5, 6, 0, 8, 7])
    drawn = torch.tensor([4, 5, 6, 9, 9, 7, 9, 8])
    result = accept(drawn, tokens, parents, starts)
    assert result.nodes.tolist() == [[0, 1, 3, -1, -1], [0, 2, -1, -1, -1]]
    assert result.tokens.tolist() == [[4, 5, 9, -1, -1], [7, 8, -1, -1, -1]]


def test_accept_refuses_what_does_not_fit():
    rows, parents = torch.zeros(5, dtype=torch.int64), torch.zeros(2, 3, dtype=torch.int64)
    starts = torch.tensor([0, 3, 5])
    with pytest.raises(ValueError, match="parents is"):
        accept(rows, rows, parents[0], starts)
    with pytest.raises(ValueError, match=r"tokens is torch.int64 \[4\]"):
        accept(rows, rows[:4], parents, starts)
    with pytest.raises(ValueError, match=r"row_start is torch.int64 \[2\]"):
        accept(rows, rows, parents, starts[:2])
    with pytest.raises(ValueError, match=r"drawn is torch\.float32"):
        accept(rows.float(), rows, parents, starts)


@pytest.mark.skipif(not INTERPRETED, reason="the launch is looked at with the interpreter on")
def test_the_launches_read_no_tensor(monkeypatch):
    """Meta tensors have no contents: anything decided by a node or a length would raise."""
    from vllm_msd.kernels.accept import triton_kernel as accept_code
    from vllm_msd.kernels.settle import triton_kernel as settle_code

    grids = []

    class Recorder:
        def __getitem__(self, grid):
            return lambda *args, **kwargs: grids.append(grid)

    monkeypatch.setattr(settle_code, "settle_kernel", Recorder())
    monkeypatch.setattr(accept_code, "accept_kernel", Recorder())
    cache = torch.zeros(40, 16, 32, 256, dtype=torch.bfloat16, device="meta")
    offsets = torch.zeros(2, dtype=torch.int64, device="meta")
    caches = LayerCaches((cache, cache), cache.view(torch.int64), offsets, 2)
    table = torch.zeros(3, 9, dtype=torch.int32, device="meta")
    nodes = torch.zeros(3, 64, dtype=torch.int64, device="meta")
    starts = table[:, 0].contiguous()
    rows = torch.zeros(100, dtype=torch.int64, device="meta")
    row_start, out = rows[:4], AcceptedPaths.allocate(3, 64, torch.device("meta"))
    with NoOperation():
        settle(caches, table, starts, nodes)
        accept(rows, rows, nodes, row_start, out=out)
    assert grids == [(4, 2, 3), (3,)]
