"""In the place of vLLM's native library, with KIT_NO_C=1: the operations LLaVA's layers look up."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

LIBRARY = torch.library.Library("_C", "FRAGMENT")
UNSUPPORTED = (
    "cutlass_scaled_mm_supports_fp8",
    "cutlass_scaled_mm_supports_block_fp8",
    "cutlass_scaled_mm_supports_fp4",
    "cutlass_group_gemm_supported",
)


def define(name: str, function: Callable[[Tensor], Tensor]) -> None:
    """Register ``name(result, input)``, which writes ``function(input)``."""

    def write(result: Tensor, given: Tensor) -> None:
        result.copy_(function(given))

    LIBRARY.define(f"{name}(Tensor(a!) result, Tensor input) -> ()")
    LIBRARY.impl(name, write, "CompositeExplicitAutograd")


def gated(activation: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The activation of the first half of the columns, times the second half."""

    def function(x: Tensor) -> Tensor:
        gate, up = x.chunk(2, -1)
        return activation(gate) * up

    return function


define("silu_and_mul", gated(silu))
define("gelu_and_mul", gated(gelu))
define("gelu_quick", lambda x: x * torch.sigmoid(1.702 * x))
define("gelu_fast", lambda x: gelu(x, approximate="tanh"))
define("gelu_new", lambda x: gelu(x, approximate="tanh"))

for _name in UNSUPPORTED:
    LIBRARY.define(_name + "(int cuda_device_capability) -> bool")
    LIBRARY.impl(_name, lambda capability: False, "CompositeExplicitAutograd")
