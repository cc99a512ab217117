"""Which variants of the kernels a launch can pick: none that is not listed, so none compiles late.

What Triton's compiler tells apart (constants, types, alignment, the integers 1 and multiples of 16)
is noted in the interpreter; see ``tests.common.variants``. An engine's own list, and a run against
it, are in ``tests/vllm/test_kernel_variants.py``.
"""

import random
from functools import partial

import pytest
import torch

from tests.common.growth import GrowthBatch, ToyDraft
from tests.common.tree_batches import Request, make_batch, random_tree, unrolled_attention
from tests.common.triton_interpreter import (
    INTERPRETED,
    mend_interpreter,
    run_again_interpreted,
)
from tests.common.variants import recorded_variants
from vllm_msd.kernels import DraftPlace, TreeAttentionWorkspace, accept, tree_attention
from vllm_msd.kernels.tree_attention import launch
from vllm_msd.kernels.tree_attention.launch import LaunchConfig
from vllm_msd.tree import GrowthBuffers, TreeShape, grow_tree_fused

interpreted = pytest.mark.skipif(
    not INTERPRETED, reason="runs in a process of its own with TRITON_INTERPRET=1"
)


@pytest.mark.skipif(INTERPRETED, reason="starts the interpreter's process")
def test_in_the_interpreter():
    run_again_interpreted(__file__)


@pytest.fixture(autouse=True)
def _mended(monkeypatch):
    if INTERPRETED:
        mend_interpreter(monkeypatch)


@interpreted
def test_a_request_is_found_among_many():
    """By binary search: more than a hundred requests, many of them without rows."""
    generator, rng = torch.Generator().manual_seed(0), random.Random(0)
    requests = [
        Request(rng.randrange(1, 9), random_tree(rng.randint(2, 20), generator))
        if rng.random() < 0.3
        else Request(rng.randint(1, 6), queries=rng.choice((0, 0, 1)))
        for _ in range(130)
    ]
    batch = make_batch(requests, heads=1, padding=2)
    out = torch.full_like(batch.args[0], 7.0)
    tree_attention(*batch.args, out=out, num_splits=1, config=LaunchConfig(16, 16, 4, 1))
    rows = int(batch.args[5][-1])
    torch.testing.assert_close(
        out[:rows].double(), unrolled_attention(batch)[:rows], rtol=0, atol=1e-5
    )
    assert (out[rows:] == 7).all()


