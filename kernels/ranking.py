"""Order of scored things in Triton: the larger value first, the earlier one at a tie.

A float32 value and an index become one int64 key, so that a maximum, which has no order of its
own among equal values, gives the same answer on every device. The key can be taken apart again.
"""

import triton
import triton.language as tl

NOTHING = tl.constexpr(-(2**63))  # below the key of every value


@triton.jit
def order_key(value, index):
    """int64 keys of float32 values that are no NaN; index from 0 to 2^31 - 1."""
    value = tl.where(value == 0, 0.0, value)  # -0.0 ties with 0.0
    bits = value.to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - index).to(tl.int64)


@triton.jit
def key_value(key):
    ordered = (key >> 32).to(tl.int32)
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def key_index(key):
    """int32."""
    return 0x7FFFFFFF - (key & 0x7FFFFFFF).to(tl.int32)


@triton.jit
def best_keys(keys, count, SLOTS: tl.constexpr):
    """[SLOTS] the ``count`` largest of ``keys``, which differ, in descending order."""
    slot = tl.arange(0, SLOTS)
    best = tl.full([SLOTS], NOTHING, tl.int64)
    for i in range(count):
        top = tl.max(keys, 0)
        best = tl.where(slot == i, top, best)
        keys = tl.where(keys == top, NOTHING, keys)
    return best
