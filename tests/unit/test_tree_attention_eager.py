"""The eager twin against unrolled paths, and the public call's checks.

What could go wrong in a definition: a mask bit that is off by one, prompt rows in front of a tree,
draft levels that ask only for the newest nodes, node 63 on the sign bit, slots that hold NaN. The
oracle shares no code with the twin: it never sees a mask or a block table. Both are exact up to
float32 sums of a few hundred terms, hence 1e-5.
"""

import pytest
import torch

from tests.common.tree_batches import (
    EAGLE_25,
    MEDUSA_63,
    Request,
    chain,
    make_batch,
    parents_from_paths,
    random_tree,
    star,
    unrolled_attention,
)
from vllm_msd.kernels import ancestor_bits, tree_attention
from vllm_msd.kernels.tree_attention.eager import tree_attention_eager, visible_keys


def assert_matches_paths(batch):
    result = tree_attention_eager(*batch.args)
    expected = unrolled_attention(batch)
    rows = int(batch.args[5][-1])
    torch.testing.assert_close(result[:rows].double(), expected[:rows], rtol=0, atol=1e-5)
    assert not result[rows:].any()


def test_the_drawn_tree():
    """The tree and the masks in tree_attention's docstring."""
    masks = ancestor_bits([-1, 0, 0, 1, 1, 2])
    assert [f"{m:06b}" for m in masks.tolist()] == [
        "000001",
        "000011",
        "000101",
        "001011",
        "010011",
        "100101",
    ]
    visible = visible_keys(6, 9, 3, masks)
    assert visible[:, :3].all()
    assert ["".join(" x"[v] for v in row) for row in visible[:, 3:].int().tolist()] == [
        "x     ",
        "xx    ",
        "x x   ",
        "xx x  ",
        "xx  x ",
        "x x  x",
    ]


@pytest.mark.parametrize("nodes", [1, 2, 15, 16, 17, 33, 63, 64])
def test_random_trees(nodes):
    generator = torch.Generator().manual_seed(nodes)
    trees = [random_tree(nodes, generator) for _ in range(4)] + [chain(nodes), star(nodes)]
    contexts = [0, 1, 16, 31, 100, 40]
    requests = [Request(c, t) for c, t in zip(contexts, trees, strict=True)]
    assert_matches_paths(make_batch(requests, heads=4, kv_heads=2))


@pytest.mark.parametrize("paths", [MEDUSA_63, EAGLE_25])
def test_published_trees(paths):
    parents = parents_from_paths(paths)
    assert_matches_paths(make_batch([Request(77, parents), Request(5, parents)]))


def test_mixed_batch():
    tree = [-1, 0, 0, 1, 1, 2, 2]
    requests = [
        Request(40, tree),  # verification
        Request(25),  # ordinary decoding
        Request(50, queries=30),  # a later chunk of a prompt
        Request(18, tree, queries=4),  # a draft level: only the newest nodes ask
        Request(33, tree, queries=12),  # the rest of a prompt in front of a tree
        Request(20, queries=0),  # nothing asked
        Request(0, tree),
    ]
    for block_size in (16, 48):
        assert_matches_paths(make_batch(requests, block_size=block_size, padding=3))


def test_no_tree_is_causal():
    batch = make_batch([Request(30, queries=12), Request(9)])
    causal = tree_attention_eager(*batch.args[:6], None, None, batch.args[-1])
    torch.testing.assert_close(causal, tree_attention_eager(*batch.args))
    torch.testing.assert_close(causal.double(), unrolled_attention(batch), rtol=0, atol=1e-5)


def test_a_slot_nobody_sees_may_hold_nan():
    """Node 2 is in nobody's mask (a pruned branch whose slot was never written)."""
    batch = make_batch([Request(4, [-1, 0, 0, 1])])
    q, k_cache, v_cache, table, seq_lens, starts, tree_start, masks, scale = batch.args
    keep = torch.tensor([0, 1, 3])
    masks[2] = masks[0]
    for cache in (k_cache, v_cache):
        cache[table[0, 0], 4 + 2] = float("nan")
    result = tree_attention_eager(
        q, k_cache, v_cache, table, seq_lens, starts, tree_start, masks, scale
    )
    torch.testing.assert_close(
        result[keep].double(), unrolled_attention(batch)[keep], atol=1e-5, rtol=0
    )
    assert result.isfinite().all()


def test_the_public_call_takes_the_twin_on_the_cpu(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    batch = make_batch([Request(20, [-1, 0, 0]), Request(7)], padding=1)
    out = torch.full_like(batch.args[0], 7.0)
    assert tree_attention(*batch.args, out=out) is out
    torch.testing.assert_close(out[:4], tree_attention_eager(*batch.args)[:4])
    assert (out[4:] == 7).all(), "padding rows were written"


def test_bad_trees_are_refused():
    with pytest.raises(ValueError, match="65 nodes"):
        ancestor_bits(chain(65))
    with pytest.raises(ValueError, match=r"parents\[2\] is 3"):
        ancestor_bits([-1, 0, 3, 0])
    with pytest.raises(ValueError, match=r"parents\[0\] is 0"):
        ancestor_bits([0])


def replaced(position, change):
    batch = make_batch([Request(20, [-1, 0, 0]), Request(7)])
    args = list(batch.args)
    args[position] = change(args[position])
    return args


@pytest.mark.parametrize(
    ("position", "change", "message"),
    [
        (0, lambda q: q[0], r"q is .* expected \[tokens, heads, head_size\]"),
        (0, lambda q: q.double(), "fp16, bf16 or fp32"),
        (0, lambda q: q[..., :48], "head size 48 is not supported"),
        (0, lambda q: q.transpose(0, 2).contiguous().transpose(0, 2), "q has stride 8"),
        (1, lambda k: k.half(), "k_cache is torch.float16, expected torch.float32"),
        (2, lambda v: v[:-1], "v_cache is"),
        (1, lambda k: k[..., :32], "k_cache is"),
        (3, lambda t: t.long(), "block_table is torch.int64"),
        (4, lambda s: s[:1], "query_start is"),
        (5, lambda s: s.long(), "query_start is torch.int64"),
        (6, lambda s: None, "together"),
        (6, lambda s: s[:1], "tree_start is"),
        (7, lambda a: a.int(), "ancestors is torch.int32"),
        (7, lambda a: a.repeat_interleave(2)[::2], "ancestors has stride 2"),
        (8, lambda s: 0.0, "scale is 0.0"),
    ],
)
def test_what_does_not_fit_is_refused(position, change, message):
    with pytest.raises(ValueError, match=message):
        tree_attention(*replaced(position, change))


def test_keywords_that_do_not_fit_are_refused():
    args = make_batch([Request(20, [-1, 0, 0])], heads=6, kv_heads=2).args
    with pytest.raises(ValueError, match="out is"):
        tree_attention(*args, out=args[0].half())
    with pytest.raises(ValueError, match="only for a float8 cache"):
        tree_attention(*args, k_scale=torch.ones(1))
    with pytest.raises(ValueError, match="num_splits is 0"):
        tree_attention(*args, num_splits=0)
    with pytest.raises(ValueError, match="5 query heads do not share 2"):
        tree_attention(args[0][:, :5], *args[1:])
