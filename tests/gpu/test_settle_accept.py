"""The compiled settling and walking kernels on a CUDA device.

What only shows here: threads that run at once. The settled cache is compared byte by byte, over
paths in which nearly every row moves onto the one before it; both launches are replayed from a CUDA
graph with other contents than those they were captured with.
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
from vllm_msd.kernels import AcceptedPaths, LayerCaches, accept, settle


def captured(call):
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("heads", "width"), [(32, 256), (4, 160), (3, 3)])
def test_settle(layout, heads, width):
    generator = torch.Generator().manual_seed(width)
    blocks, requests = 6, 16
    shape = (8, requests * blocks, heads, 16, width)
    backing, views = layer_views(shape, torch.bfloat16, layout, generator)
    order = torch.randperm(requests * blocks, generator=generator)
    table = order.view(requests, blocks).int()
    roots = torch.randint(-1, 30, (requests,), generator=generator).tolist()
    paths = [random_path(64, generator) for _ in roots]
    paths[:2] = [[0, *range(2, 64)], [0, *range(1, 30), *range(31, 64)]]
    nodes = torch.full((requests, 64), -1)
    for i, path in enumerate(paths):
        nodes[i, : len(path)] = torch.tensor(path)

    device = backing.cuda()
    order = [LAYOUTS[layout].index(i) for i in range(5)]
    physical = [shape[i] for i in LAYOUTS[layout]]
    logical = device.view(torch.bfloat16).view(physical).permute(order)
    caches = LayerCaches.of([layer.transpose(1, 2) for layer in logical])
    starts = torch.full((requests,), -1, dtype=torch.int32, device="cuda")
    arguments = (table.cuda(), starts, nodes.cuda())
    graph = captured(lambda: settle(caches, *arguments))
    assert torch.equal(device.cpu(), backing), "rows of requests without a tree moved"
    starts.copy_(torch.tensor(roots))
    graph.replay()
    moved_one_by_one(views, table, roots, paths)
    assert torch.equal(device.cpu(), backing)


@pytest.mark.parametrize("nodes", [1, 9, 63, 64])
def test_accept(nodes):
    generator = torch.Generator().manual_seed(nodes)
    sizes = torch.randint(1, nodes + 1, (64,), generator=generator).tolist()
    tokens, parents, drawn, counts = random_forest(sizes, nodes, seed=nodes)
    expected = walked_one_by_one(tokens, parents, drawn, counts)
    real = torch.arange(nodes) < counts[:, None]
    starts = torch.tensor([0, *counts.cumsum(0)], dtype=torch.int32).cuda()
    rows = torch.zeros(2, int(counts.sum()), dtype=torch.int64, device="cuda")
    out = AcceptedPaths.allocate(64, nodes, torch.device("cuda"))
    on_device = parents.cuda()
    graph = captured(lambda: accept(rows[0], rows[1], on_device, starts, out=out))
    rows.copy_(torch.stack([drawn[real], tokens[real]]))
    graph.replay()
    for name in ("lengths", "nodes", "tokens"):
        assert torch.equal(getattr(out, name).cpu(), getattr(expected, name)), name
