"""Top-k with log-sum-exp: the eager twin here, the Triton kernels in the interpreter.

What could go wrong in a kernel and not in its definition: columns that straddle groups and parts,
ties, columns behind the vocabulary, values that are no numbers, a part with fewer columns than k,
a draft's own vocabulary, offsets beyond 32 bits.

The interpreter must be on before Triton is imported, so this file runs itself a second time in a
process of its own, where the same calls take the kernels.
"""

import pytest
import torch

from tests.common.triton_interpreter import (
    INTERPRETED,
    mend_interpreter,
    run_again_interpreted,
)
from vllm_msd.kernels import TopK, merge_top_k, top_k, top_k_parts
from vllm_msd.kernels.top_k.eager import top_k_eager, top_k_parts_eager

# A part without a real logit has the logarithm of 0 on purpose, and what comes of it is not used.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{what}:RuntimeWarning")
    for what in ("divide by zero", "invalid value")
]
NEG = float("-inf")


@pytest.mark.skipif(INTERPRETED, reason="starts the interpreter's process")
def test_in_the_interpreter():
    run_again_interpreted(__file__)


@pytest.fixture(autouse=True)
def _mended(monkeypatch):
    if INTERPRETED:
        mend_interpreter(monkeypatch)


def logits_of(rows, columns, dtype, seed=0):
    """Padded rows, half of the values from few, some of them no numbers."""
    g = torch.Generator().manual_seed(seed)
    padded = torch.randn(rows, columns + 5, generator=g) * 4
    padded[:, columns:] = 1e4  # a padded vocabulary's: higher than all that counts
    few = torch.rand(padded.shape, generator=g) < 0.5
    padded = torch.where(few, padded.round(), padded)
    for value in (NEG, float("nan"), -0.0, 0.0):
        padded[torch.rand(padded.shape, generator=g) < 0.05] = value
    return padded.to(dtype)[:, :columns]


def assert_best(found, logits, k, token_ids=None):
    log_probs, tokens = top_k_eager(logits, k, token_ids)
    assert torch.equal(found.tokens.long(), tokens.long())
    torch.testing.assert_close(found.log_probs, log_probs, rtol=1e-6, atol=2e-6)
    assert (found.log_probs <= 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("columns", "k"), [(16, 16), (33, 1), (700, 4), (5000, 10), (4096, 7)])
def test_top_k(dtype, columns, k):
    logits = logits_of(3, columns, dtype, seed=columns)
    assert_best(top_k(logits, k), logits, k)


def test_top_k_definition():
    """The twin against PyTorch's own operations, where these are defined: no ties, no NaN."""
    logits = torch.randn(5, 300, generator=torch.Generator().manual_seed(1))
    expected = logits.log_softmax(-1).topk(6)
    log_probs, tokens = top_k_eager(logits, 6)
    assert torch.equal(tokens, expected.indices) and torch.equal(log_probs, expected.values)


@pytest.mark.parametrize("columns", [1, 70])
def test_top_k_of_rows_without_a_number(columns):
    logits = torch.full((3, columns), NEG)
    logits[1] = float("nan")
    logits[2, -1] = float("inf")
    k = min(columns, 3)
    found = top_k(logits, k)
    assert_best(found, logits, k)
    assert (found.log_probs[:2] == NEG).all()
    assert found.tokens[:2].tolist() == [list(range(k))] * 2
    assert found.tokens[2, 0] == columns - 1 and found.log_probs[2, 0] == 0


def test_top_k_of_a_large_vocabulary():
    """152k columns in bfloat16, where 256 values a power of two make ties of nearly everything."""
    columns, g = 152_064, torch.Generator().manual_seed(2)
    logits = (torch.randn(2, columns, generator=g) * 3).bfloat16()
    logits[0, 130_000:130_004] = logits[0].max()
    logits[1] = 1.0  # all the same: the first columns
    found = top_k(logits, 3)
    assert_best(found, logits, 3)
    assert found.tokens[1].tolist() == [0, 1, 2]


def test_top_k_beyond_32_bit_offsets():
    """Two rows more than 2^31 values apart; untouched memory costs nothing."""
    apart = 2**31 + 40
    logits = torch.empty(apart + 64, dtype=torch.bfloat16).as_strided((2, 40), (apart, 1))
    logits.copy_(logits_of(2, 40, torch.bfloat16))
    assert_best(top_k(logits, 5), logits, 5)


@pytest.mark.parametrize("seed", range(2))
def test_parts_of_several_devices_make_one_result(seed):
    """Shards of unequal width, one narrower than k, through a draft's own vocabulary."""
    k, widths = 6, [130, 64, 4, 90]
    logits = logits_of(3, sum(widths), torch.float16, seed=seed)
    g = torch.Generator().manual_seed(seed)
    ids = torch.randperm(1000, generator=g)[: sum(widths)]
    first, parts = 0, []
    for shard in logits.split(widths, dim=1):
        own = top_k_parts(shard, k, first, part_columns=64)
        twin = torch.empty_like(own)
        top_k_parts_eager(shard, k, first, 64, twin)
        assert torch.equal(own[..., :k], twin[..., :k])
        parts.append(own)
        first += shard.shape[1]
    for token_ids in (None, ids, ids.int()):
        assert_best(merge_top_k(torch.cat(parts, 1), token_ids), logits, k, token_ids)


def test_fewer_columns_than_asked_for():
    found = merge_top_k(top_k_parts(torch.zeros(2, 3), 5))
    assert found.tokens.tolist() == [[0, 1, 2, 0, 0]] * 2
    assert (found.log_probs[:, 3:] == NEG).all()


def test_top_k_refuses_what_does_not_fit():
    logits = torch.zeros(2, 40)
    with pytest.raises(ValueError, match="k is 41: expected 1 to 40"):
        top_k(logits, 41)
    with pytest.raises(ValueError, match=r"logits is torch\.int64"):
        top_k(logits.long(), 4)
    with pytest.raises(ValueError, match="make it contiguous there"):
        top_k(logits.t(), 2)
    with pytest.raises(ValueError, match=r"out.tokens is torch.int32 \[3, 4\]"):
        top_k(logits, 4, out=TopK(torch.zeros(2, 4), torch.zeros(3, 4, dtype=torch.int32)))
    with pytest.raises(ValueError, match="part_columns is 48"):
        top_k_parts(logits, 4, part_columns=48)
    with pytest.raises(ValueError, match=r"token_ids is torch\.float32"):
        top_k(logits, 4, torch.zeros(40))
