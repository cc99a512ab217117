"""The emulated CUDA graph: what it replays, what it refuses, and the plugin's kernels in it.

The interpreter must be on before Triton is imported, so this file runs itself in a process of its
own.
"""

import gc

import pytest
import torch

from tests.common.cuda_graphs import CaptureError, StaleGraphError, emulated_graphs
from tests.common.triton_interpreter import INTERPRETED, run_again_interpreted
from vllm_msd.kernels import ancestor_bits, tree_attention
from vllm_msd.kernels.tree_attention.eager import tree_attention_eager
from vllm_msd.tree import TreeShape, grow_tree

interpreted = pytest.mark.skipif(
    not INTERPRETED, reason="runs in a process of its own with TRITON_INTERPRET=1"
)

if INTERPRETED:
    import triton
    import triton.language as tl

    @triton.jit
    def scaled_sum_kernel(x_ptr, y_ptr, out_ptr, n, factor, BLOCK: tl.constexpr):
        offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        mask = offsets < n
        x = tl.load(x_ptr + offsets, mask=mask)
        y = tl.load(y_ptr + offsets, mask=mask)
        tl.store(out_ptr + offsets, x * factor + y, mask=mask)


def scaled_sum(x, y, factor):
    out = torch.empty_like(x)
    scaled_sum_kernel[(triton.cdiv(x.numel(), 16),)](x, y, out, x.numel(), factor, BLOCK=16)
    return out


@pytest.mark.skipif(INTERPRETED, reason="starts the interpreter's process")
def test_in_the_interpreter():
    run_again_interpreted(__file__)


@pytest.fixture(autouse=True)
def _graphs():
    if not INTERPRETED:
        yield
        return
    with emulated_graphs(), torch.inference_mode():
        yield


def capture(function):
    function()  # warm up, as vLLM does
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()
    return graph, result


@interpreted
def test_torch_and_triton_replay_on_new_contents():
    x, weight = torch.randn(40), torch.randn(40, 40)
    buffer, counter = torch.zeros(64), torch.zeros((), dtype=torch.int64)
    calls = []

    def step():
        calls.append(1)  # Python: not run again
        y = torch.nn.functional.linear(x, weight).relu()
        z = scaled_sum(x, y, 3)
        best = z.topk(4)
        order = z.sort(descending=True, stable=True).indices[:4]
        buffer[:40] = z.reshape(5, 8).t().contiguous().flatten()
        buffer[40:44] = best.values
        buffer[44:48].copy_(order)
        counter.add_(1)
        buffer[48:52] = torch.where(order < 20, z.gather(0, order), -1.0)
        return z.softmax(-1)

    graph, result = capture(step)
    assert graph.count()["triton"] == 1
    for seed in range(3):
        torch.manual_seed(seed)
        x.copy_(torch.randn(40))
        buffer.fill_(7)
        graph.replay()
        replayed, values = buffer.clone(), result.clone()
        buffer.fill_(7)
        expected = step()
        assert torch.equal(replayed, buffer)
        assert torch.equal(values, expected)
    assert counter == 2 + 3 + 3
    assert len(calls) == 2 + 3


@interpreted
def test_host_values_are_frozen():
    x, out, host = torch.ones(8), torch.zeros(8), [2]
    graph, _ = capture(lambda: out.copy_(scaled_sum(x, x, host[0])[: 4 * host[0]]))
    host[0] = 1
    graph.replay()
    assert out.tolist() == [3.0] * 8


@interpreted
@pytest.mark.parametrize(
    "wait",
    [
        lambda t: t.max().item(), lambda t: int(t.sum()), lambda t: bool((t > 0).any()),
        lambda t: t.tolist(), lambda t: t.numpy(), lambda t: t.cpu(), lambda t: t.nonzero(),
        lambda t: t[t > 0], lambda t: torch.tensor([1.0, 2.0]), lambda t: t.unique(),
        lambda t: t.repeat_interleave(torch.arange(8)), lambda t: torch.equal(t, t),
        lambda t: torch.cuda.synchronize(), lambda t: [x for x in t if x > 0],
        lambda t: t.masked_select(t > 0), lambda t: t[: t[0].long()],
    ],
)  # fmt: skip
def test_waiting_is_refused_and_the_line_named(wait):
    tensor = torch.ones(8)
    graph = torch.cuda.CUDAGraph()
    here = r"test_emulated_cuda_graphs\.py:\d+"
    with pytest.raises(CaptureError, match=here), torch.cuda.graph(graph):
        wait(tensor + 1)
    assert tensor.tolist() == [1.0] * 8  # and outside it is allowed again


