"""How far a kernel in half precision may be from exact attention, and masks that are wrong enough.

Weights and results are rounded once each, by half a unit in the last place; sums in float32 add
1e-5 of the largest value. With large values inside the trees (`tree_batches.make_batch`) a lost
ancestor is many times that, which it is not among values of one size and a long context.
"""

import torch
from torch import Tensor

from vllm_msd.kernels.tree_attention.eager import tree_attention_eager


def largest_error(result: Tensor, arguments: tuple, **scales: Tensor) -> float:
    """The largest difference from exact attention, in units of what rounding allows.

    Args:
        result: ``[rows, heads, head_size]`` of a half type, of the first rows of q.
        arguments: of ``tree_attention``, on the CPU, those of `tree_batches.Batch`.
        scales: ``k_scale`` and ``v_scale`` of a float8 cache.
    """
    q, k, v, *rest = arguments
    wide = [q.float(), k.float() if not scales else k, v.float() if not scales else v]
    exact = tree_attention_eager(*wide, *rest, **scales)[: len(result)]
    magnitudes = v.float().abs()
    wide[2] = magnitudes if not scales else magnitudes.to(v.dtype)
    sizes = tree_attention_eager(*wide, *rest, **scales)[: len(result)]
    largest = magnitudes.nan_to_num().max() * scales.get("v_scale", torch.ones(1))
    half = torch.finfo(result.dtype).eps / 2
    bound = half * (sizes + exact.abs()) + 1e-5 * largest.clamp(min=1)
    return float(((result.float() - exact).abs() / bound).max())


def without_high_ancestors(ancestors: Tensor) -> Tensor:
    """Masks ``[rows]`` int64 without ancestors above node 31, but with the node itself."""
    broken = []
    for mask in ancestors.tolist():
        bits = mask % 2**64
        bits = bits & 0xFFFF_FFFF | (1 << bits.bit_length() >> 1)
        broken.append(bits - 2**64 if bits >> 63 else bits)
    return torch.tensor(broken)
