"""Mends of vLLM's sampling on a CPU: parameters of drafted tokens, seeds of unfinished prompts."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vllm_msd.vllm_plugin.cpu.sampling_mends import spare_unfinished_prompts, wrap_expand_kernel


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32, torch.int64])
def test_each_request_fills_its_own_tokens(dtype):
    expand = wrap_expand_kernel(lambda *arguments: None)
    values = torch.tensor([7, 0, 3, 0], dtype=dtype)
    ends = torch.tensor([2, 2, 5, 6], dtype=torch.int32)  # the second request has no draft
    output = torch.full((6,), -1, dtype=dtype)
    expand(output, values, ends, 0, 1, MAX_NUM_TOKENS=128)
    assert output.tolist() == [7, 7, 3, 3, 3, 1]


def test_fractions_survive():
    expand = wrap_expand_kernel(lambda *arguments: None)
    output = torch.empty(3)
    expand(output, torch.tensor([0.7, 0.9]), torch.tensor([1, 3]), 0, 1)
    assert torch.equal(output, torch.tensor([0.7, 0.9, 0.9]))


def test_unfinished_prompts_leave_their_generators_alone():
    """Request 1 is in the middle of its prompt; 0 and 2 get tokens."""
    generators = {row: torch.Generator().manual_seed(row) for row in range(3)}
    before = generators[1].get_state()
    runner = SimpleNamespace(
        input_batch=SimpleNamespace(generators=dict(generators), num_reqs=3),
        discard_request_mask=SimpleNamespace(np=np.array([False, True, False, True])),
    )

    def sample_tokens(grammar_output):
        return {
            row: torch.rand((), generator=generator).item()
            for row, generator in runner.input_batch.generators.items()
        }

    runner.sample_tokens = sample_tokens
    drawn = spare_unfinished_prompts(runner)(None)
    assert sorted(drawn) == [0, 2]
    assert runner.input_batch.generators == generators
    assert torch.equal(generators[1].get_state(), before)


def test_generators_come_back_after_an_error():
    generator = torch.Generator()
    runner = SimpleNamespace(
        input_batch=SimpleNamespace(generators={0: generator}, num_reqs=1),
        discard_request_mask=SimpleNamespace(np=np.array([True])),
        sample_tokens=lambda: 1 / 0,
    )
    with pytest.raises(ZeroDivisionError):
        spare_unfinished_prompts(runner)()
    assert runner.input_batch.generators == {0: generator}
