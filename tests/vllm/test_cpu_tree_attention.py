"""Trees in vLLM's CPU attention, against the eager definition of tree attention."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.common.cpu_trees import CpuModel
from tests.common.tree_batches import (
    EAGLE_25,
    MEDUSA_63,
    Batch,
    Request,
    chain,
    make_batch,
    parents_from_paths,
    random_tree,
    star,
)
from vllm_msd.kernels import tree_attention
from vllm_msd.tree import TreeRows
from vllm_msd.vllm_plugin.cpu import attention as cpu_attention
from vllm_msd.vllm_plugin.cpu.attention import settle_cpu

LAYERS = ("layer.0", "layer.1")
RNG = torch.Generator().manual_seed(3)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


class Step:
    """A verification step over two layers; each layer has keys and values of its own."""

    def __init__(self, requests: list[Request], seed: int = 0, scratch_blocks: int = 64, **shape):
        self.layers: dict[str, Batch] = {
            name: make_batch(requests, seed=seed, **shape) for name in LAYERS
        }
        # The second layer differs, so that a mix-up of layers shows.
        other = self.layers[LAYERS[1]]
        for dense in (other.keys, other.values):
            dense[:] = [x.flip(0) for x in dense]
        self.requests = requests
        _, _, _, self.table, self.seq_lens, self.query_start, start, bits, _ = other.args
        self.model = CpuModel.build(
            int(self.table.max()) + 1, scratch_blocks=scratch_blocks, **shape
        )
        self.block_size = self.model.block_size
        self.tree = TreeRows(start, bits, False)
        rows = []
        for i, request in enumerate(requests):
            slots = self.slots(i, torch.arange(request.seq_len))
            asked = request.seq_len - request.query_len
            rows.append(slots[asked:])
            for name, layer in self.layers.items():
                self.model.write(
                    name, layer.keys[i][:asked], layer.values[i][:asked], slots[:asked]
                )
        self.metadata = self.model.metadata(
            self.query_start, self.seq_lens, self.table, torch.cat(rows)
        )

    def slots(self, request: int, positions: Tensor) -> Tensor:
        block = self.table[request, positions // self.block_size].long()
        return block * self.block_size + positions % self.block_size

    def rows(self, name: str) -> tuple[Tensor, Tensor]:
        """Keys and values of the step's rows in a layer."""
        layer = self.layers[name]
        return tuple(
            torch.cat([x[-r.query_len :] for x, r in zip(dense, self.requests, strict=True)])
            for dense in (layer.keys, layer.values)
        )

    def run(self, name: str) -> Tensor:
        query = self.layers[name].args[0]
        return self.model.attend(name, query, *self.rows(name), self.metadata, self.tree)

    def error(self) -> float:
        """The largest deviation of both layers from the definition."""
        return max(
            (self.run(name).float() - expected(self.layers[name], self.tree).float()).abs().max()
            for name in LAYERS
        ).item()


def expected(batch: Batch, tree: TreeRows) -> Tensor:
    """The definition over a cache that holds the batch's dense rows, in order."""
    q, cache, _, table, seq_lens, query_start, _, _, scale = batch.args
    k, v = torch.zeros_like(cache), torch.zeros_like(cache)
    for i, (keys, values) in enumerate(zip(batch.keys, batch.values, strict=True)):
        position = torch.arange(len(keys))
        block = table[i, position // cache.shape[1]].long()
        k[block, position % cache.shape[1]] = keys.to(cache.dtype)
        v[block, position % cache.shape[1]] = values.to(cache.dtype)
    masks = tree.ancestors
    return tree_attention(q, k, v, table, seq_lens, query_start, tree.tree_start, masks, scale)


BATCHES = {
    "one root": [Request(40, [-1])],
    "two nodes at position 0": [Request(0, chain(2))],
    "star at position 0": [Request(0, star(7))],
    "star over a block boundary": [Request(29, star(8))],
    "context of whole blocks": [Request(64, star(5)), Request(32, random_tree(9, RNG))],
    "63 nodes": [Request(300, parents_from_paths(MEDUSA_63))],
    "64 nodes in a random tree": [Request(2000, random_tree(64, RNG))],
    "chain of 64": [Request(31, chain(64))],
    "mixed": [
        Request(75, random_tree(12, RNG), queries=40),  # prompt rows before the root
        Request(100),  # decoding
        Request(33, queries=33),  # a whole prompt
        Request(63, parents_from_paths(EAGLE_25)),
        Request(1, star(3)),
        Request(11, chain(6), queries=9),
    ],
}


@pytest.mark.parametrize("requests", BATCHES.values(), ids=BATCHES)
def test_verification_is_tree_attention(requests):
    assert Step(requests).error() < 1e-5


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        {"block_size": 32, "heads": 4, "kv_heads": 4},
        {"block_size": 64, "heads": 6, "kv_heads": 2},
        {"block_size": 96, "head_size": 128},
        {"block_size": 128, "heads": 8, "kv_heads": 2, "head_size": 80},
    ],
    ids=str,
)
def test_shapes_and_dtypes(shape, dtype):
    step = Step(BATCHES["mixed"], dtype=dtype, **shape)
    assert step.error() < TOLERANCE[dtype]


