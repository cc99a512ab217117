"""The bound that the tests on a GPU use, rehearsed with the eager twin at their own batches."""

import pytest
import torch

from tests.common.rounding import largest_error, without_high_ancestors
from tests.common.tree_batches import Request, make_batch, random_tree
from vllm_msd.kernels import ancestor_bits
from vllm_msd.kernels.tree_attention.eager import tree_attention_eager


def batch_of(dtype, **more):
    generator = torch.Generator().manual_seed(0)
    requests = [Request(1500, random_tree(64, generator)), Request(300)]
    return make_batch(requests, dtype=dtype, head_size=64, **more)


def errors(batch, **scales):
    """Of right masks, and of masks without ancestors above the 32nd node."""
    arguments = batch.args
    right = tree_attention_eager(*arguments, **scales)
    broken = without_high_ancestors(arguments[7])
    wrong = tree_attention_eager(*arguments[:7], broken, arguments[8], **scales)
    return [largest_error(x, arguments, **scales) for x in (right, wrong)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_large_values_in_the_tree_show_a_lost_ancestor(dtype):
    right, wrong = errors(batch_of(dtype, tree_values=100.0))
    assert 0.05 < right <= 1 and wrong > 10
    _, unseen = errors(batch_of(torch.bfloat16))
    assert wrong > 5 * unseen


@pytest.mark.parametrize("cache_dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_of_a_float8_cache_too(cache_dtype):
    batch = batch_of(torch.bfloat16, cache_dtype=cache_dtype, tree_values=16.0)
    right, wrong = errors(batch, k_scale=torch.tensor([0.7]), v_scale=torch.tensor([1.9]))
    assert 0.05 < right <= 1 and wrong > 3


def test_only_ancestors_above_the_32nd_node_are_lost():
    masks = ancestor_bits(random_tree(64, torch.Generator().manual_seed(1)))
    broken = without_high_ancestors(masks)
    for node, (mask, less) in enumerate(zip(masks.tolist(), broken.tolist(), strict=True)):
        kept = [n for n in range(64) if mask >> n & 1 and (n < 32 or n == node)]
        assert [n for n in range(64) if less >> n & 1] == kept
    assert not torch.equal(masks, broken)