@interpreted
@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_size"), [(8, 8, 128), (28, 4, 128), (4, 2, 256)]
)
def test_attention_launches_what_is_listed(monkeypatch, capability, heads, kv_heads, head_size):
    """Steps of all shapes, noted and not run; their tensors begin anywhere in larger buffers."""
    max_tokens, max_model_len, block_size = 2048, 8192, 16
    monkeypatch.setattr(launch, "_device", lambda device: (132, capability))
    meta = partial(torch.empty, device="meta")
    cache = meta(100, kv_heads, block_size, 2 * head_size, dtype=torch.bfloat16)
    caches = cache.transpose(1, 2).split(head_size, dim=-1)
    workspace = TreeAttentionWorkspace.allocate(128, heads, head_size, device="meta")
    table = meta(600, max_model_len // block_size, dtype=torch.int32)
    numbers, masks = meta(1200, dtype=torch.int32), meta(2 * max_tokens, dtype=torch.int64)

    def attend(rows, requests, first=0, **options):
        q = meta(rows + first, heads + 2 * kv_heads, head_size, dtype=torch.bfloat16)
        chosen = slice(first, first + requests)
        tree_attention(
            q[first:, :heads], *caches, table[chosen], numbers[chosen],
            numbers[first : first + requests + 1], numbers[chosen], masks[first : first + rows],
            0.1, out=meta(rows, heads, head_size, dtype=q.dtype), workspace=workspace, **options,
        )  # fmt: skip

    with recorded_variants(run=False) as listed:
        for config, splits in launch.choices(
            heads // kv_heads, head_size, 2, max_tokens, max_model_len, capability[0] == 9
        ):
            attend(1, 1, config=config, num_splits=splits)
    rng = random.Random(0)
    with recorded_variants(run=False) as launched:
        for _ in range(600):
            requests = rng.choice((1, 2, 3, 7, 17, 70, 256, 500))
            longest = rng.choice((1, 2, 5, 9, 25, 61, 64, 300, max_tokens))
            rows = min(max_tokens, max(longest, rng.randint(requests, 3 * requests)))
            attend(
                rows, requests, rng.randrange(100), max_query_len=longest,
                max_seq_len=rng.randint(longest, max_model_len),
            )  # fmt: skip
    assert launched <= listed, launched - listed
    assert len(launched) > 6


@interpreted
def test_growing_launches_the_same_for_every_batch():
    """Of any size, and of requests from the middle of a batch that is drafted for in turn."""
    draft, shape = ToyDraft(40, seed=1), TreeShape(12, depth=3, top_k=3)
    buffers = GrowthBuffers.allocate(shape, 6, draft.vocabulary, torch.device("cpu"))

    def grow(slots, chosen):
        batch = GrowthBatch.make(draft, shape, slots)
        place = DraftPlace(batch.place.first[chosen], batch.place.slots[chosen], *batch.place[2:])
        part = GrowthBatch(draft, shape, place, batch.root_hidden[chosen].clone())
        inputs, drafts = part.inputs(), torch.zeros(len(slots), 11, dtype=torch.int64)
        grow_tree_fused(
            draft.logits(part.root_hidden), part.root_hidden, part.expand_paged(inputs), buffers,
            inputs, place, part.relations(), drafts[chosen],
        )  # fmt: skip

    with recorded_variants() as alone:
        grow([0], slice(0, 1))
    with recorded_variants() as launched:
        for slots, chosen in (
            ([1, 0], slice(0, 2)),
            ([0, 1, 2, 3, 4], slice(0, 5)),
            ([0, -1, 2, 3, 4], slice(1, 3)),
            ([0, 1, 2, 3, 4], slice(3, 5)),
        ):
            grow(slots, chosen)
    assert launched == alone
    assert [name for name, *_ in sorted(alone, key=str)].count("beam_step_kernel") == 3


@interpreted
def test_the_walk_launches_the_same_for_every_batch():
    """Of odd and even numbers of requests, and of a piece of a step's rows."""
    rows, nodes = torch.zeros(80, dtype=torch.int64), 9
    with recorded_variants() as launched:
        for requests, first in ((1, 0), (2, 0), (3, 5), (4, 8)):
            parents = torch.arange(-1, nodes - 1).repeat(requests, 1)
            starts = torch.arange(0, requests * nodes + 1, nodes, dtype=torch.int32)
            accept(rows[first : first + 40], rows.int()[first : first + 40], parents, starts)
    assert len(launched) == 1


@interpreted
def test_the_record_tells_variants_apart():
    """Another width, type or alignment is another variant: the tests above could fail."""
    shape = TreeShape(12, depth=3, top_k=3)
    found = []
    for draft in (ToyDraft(40, seed=1), ToyDraft(48, seed=1), ToyDraft(40, 1, torch.bfloat16)):
        batch = GrowthBatch.make(draft, shape, [0])
        with recorded_variants() as launched:
            batch.by_kernels()
        found.append(frozenset(launched))
    assert len(set(found)) == 3
    unaligned = torch.zeros(5)[1:]
    from tests.common.variants import variant_of
    from vllm_msd.kernels.top_k.triton_kernel import merge_top_k_kernel as kernel

    rest = {"K": 1, "SLOTS": 1, "ENTRIES": 2, "HAS_MAP": False}
    first, second = (
        variant_of(kernel, (t, t, t, None, 2, 2), rest) for t in (torch.zeros(4), unaligned)
    )
    assert first != second
