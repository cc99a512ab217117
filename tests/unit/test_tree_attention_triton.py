"""The Triton kernels in Triton's interpreter, against unrolled paths and the eager twin.

What could go wrong in a kernel and not in its definition: rows and keys that straddle tiles, blocks
and splits, rows of no token, empty splits, the boundary between tiles with and without a mask, the
sign bit, a mask read past its 64 bits, unwritten slots, offsets beyond 32 bits, host reads. The
tiles are small here so that short contexts have all of these. Float32 results differ from the
oracle by rounding of sums only (1e-5); for half types the bound is the rounding of the weights and
of the result.

The interpreter must be on before Triton is imported, so this file runs itself in a process of its
own. Not covered: what compiled code computes; ``test_they_compile_for_gpus`` only builds it.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.common.launches import NoOperation
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
from tests.common.triton_interpreter import mend_interpreter
from vllm_msd.kernels import TreeAttentionWorkspace, tree_attention
from vllm_msd.kernels.tree_attention import launch
from vllm_msd.kernels.tree_attention.eager import tree_attention_eager
from vllm_msd.kernels.tree_attention.launch import LaunchConfig

ROOT = Path(__file__).parents[2]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# An empty part of a split context has the logarithm of 0 on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
interpreted = pytest.mark.skipif(
    not INTERPRETED, reason="runs in a process of its own with TRITON_INTERPRET=1"
)
SMALL = LaunchConfig(block_m=16, tile=16, num_warps=4, num_stages=1)
TREE = [-1, 0, 0, 1, 1, 2, 2]
MIXED = [
    Request(40, TREE),  # verification
    Request(25),  # ordinary decoding
    Request(50, queries=30),  # a later chunk of a prompt
    Request(18, TREE, queries=4),  # a draft level: only the newest nodes ask
    Request(33, TREE, queries=12),  # the rest of a prompt in front of a tree
    Request(20, queries=0),  # nothing asked
    Request(0, queries=0),  # a request that pads a CUDA graph's batch
    Request(0, TREE),
]


def run(*args: str, **env: str) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | env
    done = subprocess.run(
        [sys.executable, *args], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-4000:]


@pytest.mark.skipif(INTERPRETED, reason="starts the interpreter's process")
def test_in_the_interpreter():
    run("-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, TRITON_INTERPRET="1")


@pytest.mark.skipif(INTERPRETED, reason="the compiler needs the interpreter off")
def test_they_compile_for_gpus():
    """Real code for sm_80 and sm_90: nothing spilled, shared memory within the limit."""
    run("benchmarks/compile_check.py", "--quick")


@pytest.fixture(autouse=True)
def _mended(monkeypatch):
    if INTERPRETED:
        mend_interpreter(monkeypatch)


def assert_matches_paths(batch, **options):
    options = {"config": SMALL, "num_splits": 1} | options
    out = torch.full_like(batch.args[0], 7.0)
    tree_attention(*batch.args, out=out, **options)
    rows = int(batch.args[5][-1])
    expected = unrolled_attention(batch)[:rows]
    torch.testing.assert_close(out[:rows].double(), expected, rtol=0, atol=1e-5)
    assert (out[rows:] == 7).all(), "padding rows were written"


@interpreted
@pytest.mark.parametrize("nodes", [1, 2, 15, 17, 33, 63, 64])
def test_random_trees(nodes):
    generator = torch.Generator().manual_seed(nodes)
    trees = [random_tree(nodes, generator), chain(nodes), star(nodes)]
    contexts = [0, 31, 40] if nodes % 2 else [16, 1, 23]
    requests = [Request(c, t) for c, t in zip(contexts, trees, strict=True)]
    config = LaunchConfig(16 if nodes < 33 else 64, 16, 4, 1)
    assert_matches_paths(make_batch(requests, heads=1, seed=nodes), config=config)


@interpreted
@pytest.mark.parametrize("paths", [MEDUSA_63, EAGLE_25])
@pytest.mark.parametrize("splits", [1, 4])
def test_published_trees(paths, splits):
    batch = make_batch([Request(57, parents_from_paths(paths))])
    assert_matches_paths(batch, config=LaunchConfig(64, 32, 4, 1), num_splits=splits)


@interpreted
@pytest.mark.parametrize(("block_size", "splits"), [(16, 1), (48, 3), (128, 1), (5, 3)])
def test_mixed_batch(block_size, splits):
    batch = make_batch(MIXED, block_size=block_size, padding=3)
    assert_matches_paths(batch, num_splits=splits)


@interpreted
def test_more_splits_than_tiles():
    """Most parts see nothing; one of them begins behind the tree's last visible key."""
    batch = make_batch([Request(20, TREE), Request(2)], heads=1)
    assert_matches_paths(batch, num_splits=32)


