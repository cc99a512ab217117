"""The compiled kernels that grow a tree, on a CUDA device, and replays of a whole growth.

What only shows here: the compiled order of equal keys, rounding of compiled exponentials, several
programs of a request at once, and a graph replayed with other logits, lengths, tables and padding
than those it was captured with.
"""

import math

import pytest
import torch

from tests.common.growth import GrowthBatch, ToyDraft, random_step
from tests.common.prefill_step import BLOCK_SIZE, make_step
from vllm_msd.kernels import beam_step, draft_prefill, top_k
from vllm_msd.kernels.beam_step.eager import beam_step_eager
from vllm_msd.kernels.top_k.eager import top_k_eager
from vllm_msd.tree import TreeShape

SHAPES = [TreeShape(9, 7, 1), TreeShape(25, 4, 4), TreeShape(61, 5, 10), TreeShape(64, 3, 16)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("rows", "columns", "k"), [(40, 32064, 4), (7, 152_064, 16), (3, 50, 1)])
def test_top_k(dtype, rows, columns, k):
    g = torch.Generator().manual_seed(columns)
    logits = torch.randn(rows, columns, generator=g).mul(4).round(decimals=1)
    logits[torch.rand(logits.shape, generator=g) < 0.01] = float("nan")
    logits = logits.to(dtype)
    _, tokens = top_k_eager(logits, k)
    found = top_k(logits.cuda(), k)
    assert torch.equal(found.tokens.cpu().long(), tokens)
    # In float64: over 152,064 columns PyTorch's log-softmax on a CPU is off by 2e-5.
    exact = logits.double().nan_to_num(nan=-math.inf)
    log_probs = exact.log_softmax(-1).gather(1, tokens)
    torch.testing.assert_close(found.log_probs.cpu().double(), log_probs, rtol=1e-6, atol=1e-5)


def on_device(value):
    if isinstance(value, torch.Tensor):
        return value.cuda()
    return type(value)(*map(on_device, value)) if isinstance(value, tuple) else value


@pytest.mark.parametrize(("k", "depth"), [(1, 8), (4, 4), (10, 5), (16, 4)])
def test_beam_step(k, depth):
    for level in (0, 1, depth - 1, depth):
        twin = random_step(k, depth, level, [3, 0, -1, 1, 2, -1], seed=100 * k + level)
        step = {name: on_device(value) for name, value in twin.items()}
        beam_step(**step)
        beam_step_eager(**twin)
        for name in ("candidates", "beams", "inputs"):
            for ours, expected in zip(step[name], twin[name], strict=True):
                assert torch.equal(ours.cpu(), expected), (level, name)


@pytest.mark.parametrize("width", [4, 6, 12])
@pytest.mark.parametrize("hidden_size", [40, 4096])
def test_draft_prefill(width, hidden_size):
    _, step, table, inputs, rows = make_step(width, hidden_size, torch.bfloat16, seed=width)
    ours = [on_device(x) for x in (step, table, inputs, rows)]
    draft_prefill(ours[0], ours[1], BLOCK_SIZE, width, *ours[2:])
    draft_prefill(step, table, BLOCK_SIZE, width, inputs, rows)
    used = len(step.nodes) * width
    for name, mine, expected in zip(inputs._fields, ours[2], inputs, strict=True):
        written = used if name in ("input_ids", "positions", "hidden") else len(expected)
        assert torch.equal(mine[:written].cpu(), expected[:written]), name
    for mine, expected in zip(ours[3], rows, strict=True):
        assert torch.equal(mine.cpu(), expected)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s.total_tokens}-{s.depth}-{s.top_k}")
def test_growth(shape, ties):
    draft = ToyDraft(500, seed=shape.total_tokens, ties=ties, device="cuda")
    GrowthBatch.make(draft, shape, [2, -1, 0, 3]).assert_grows_the_same()


def test_a_captured_growth_follows_its_inputs():
    shape = SHAPES[1]
    batches = [
        GrowthBatch.make(ToyDraft(500, seed=9, device="cuda"), shape, slots, seed=slots[0])
        for slots in ([2, -1, 0, 3], [1, 3, 2, -1])
    ]
    captured = batches[0]
    replay = captured.capture()
    for batch in (*batches[::-1], batches[0]):
        expected = batch.by_definition()
        captured.take_over(batch)
        found, real = replay(), batch.place.slots >= 0
        for name in ("tokens", "parents", "depths", "ancestors"):
            assert torch.equal(getattr(found, name), getattr(expected, name)[real]), name
