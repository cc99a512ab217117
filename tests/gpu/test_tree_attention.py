"""The compiled tree attention kernel on a CUDA device, against unrolled paths.

The same batches as in Triton's interpreter (tests/unit), at the tiles that are used on this device.
What only shows here: compiled code, asynchronous copies, CUDA graphs. Bounds are the rounding of
weights and results in the half types, and values inside the trees are large, so that losing every
ancestor above the 32nd node is far outside of them: each comparison shows that, too.
"""

import pytest
import torch

from tests.common.rounding import largest_error, without_high_ancestors
from tests.common.tree_batches import (
    EAGLE_25,
    MEDUSA_63,
    Request,
    make_batch,
    parents_from_paths,
    random_tree,
    unrolled_attention,
)
from vllm_msd.kernels import TreeAttentionWorkspace, tree_attention

TREE_VALUES = 100.0
FLOAT8_TREE_VALUES = 16.0  # of float8's range


def _requests() -> list[Request]:
    generator = torch.Generator().manual_seed(0)
    return [
        Request(700, parents_from_paths(MEDUSA_63)),  # verification
        Request(90, parents_from_paths(EAGLE_25)),
        Request(1500, random_tree(64, generator)),
        Request(300),  # ordinary decoding
        Request(400, queries=250),  # a later chunk of a prompt
        Request(0, queries=0),  # padding
    ]


def _on_device(arguments: tuple) -> list:
    return [a.cuda() if isinstance(a, torch.Tensor) else a for a in arguments]


def _without_high_ancestors(arguments: tuple) -> tuple:
    return (*arguments[:7], without_high_ancestors(arguments[7]), arguments[8])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_size", "block_size"),
    [
        (4, 4, 128, 16),
        (7, 1, 128, 48),
        (4, 2, 64, 32),
        (2, 1, 80, 16),
        (2, 2, 96, 16),
        (2, 1, 256, 16),
    ],
)
def test_mixed_batch(dtype, heads, kv_heads, head_size, block_size):
    shape = {"heads": heads, "kv_heads": kv_heads, "head_size": head_size, "block_size": block_size}
    batch = make_batch(_requests(), dtype=dtype, padding=3, tree_values=TREE_VALUES, **shape)
    arguments = _on_device(batch.args)
    out = torch.full_like(arguments[0], 7.0)
    tree_attention(*arguments, out=out)
    rows = int(batch.args[5][-1])
    assert 0.05 < largest_error(out[:rows].cpu(), batch.args) <= 1
    assert (out[rows:] == 7).all(), "padding rows were written"
    broken = tree_attention(*_on_device(_without_high_ancestors(batch.args)))
    assert largest_error(broken[:rows].cpu(), batch.args) > 3


@pytest.mark.parametrize("cache_dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8_cache(cache_dtype):
    if cache_dtype == torch.float8_e4m3fn and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("float8_e4m3fn needs compute capability 8.9")
    batch = make_batch(
        _requests(), dtype=torch.bfloat16, cache_dtype=cache_dtype, head_size=128,
        tree_values=FLOAT8_TREE_VALUES,
    )  # fmt: skip
    scales = {"k_scale": torch.tensor([0.7]), "v_scale": torch.tensor([1.9])}
    on_device = {name: scale.cuda() for name, scale in scales.items()}
    for splits in (1, 4):
        result = tree_attention(*_on_device(batch.args), **on_device, num_splits=splits)
        assert 0.05 < largest_error(result.cpu(), batch.args, **scales) <= 1
    broken = tree_attention(*_on_device(_without_high_ancestors(batch.args)), **on_device)
    assert largest_error(broken.cpu(), batch.args, **scales) > 3


def test_float32_is_exact():
    batch = make_batch(_requests(), heads=2, kv_heads=1)
    rows = int(batch.args[5][-1])
    result = tree_attention(*_on_device(batch.args))[:rows].double().cpu()
    torch.testing.assert_close(result, unrolled_attention(batch)[:rows], rtol=0, atol=1e-5)


def test_a_graph_serves_other_batches():
    """Captured with one batch, replayed with other lengths, trees, block tables and contents."""
    generator = torch.Generator().manual_seed(1)
    sizes = [61, 64, 5, 20]
    batches = [
        make_batch(
            [Request(c, random_tree(n, generator)) for c, n in zip(contexts, order, strict=True)],
            heads=4, kv_heads=4, head_size=128, dtype=torch.bfloat16, seed=seed,
            tree_values=TREE_VALUES,
        )
        for seed, (contexts, order) in enumerate(
            [((2000, 300, 17, 900), sizes), ((40, 1800, 1200, 0), sizes[::-1])]
        )
    ]  # fmt: skip
    blocks = max(b.args[1].shape[0] for b in batches)
    columns = max(b.args[3].shape[1] for b in batches)

    def padded(batch):
        q, k, v, table, *rest = _on_device(batch.args)
        k, v = (torch.nn.functional.pad(c, (0, 0) * 3 + (0, blocks - len(c))) for c in (k, v))
        return [q, k, v, torch.nn.functional.pad(table, (0, columns - table.shape[1])), *rest]

    held = padded(batches[0])
    out = torch.empty_like(held[0])
    workspace = TreeAttentionWorkspace.allocate(len(out), 4, 128, 8)

    def call():
        tree_attention(*held, out=out, workspace=workspace, max_query_len=64, num_splits=8)

    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    for batch in (batches[1], batches[0]):
        for mine, new in zip(held[:-1], padded(batch)[:-1], strict=True):
            mine.copy_(new)
        out.fill_(7.0)
        graph.replay()
        assert 0.05 < largest_error(out.cpu(), batch.args) <= 1