@interpreted
def test_filling_by_a_mask_is_allowed():
    x = torch.arange(8.0)
    graph, _ = capture(lambda: (x.masked_fill_(x > 5, -1), x.__setitem__(x == 3, 9.0)))
    x.copy_(torch.arange(8.0))
    graph.replay()
    assert x.tolist() == [0, 1, 2, 9, 4, 5, -1, -1]


@interpreted
def test_a_tensor_allocated_again_after_capture():
    """Whoever replaces a buffer gets an error if the old one is gone, stale values if not."""
    owner = {"x": torch.ones(8)}
    out = torch.zeros(8)
    graph, _ = capture(lambda: out.copy_(owner["x"] * 2))
    kept = owner["x"]
    owner["x"] = torch.full((8,), 5.0)
    graph.replay()
    assert out.tolist() == [2.0] * 8, "the graph reads the old buffer"
    del kept
    gc.collect()
    with pytest.raises(StaleGraphError, match=r"32 bytes .*test_emulated_cuda_graphs\.py:\d+"):
        graph.replay()


@interpreted
def test_memory_of_the_graph_holds_nothing_between_replays():
    out = torch.zeros(4)

    def leaves_a_hole():
        scratch = torch.empty(4)
        scratch[:2] = 1
        out.copy_(scratch)

    graph, _ = capture(leaves_a_hole)
    graph.replay()
    assert out[:2].tolist() == [1, 1]
    assert out[2:].isnan().all()


@interpreted
def test_a_live_tensor_of_the_graph_keeps_its_place():
    x = torch.ones(3)
    graph, y = capture(lambda: x + 1)
    view, address = y[1:], y.data_ptr()
    x.fill_(4)
    graph.replay()
    assert y.data_ptr() == address
    assert view.tolist() == [5, 5]


@interpreted
def test_tree_attention_over_other_trees_and_lengths():
    """One graph, two requests: lengths, trees and masks change between replays."""
    q, out = torch.zeros(6, 2, 64), torch.zeros(6, 2, 64)
    cache = torch.randn(8, 16, 1, 128)
    keys, values = cache.split(64, dim=-1)
    table = torch.tensor([[0, 1, 2], [3, 4, 5]], dtype=torch.int32)
    lengths, starts = torch.ones(2, dtype=torch.int32), torch.tensor([0, 3, 6], dtype=torch.int32)
    roots, masks = torch.full((2,), -1, dtype=torch.int32), torch.zeros(6, dtype=torch.int64)
    batch = (q, keys, values, table, lengths, starts, roots, masks, 0.125)
    graph, _ = capture(lambda: tree_attention(*batch, out=out, max_query_len=3, max_seq_len=48))
    assert graph.count() == {"triton": 1}
    for seed, trees in enumerate(([[-1, 0, 0], [-1, 0, 1]], [[-1, 0, 1], [-1, 0, 0]])):
        torch.manual_seed(seed)
        q.copy_(torch.randn_like(q))
        lengths.copy_(torch.tensor([20 + seed, 35 - 9 * seed]))
        roots.copy_(lengths - 3)
        masks.copy_(torch.cat([ancestor_bits(tree) for tree in trees]))
        graph.replay()
        torch.testing.assert_close(out, tree_attention_eager(*batch), rtol=0, atol=1e-5)


@interpreted
def test_growing_a_tree():
    """`grow_tree` over a toy draft gives the eager tree on every replay."""
    vocabulary, width, shape = 50, 8, TreeShape(total_tokens=13, depth=3, top_k=3)
    head, mix = torch.randn(width, vocabulary), torch.randn(width, width)
    embedding = torch.randn(vocabulary, width)
    hidden, roots = torch.randn(2, width), torch.zeros(2, dtype=torch.int64)

    def expand(tokens, hidden, visible, level):
        out = torch.tanh(hidden @ mix + embedding[tokens] + level)
        return out @ head, out

    def grow():
        return grow_tree(roots, hidden @ head, hidden, expand, shape)

    graph, tree = capture(grow)
    branches = set()
    for seed in range(4):
        torch.manual_seed(seed)
        hidden.copy_(torch.randn_like(hidden))
        graph.replay()
        expected = grow()
        for name in ("tokens", "parents", "depths", "ancestors"):
            assert torch.equal(getattr(tree, name), getattr(expected, name)), name
        branches.add(tuple(tree.parents.flatten().tolist()))
    assert len(branches) > 1, "every replay drew the same tree"