def test_random_trees():
    generator = torch.Generator().manual_seed(11)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    for seed in range(20):
        requests = [
            Request(number(0, 200), random_tree(number(1, 20), generator)) for _ in range(4)
        ]
        assert Step(requests, seed=seed).error() < 1e-5, requests


def test_too_little_scratch_for_one_call_takes_several():
    step = Step(BATCHES["mixed"], scratch_blocks=4)
    assert step.error() < 1e-5
    (shared,) = [x for x in step.tree.derived.values() if isinstance(x, cpu_attention._Pass)]
    assert len(shared.plan.calls) > 3


def test_a_path_that_fits_no_scratch_is_refused():
    step = Step([Request(31, [-1, 0, 0, *range(2, 63)])], scratch_blocks=1)
    with pytest.raises(ValueError, match="scratch blocks"):
        step.run(LAYERS[0])


def test_masks_of_no_tree_are_refused():
    step = Step([Request(8, star(4))])
    step.tree.ancestors[2] = 0b0001  # not itself
    with pytest.raises(ValueError, match="no tree"):
        step.run(LAYERS[0])


@pytest.mark.parametrize("draft_layer", [True, False])
def test_a_draft_layer_is_causal_on_the_targets_trees(draft_layer):
    step = Step(BATCHES["mixed"])
    for layer in step.model.layers.values():
        layer.is_draft_layer = draft_layer
    with_tree = step.run(LAYERS[0])
    step.tree = None
    assert torch.equal(with_tree, step.run(LAYERS[0])) == draft_layer


WRONG_PLANS = {
    "rows of other nodes": lambda plan: replace(plan, copied_rows=plan.copied_rows.roll(1)),
    "no end of the context": lambda plan: replace(
        plan,
        calls=[
            replace(call, tail_blocks=torch.zeros_like(call.tail_blocks)) for call in plan.calls
        ],
    ),
    "queries of other nodes": lambda plan: replace(
        plan,
        calls=[replace(call, query_rows=call.query_rows.roll(1)) for call in plan.calls],
    ),
    "slots of other places": lambda plan: replace(
        plan, calls=[replace(call, slots=call.slots.flip(0)) for call in plan.calls]
    ),
}


@pytest.mark.parametrize("wrong", WRONG_PLANS.values(), ids=WRONG_PLANS)
def test_wrong_plans_show(wrong, monkeypatch):
    plan_paths = cpu_attention.plan_paths
    monkeypatch.setattr(cpu_attention, "plan_paths", lambda *args: wrong(plan_paths(*args)))
    assert Step([Request(45, parents_from_paths(EAGLE_25))]).error() > 1e-2


