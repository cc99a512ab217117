"""Laying trees over a step's rows: the eager twin here, the Triton kernel in the interpreter.

The oracle is `TreeStore`, which works on whole tensors, row by row of the logits. What could go
wrong: rows of a prompt in front of a tree, trees cut short, requests without drafts, padding, a
query longer than a program's block, several dimensions of positions changed in place.

The interpreter must be on before Triton is imported, so this file runs itself a second time in a
process of its own, where the same calls take the kernel.
"""

import pytest
import torch

from tests.common.accepted_paths import random_forest
from tests.common.launches import NoOperation
from tests.common.triton_interpreter import (
    INTERPRETED,
    mend_interpreter,
    run_again_interpreted,
)
from vllm_msd.kernels import place_trees
from vllm_msd.tree import DraftTree, TreeStore

SLOTS, NODES, PADDING = 12, 12, 3
# Rows of the query and how many of the last are nodes.
QUERIES = [(12, 12), (1, 1), (2500, 1), (5, 5), (1100, 7), (1, 1), (2, 2)]


@pytest.mark.skipif(INTERPRETED, reason="starts the interpreter's process")
def test_in_the_interpreter():
    run_again_interpreted(__file__)


@pytest.fixture(autouse=True)
def _mended(monkeypatch):
    if INTERPRETED:
        mend_interpreter(monkeypatch)


def offsets(lengths, dtype=torch.int32):
    return torch.tensor([0, *lengths], dtype=dtype).cumsum(0, dtype=dtype)


def make_step(dims, seed=0):
    """Trees, and arguments of `place_trees` with outputs full of what nobody wrote."""
    g = torch.Generator().manual_seed(seed)
    tokens, parents, _, _ = random_forest([NODES] * SLOTS, NODES, seed=seed)
    tree = DraftTree.from_parents(tokens, parents, check=False)
    queries, nodes = zip(*QUERIES, strict=True)
    rows = sum(queries) + PADDING
    context = torch.randint(0, 50, (len(QUERIES),), generator=g)
    shape = (rows,) if dims == 1 else (dims, rows)
    # As vLLM's M-RoPE buffer, rows of which have one place more than is used.
    linear = torch.zeros(*shape[:-1], rows + 1, dtype=torch.int64)[..., :-1]
    linear.copy_(torch.randint(0, 9000, shape, generator=g))
    return tree, {
        "depths": tree.depths,
        "ancestors": tree.ancestors,
        "slots": torch.randperm(SLOTS, generator=g)[: len(QUERIES)],
        "node_start": offsets(nodes),
        "query_start": offsets(queries),
        "seq_lens": (context + torch.tensor(queries)).int(),
        "linear": linear,
        "tree_start": torch.full((len(QUERIES) + PADDING,), 7, dtype=torch.int32),
        "root_rows": torch.full((len(QUERIES),), 7),
        "row_ancestors": torch.full((rows,), 7),
        "positions": torch.full_like(linear, 7) if dims == 1 else linear,
        "shifts": torch.full((sum(nodes) + PADDING,), 7),
    }


@pytest.mark.parametrize("dims", [1, 3])
@pytest.mark.parametrize("integers", [torch.int32, torch.int64])
def test_rows_of_a_mixed_step(dims, integers):
    tree, step = make_step(dims)
    step["slots"] = step["slots"].to(integers)
    step["node_start"] = step["node_start"].to(integers)
    linear = step["linear"].clone()
    place_trees(**step)

    counts = step["node_start"].long().diff()
    ends = step["query_start"][1:].long()
    node = torch.cat([torch.arange(n) for n in counts.tolist()])
    row = (ends - counts).repeat_interleave(counts) + node
    slot = step["slots"].long().repeat_interleave(counts)
    store = TreeStore(SLOTS, len(step["row_ancestors"]), NODES)
    store.put(slice(0, SLOTS), tree)
    padded = len(QUERIES) + PADDING
    laid = store.begin_step(
        slot, node, row, step["node_start"], step["seq_lens"], padded, len(step["row_ancestors"])
    )
    assert torch.equal(step["tree_start"], laid.tree_start)
    assert torch.equal(step["root_rows"], store.step.root_rows)
    expected = torch.full_like(step["row_ancestors"], 7)
    expected[row] = laid.ancestors[row]
    assert torch.equal(step["row_ancestors"], expected)
    shift = store.shift(slot, node)
    assert step["shifts"].tolist() == [*shift.tolist(), *[7] * PADDING]
    linear[..., row] += shift
    used = int(ends[-1])
    assert torch.equal(step["positions"][..., :used], linear[..., :used])
    assert dims > 1 or (step["positions"][used:] == 7).all()
    assert not torch.equal(step["depths"][slot, node], node), "no tree among chains"


def test_what_does_not_fit_is_refused():
    _, step = make_step(1)
    for name, bad, message in (
        ("slots", step["slots"].float(), r"slots is torch\.float32"),
        ("linear", step["linear"][None, None], r"expected \[rows\] or \[dims, rows\]"),
        ("positions", step["positions"][1:], r"positions is torch\.int64 \[362"),
        ("depths", step["depths"].int(), r"depths is torch\.int32"),
        ("query_start", step["query_start"][:-1], r"query_start is torch\.int32 \[7\]"),
        ("root_rows", step["root_rows"][1:], r"root_rows is torch\.int64 \[6\]"),
    ):
        with pytest.raises(ValueError, match=message):
            place_trees(**step | {name: bad})


@pytest.mark.skipif(not INTERPRETED, reason="the launch is looked at with the interpreter on")
def test_the_launch_reads_no_tensor(monkeypatch):
    """Meta tensors have no contents: anything decided by a length would raise."""
    from vllm_msd.kernels.place_trees import triton_kernel

    grids = []

    class Recorder:
        def __getitem__(self, grid):
            return lambda *args, **kwargs: grids.append(grid)

    monkeypatch.setattr(triton_kernel, "place_trees_kernel", Recorder())
    step = {name: t.to("meta") for name, t in make_step(3)[1].items()}
    with NoOperation():
        place_trees(**step)
    assert grids == [(len(QUERIES) + PADDING,)]
