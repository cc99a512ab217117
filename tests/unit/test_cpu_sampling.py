"""The CPU's way to spread a request's sampling parameters over its drafted tokens, any dtype."""

import pytest
import torch

from vllm_msd.vllm_plugin.cpu.sampling_mends import wrap_expand_kernel


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
