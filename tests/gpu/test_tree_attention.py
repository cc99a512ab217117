"""The compiled tree attention kernel on a CUDA device, against unrolled paths.

The same batches as in Triton's interpreter (tests/unit), at the tiles that are used on this device.
What only shows here: compiled code and asynchronous copies. Bounds are the rounding of weights and
results in the half types.
"""

import pytest
import torch

from tests.common.tree_batches import (
    EAGLE_25,
    MEDUSA_63,
    Request,
    make_batch,
    parents_from_paths,
    random_tree,
    unrolled_attention,
)
from vllm_msd.kernels import tree_attention

BOUNDS = {torch.bfloat16: 2e-2, torch.float16: 4e-3}


def _requests() -> list[Request]:
    generator = torch.Generator().manual_seed(0)
    return [
        Request(700, parents_from_paths(MEDUSA_63)),  # verification
        Request(90, parents_from_paths(EAGLE_25)),
        Request(1500, random_tree(64, generator)),
        Request(300),  # ordinary decoding
        Request(400, queries=250),  # a later chunk of a prompt
    ]


def _on_device(arguments: tuple) -> list:
    return [a.cuda() if isinstance(a, torch.Tensor) else a for a in arguments]


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize(("heads", "kv_heads", "head_size"), [(4, 4, 128), (7, 1, 128), (4, 2, 64)])
def test_mixed_batch(dtype, heads, kv_heads, head_size):
    shape = {"heads": heads, "kv_heads": kv_heads, "head_size": head_size}
    batch = make_batch(_requests(), dtype=dtype, padding=3, **shape)
    arguments = _on_device(batch.args)
    out = torch.full_like(arguments[0], 7.0)
    tree_attention(*arguments, out=out)
    rows = int(batch.args[5][-1])
    expected = unrolled_attention(batch)[:rows]
    torch.testing.assert_close(out[:rows].double().cpu(), expected, rtol=0, atol=BOUNDS[dtype])
    assert (out[rows:] == 7).all(), "padding rows were written"