@interpreted
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), *((ratio, 1) for ratio in range(1, 9))])
def test_grouped_heads(heads, kv_heads):
    requests = [Request(21, TREE), Request(12, queries=5)]
    batch = make_batch(requests, heads=heads, kv_heads=kv_heads)
    assert_matches_paths(batch, num_splits=2)


@interpreted
@pytest.mark.parametrize("head_size", [64, 80, 96, 128, 256])
def test_head_sizes_at_the_default_tiles(head_size):
    batch = make_batch([Request(70, TREE), Request(3)], heads=1, head_size=head_size)
    assert_matches_paths(batch, config=None, num_splits=2)


@interpreted
def test_a_long_context():
    batch = make_batch([Request(8190, random_tree(20, torch.Generator().manual_seed(3)))], heads=1)
    assert_matches_paths(batch, config=LaunchConfig(32, 64, 4, 1), num_splits=5)


@interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("splits", [1, 3])
def test_half_types_to_their_rounding(dtype, splits):
    """Weights and result are rounded once each, by half a unit in the last place."""
    batch = make_batch(MIXED, dtype=dtype)
    result = tree_attention(*batch.args, config=SMALL, num_splits=splits).float()
    wide = [t.float() if t.is_floating_point() else t for t in batch.args[:-1]]
    exact = tree_attention_eager(*wide, batch.args[-1])
    wide[2] = wide[2].abs()
    roundoff = torch.finfo(dtype).eps / 2
    bound = roundoff * (tree_attention_eager(*wide, batch.args[-1]) + exact.abs()) + 1e-5
    worst = ((result - exact).abs() / bound).max()
    assert worst <= 1.0
    assert worst > 0.05, "the bound is too loose to test anything"


@interpreted
@pytest.mark.parametrize("cache_dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8_cache(cache_dtype):
    batch = make_batch([Request(40, TREE), Request(9)], cache_dtype=cache_dtype)
    scales = {"k_scale": torch.tensor([0.7]), "v_scale": torch.tensor([1.9])}
    expected = tree_attention_eager(*batch.args, **scales)
    for splits in (1, 3):
        result = tree_attention(*batch.args, **scales, config=SMALL, num_splits=splits)
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)


@interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float8_cache_under_half_queries(dtype):
    """As served: head size 80 is padded, the scales are not powers of two."""
    batch = make_batch(
        [Request(40, TREE), Request(9)], head_size=80, dtype=dtype, cache_dtype=torch.float8_e4m3fn
    )
    scales = {"k_scale": torch.tensor([0.7]), "v_scale": torch.tensor([1.9])}
    result = tree_attention(*batch.args, **scales, config=SMALL, num_splits=2).float()
    wide = [batch.args[0].float(), *batch.args[1:]]
    exact = tree_attention_eager(*wide, **scales)
    wide[2] = wide[2].float().abs()
    sizes = tree_attention_eager(*wide, **scales)
    bound = torch.finfo(dtype).eps / 2 * (sizes + exact.abs()) + 1e-5
    assert 0.05 < ((result - exact).abs() / bound).max() <= 1.0


@interpreted
def test_no_tree_is_causal():
    batch = make_batch([Request(30, queries=12), Request(9)])
    result = tree_attention(*batch.args[:6], None, None, batch.args[-1], config=SMALL)
    torch.testing.assert_close(result.double(), unrolled_attention(batch), rtol=0, atol=1e-5)