def draft_masks(levels: int, k: int, generator: torch.Generator) -> list[Tensor]:
    """Masks ``[k]`` of each level of one request's beam; parents are any of the level before."""
    masks = [torch.ones(k, dtype=torch.int64) << torch.arange(k)]
    for level in range(1, levels):
        parents = torch.randint(k, (k,), generator=generator)
        own = torch.ones(k, dtype=torch.int64) << (level * k + torch.arange(k))
        masks.append(masks[-1][parents] | own)
    return masks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_draft_levels_are_tree_attention(dtype):
    levels, k = 4, 3
    contexts = [45, 0, 64, 100]
    causal = 3  # a request without a tree among them
    generator = torch.Generator().manual_seed(5)
    masks = [draft_masks(levels, k, generator) for _ in contexts]
    # One batch gives all rows of all levels; each level asks its own.
    whole = make_batch(
        [Request(c + levels * k, queries=k) for c in contexts], block_size=32, dtype=dtype
    )
    table, query_start = whole.args[3], whole.args[5]
    model = CpuModel.build(int(table.max()) + 1, num_layers=1, block_size=32, dtype=dtype)
    name = LAYERS[0]
    tree_start = torch.tensor(contexts, dtype=torch.int32)
    tree_start[causal] = -1

    def slots(request: int, first: int, last: int) -> Tensor:
        position = torch.arange(first, last)
        return table[request, position // 32].long() * 32 + position % 32

    for i, context in enumerate(contexts):
        model.write(name, whole.keys[i][:context], whole.values[i][:context], slots(i, 0, context))
    tree = None
    for level in range(levels):
        bits = torch.cat([m[level] for m in masks])
        tree = TreeRows(tree_start, bits, True, older=tree)
        begins = [c + level * k for c in contexts]
        seq_lens = torch.tensor(begins, dtype=torch.int32) + k
        rows = [
            torch.cat([x[b : b + k] for x, b in zip(dense, begins, strict=True)])
            for dense in (whole.keys, whole.values)
        ]
        slot = torch.cat([slots(i, b, b + k) for i, b in enumerate(begins)])
        slot[: causal * k] = -1  # a tree's rows need no slot: they come from the levels before
        query = torch.randn(whole.args[0].shape, generator=generator).to(dtype)
        metadata = model.metadata(query_start, seq_lens, table, slot)
        out = model.attend(name, query, *rows, metadata, tree)

        batch = replace(whole, args=(query, *whole.args[1:4], seq_lens, *whole.args[5:]))
        want = expected(batch, tree)
        assert (out.float() - want.float()).abs().max() < TOLERANCE[dtype], level


@pytest.mark.parametrize("block_size", [32, 128])
def test_settled_paths_are_chains(block_size):
    parents = [random_tree(12, RNG), parents_from_paths(EAGLE_25), chain(4)]
    step = Step(
        [
            Request(75, parents[0], queries=40),
            Request(60, parents[1]),
            Request(33, queries=5),
            Request(20, parents[2]),
        ],
        block_size=block_size,
    )
    for name in LAYERS:
        step.run(name)
    # One leaf each; the causal request and the chain accept what cannot move.
    paths = [path_to(parents[0], 11), path_to(parents[1], 24), [0], [0, 1, 2]]
    assert any(node > i for i, node in enumerate(paths[0]))
    assert any(node > i for i, node in enumerate(paths[1]))
    nodes = torch.full((4, 6), -1)
    for i, path in enumerate(paths):
        path = path[:6]
        nodes[i, : len(path)] = torch.tensor(path)
    roots = step.query_start[:-1].long()
    roots[0] += 40 - len(parents[0])
    roots[2] += 4
    settle_cpu(step.tree, roots, nodes)

    lengths = (nodes >= 0).sum(1)
    seq_lens = step.tree.tree_start.clone()
    seq_lens[2] = 32
    seq_lens += lengths.int()
    query_start = torch.arange(5, dtype=torch.int32)
    metadata = step.model.metadata(query_start, seq_lens, step.table, torch.full((4,), -1))
    for name in LAYERS:
        batch = step.layers[name]
        settled = [[], []]
        for i, request in enumerate(step.requests):
            context = 32 if i == 2 else request.context
            order = torch.cat([torch.arange(context), context + nodes[i, : lengths[i]]])
            settled[0].append(batch.keys[i][order])
            settled[1].append(batch.values[i][order])
        query = torch.randn(4, 2, 64, generator=RNG)
        unused = torch.zeros(4, 1, 64)
        out = step.model.attend(name, query, unused, unused, metadata)
        args = (query, *batch.args[1:4], seq_lens, query_start, *batch.args[6:])
        causal = TreeRows(torch.full((4,), -1, dtype=torch.int32), torch.zeros(4).long(), False)
        want = expected(Batch(args, *settled, step.requests), causal)
        assert (out - want).abs().max() < 1e-5


def test_settling_a_node_of_no_tree_is_refused():
    step = Step([Request(10, queries=3)])
    step.run(LAYERS[0])
    with pytest.raises(ValueError, match="settle"):
        settle_cpu(step.tree, torch.tensor([0]), torch.tensor([[0, 2]]))


def path_to(parents: list[int], node: int) -> list[int]:
    path = [node]
    while parents[path[0]] >= 0:
        path.insert(0, parents[path[0]])
    return path
