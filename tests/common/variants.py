"""Which variants of the package's kernels a run launches, as Triton's compiler tells them apart."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

Variant = tuple[Any, ...]


@contextmanager
def recorded_variants(run: bool = True) -> Iterator[set[Variant]]:
    """The variants launched inside, in Triton's interpreter: each would be compiled on a GPU.

    A variant is a kernel with its constants, the types of its arguments, and of pointers and
    integers what the compiler specializes on: multiples of 16, and the number 1.

    Args:
        run: False only notes the launches; tensors may then be of the meta device.
    """
    from triton.runtime.interpreter import InterpretedFunction

    found: set[Variant] = set()
    original = InterpretedFunction.run

    def noted(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        ours = self.fn.__module__.startswith("vllm_msd.kernels")
        if ours:
            found.add(variant_of(self, args, kwargs))
        if run or not ours:
            return original(self, *args, grid=grid, warmup=warmup, **kwargs)

    with mock.patch.object(InterpretedFunction, "run", noted):
        yield found


def variant_of(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Variant:
    """What the compiler would look up for this call."""
    signature = inspect.signature(kernel.fn)
    names = signature.parameters
    options = {name: value for name, value in kwargs.items() if name not in names}
    bound = signature.bind(*args, **{n: v for n, v in kwargs.items() if n in names})
    unspecialized = kernel.kwargs["do_not_specialize"] or ()
    unaligned = kernel.kwargs["do_not_specialize_on_alignment"] or ()
    parts = []
    for name, value in bound.arguments.items():
        if "constexpr" in str(names[name].annotation) or value is None:
            kind: Any = ("constant", value)
        elif isinstance(value, torch.Tensor):
            offset = value.storage_offset() * value.element_size()
            aligned = name not in (*unspecialized, *unaligned) and offset % 16 == 0
            kind = (str(value.dtype), aligned)
        elif isinstance(value, int):
            wide = not -(2**31) <= value < 2**31
            special = name not in unspecialized
            kind = (wide, special and (1 if value == 1 else value % 16 == 0))
        else:
            kind = type(value).__name__
        parts.append((name, kind))
    return (kernel.fn.__name__, *parts, *sorted(options.items()))


def engine_variants(*, runner: str, kind: str, target: str, draft: str) -> dict[str, Any]:
    """What vLLM's warm-up launches of our kernels, and what serving launches beyond it.

    For `run_worker`, with the kernels themselves in the interpreter. Chunks of prompts, an image,
    decoding with trees of several sizes, and requests that come and go.
    """
    from tests.common.chain_identity import Run, engine_options, greedy, require_runner
    from tests.common.fp32_engine import acceptance, counted, open_engine
    from vllm_msd.vllm_plugin.gpu.warmup import TreeKernels

    schedule = [[1, 1, 8], [2, 2, 5], [3, 6, 3]]
    engine = open_engine(target, draft, 8, tree=(3, 3), schedule=schedule, **engine_options(kind))
    require_runner(engine, runner)
    model_runner = engine.llm_engine.model_executor.driver_worker.worker.model_runner
    # What vLLM's own kernels compile there is none of the interpreter's business.
    (ours,) = (
        kernel
        for kernel in model_runner.jit_warmup_registry._registrations
        if isinstance(kernel, TreeKernels)
    )
    with recorded_variants() as warmed:
        ours.warmup()
    run = Run(engine, kind, {})
    prompts = [run.prompt("how are you?"), run.prompt("look: {}", 1), run.prompt("and on it goes")]
    with recorded_variants() as launched:
        run.ask(prompts, [greedy(max_tokens=n) for n in (4, 7, 10)])
    return {
        "warmed": sorted({variant[0] for variant in warmed}),
        "launched": sorted({variant[0] for variant in launched}),
        "late": sorted(map(str, launched - warmed)),
        "acceptance": counted(acceptance(engine)),
    }