@interpreted
def test_slots_without_a_bit_are_invisible():
    """A tree_start too far back: keys 64 and more slots behind it have no bit, as in the twin."""
    batch = make_batch([Request(5, chain(64)), Request(90, queries=2)], heads=1)
    args = list(batch.args)
    args[6] = torch.tensor([5, 11], dtype=torch.int32)
    for splits in (1, 2):
        result = tree_attention(*args, config=SMALL, num_splits=splits)
        torch.testing.assert_close(result, tree_attention_eager(*args), rtol=0, atol=1e-5)


@interpreted
def test_a_slot_nobody_sees_may_hold_nan():
    batch = make_batch([Request(4, [-1, 0, 0, 1])])
    table, masks = batch.args[3], batch.args[7]
    masks[2] = masks[0]
    for cache in batch.args[1:3]:
        cache[table[0, 0], 4 + 2] = float("nan")
    result = tree_attention(*batch.args, config=SMALL)
    torch.testing.assert_close(result, tree_attention_eager(*batch.args), rtol=0, atol=1e-5)


@interpreted
def test_masks_of_rows_before_the_tree_mean_nothing():
    """They may hold anything, a bit of a pruned node included, whose slot was never written."""
    batch = make_batch([Request(20, TREE, queries=12)], heads=1)
    masks, table = batch.args[7], batch.args[3]
    masks[:5] = -1  # five rows of the prompt, then the tree
    masks[5:] &= ~(1 << 6)
    masks[11] = 1
    for cache in batch.args[1:3]:
        cache[table[0, 26 // 16], 26 % 16] = float("nan")  # node 6
    result = tree_attention(*batch.args, config=SMALL)
    assert result.isfinite().all()
    torch.testing.assert_close(result, tree_attention_eager(*batch.args), rtol=0, atol=1e-5)


@interpreted
@pytest.mark.parametrize("layout", ["blocks far out", "heads outside of blocks"])
def test_caches_beyond_32_bit_offsets(layout):
    """Offsets past 2^31, the second of vLLM's layout LHBNC; untouched memory costs nothing."""
    batch = make_batch([Request(40, TREE)], heads=3, kv_heads=3, cache_dtype=torch.float8_e5m2)
    small = batch.args[1]
    blocks, block_size, kv_heads, head_size = small.shape
    rows = block_size * head_size
    if layout == "blocks far out":
        first = 2**31 // (kv_heads * rows) + 3
        strides = (kv_heads * rows, kv_heads * head_size, head_size, 1)
        size = (first + blocks) * kv_heads * rows
    else:  # twice the distance of two heads does not fit 32 bits, the distance does
        first, apart = 0, (2**30 // rows + 3) * rows
        strides = (rows, head_size, apart, 1)
        size = (kv_heads - 1) * apart + blocks * rows
    caches = []
    for cache in batch.args[1:3]:
        flat = torch.empty(size, dtype=torch.uint8).view(cache.dtype)
        caches.append(flat.as_strided((first + blocks, *cache.shape[1:]), strides))
        caches[-1][first:] = cache
    args = (batch.args[0], *caches, batch.args[3] + first, *batch.args[4:])
    for splits in (1, 2):
        result = tree_attention(*args, config=SMALL, num_splits=splits)
        torch.testing.assert_close(result, tree_attention_eager(*batch.args), rtol=0, atol=1e-5)


@interpreted
def test_vllms_packed_cache_and_strided_tensors():
    batch = make_batch(MIXED[2:5], heads=4, kv_heads=2)
    q, k_cache, v_cache, table, *rest = batch.args
    packed = torch.cat([k_cache, v_cache], dim=-1).transpose(1, 2).contiguous()
    k_cache, v_cache = packed.transpose(1, 2).split(64, dim=-1)
    fused = torch.zeros(q.shape[0], 6, 64)  # q as a slice of a fused projection
    fused[:, :4] = q
    wide_table = torch.full((table.shape[0], table.shape[1] + 5), -1, dtype=torch.int32)
    wide_table[:, : table.shape[1]] = table
    batch.args = (fused[:, :4], k_cache, v_cache, wide_table[:, : table.shape[1]], *rest)
    assert_matches_paths(batch, num_splits=2)


@interpreted
def test_a_workspace_is_reused_and_checked():
    """What an earlier launch left in the workspace must not show."""
    batch = make_batch(MIXED[:3])
    tokens, heads, head_size = batch.args[0].shape
    workspace = TreeAttentionWorkspace.allocate(tokens + 9, heads, head_size, 4, device="cpu")
    for stale in (float("nan"), float("inf"), 1e30):
        workspace.partial.fill_(stale)
        workspace.partial_lse.fill_(stale)
        assert_matches_paths(batch, num_splits=3, workspace=workspace)
    with pytest.raises(ValueError, match="allocate it for the largest batch"):
        tree_attention(*batch.args, num_splits=9, workspace=workspace)
    assert [workspace.max_splits(n, heads, head_size) for n in (tokens, 5 * tokens)] == [
        4 * (tokens + 9) // tokens,
        0,
    ]


@interpreted
def test_the_launch_reads_no_tensor(monkeypatch):
    """Meta tensors have no contents: anything decided by a length or a mask would raise."""
    from vllm_msd.kernels.tree_attention import triton_kernel

    grids = []

    class Recorder:
        def __getitem__(self, grid):
            return lambda *args, **kwargs: grids.append(grid)

    monkeypatch.setattr(triton_kernel, "tree_attention_kernel", Recorder())
    monkeypatch.setattr(triton_kernel, "merge_splits_kernel", Recorder())
    monkeypatch.setattr(launch, "_device", lambda device: (132, (9, 0)))
    batch = make_batch(MIXED, heads=4, kv_heads=2, dtype=torch.bfloat16, padding=3)
    args = [t.to("meta") if isinstance(t, torch.Tensor) else t for t in batch.args]
    tree_attention(*args, max_query_len=30, max_seq_len=4096)
    tokens = args[0].shape[0]
    (blocks, kv_heads, splits), merge = grids
    assert (blocks, kv_heads) == (tokens // 32 + len(MIXED), 2)
    assert splits > 1 and merge == (tokens, 4)

    out, head_size = torch.empty_like(args[0]), args[0].shape[2]
    workspace = TreeAttentionWorkspace.allocate(tokens, 4, head_size, splits, device="meta")
    with NoOperation():
        tree_attention(*args, out=out, workspace=workspace, max_query_len=30, max_seq_len=4096)
    assert len(grids) == 4, "the split launch once more"

    monkeypatch.setattr(launch, "_device", lambda device: (108, (8, 0)))
    args[1], args[2] = (cache.to(torch.float8_e4m3fn) for cache in args[1:3])
    with pytest.raises(ValueError, match=r"needs compute capability 8.9, meta has 8.0"):
        tree_attention(*args)


def test_splits_fill_the_device():
    choose = launch.choose_num_splits
    assert choose(programs=256, max_keys=4096, slots=264) == 1
    assert choose(programs=32, max_keys=4096, slots=264) == 8
    assert choose(programs=4, max_keys=8192, slots=264) > 28
    assert choose(programs=4, max_keys=100, slots=264) == 1
    assert choose(programs=300, max_keys=4096, slots=264) > 1, "a second wave of 36 is a waste"
    assert choose(programs=5000, max_keys=8192, slots=264) == 1


def test_tiles_hold_a_request():
    assert launch.choose_config(1, 1, 128, 2).block_m == 16
    assert launch.choose_config(61, 1, 128, 2).block_m == 64
    assert launch.choose_config(61 * 7, 7, 128, 2).block_m == 128
    assert launch.choose_config(40, 40, 128, 2).block_m == 64
    with pytest.raises(ValueError, match="tile is 24"):
        LaunchConfig(16, 24, 4, 1)
