"""Where the time of a verification goes, under Model Runner V1 on the CPU.

Timers around the parts of a step, without a profiler: everything there is synchronous, and the
parts are few and long beside a timer.
"""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from vllm_msd.errors import MSDError
from vllm_msd.measure.engine import Drafting, Engine
from vllm_msd.measure.inputs import Pair, Sample


class StepClock:
    """Seconds by part of the current step; `finish` adds a step with drafts to ``total``."""

    def __init__(self) -> None:
        self.current: dict[str, float] = defaultdict(float)
        self.total: dict[str, float] = defaultdict(float)
        self.steps = 0
        self._wrapped: list[tuple[Any, str]] = []

    def timed(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """``call``, whose time counts as ``part``."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                self.current[part] += time.perf_counter() - start

        return timed

    def wrap(self, owner: Any, name: str, part: str) -> None:
        """Time a method of one object."""
        setattr(owner, name, self.timed(part, getattr(owner, name)))
        self._wrapped.append((owner, name))

    def unwrap(self) -> None:
        """Give the objects their own methods back."""
        while self._wrapped:
            delattr(*self._wrapped.pop())

    def finish(self, counts: bool) -> None:
        """End the step; it counts when it verified drafts."""
        if counts:
            self.steps += 1
            for part, seconds in self.current.items():
                self.total[part] += seconds
        self.current.clear()


def profile_steps(
    pair: Pair,
    drafting: Drafting,
    samples: Sequence[Sample],
    *,
    dtype: str,
    max_tokens: int = 192,
) -> dict[str, Any]:
    """Answer the samples one by one and give the mean milliseconds of each part of a step.

    ``drafting_and_settling_share`` is what drafting and settling take of the whole step, the
    draft's own matrix products (its linear layers and the head) left out of the two.

    Raises:
        MSDError: the engine does not run under Model Runner V1, or ``drafting`` is a chain.
    """
    engine = Engine(pair.target, draft=pair.draft, drafting=drafting, dtype=dtype)
    if engine.llm.vllm_config.use_v2_model_runner or not drafting.is_tree:
        raise MSDError(
            f"profile: got a {drafting} under Model Runner "
            f"{'V2' if engine.llm.vllm_config.use_v2_model_runner else 'V1'}, expected a tree "
            "under V1, whose parts are timed here."
        )
    engine.answer(samples[0], 16)  # pays for lazy set-up
    return profile_engine(engine, samples, max_tokens=max_tokens)


def profile_engine(
    engine: Engine, samples: Sequence[Sample], *, max_tokens: int = 192, split_target: bool = False
) -> dict[str, Any]:
    """As `profile_steps`, with an engine that drafts trees or chooses its sizes, as it stands.

    ``split_target`` tells the target's own matrix products from the rest of its pass.

    Raises:
        MSDError: no step had drafts in it.
    """
    runner, clock = engine.model_runner, StepClock()
    draft, target = runner.drafter.model, runner.model
    clock.wrap(engine.llm, "step", "step")
    clock.wrap(target, "forward", "target")
    clock.wrap(target, "compute_logits", "target head")
    clock.wrap(runner, "_sample", "sampling and settling")
    clock.wrap(runner.rejection_sampler, "forward", "sampling")
    clock.wrap(runner, "propose_draft_token_ids", "drafting")
    for module in _linear_layers(draft):
        clock.wrap(module, "forward", "draft products")
    clock.wrap(draft, "column_logits", "draft products")
    if split_target:
        for module in _linear_layers(target.get_language_model()):
            clock.wrap(module, "forward", "target products")

    step = engine.llm.step

    def counted_step() -> Any:
        outputs = step()
        clock.finish(runner.step is not None)
        return outputs

    engine.llm.step = counted_step
    try:
        for sample in samples:
            engine.answer(sample, max_tokens)
    finally:
        clock.unwrap()  # the counting with it, which stands in the same place
    if not clock.steps:
        raise MSDError("profile: got no step with drafts in it, expected some.")
    return _shares(clock)


def products_by_rows(
    pair: Pair, row_counts: Sequence[int], *, dtype: str, rounds: int = 7
) -> dict[str, dict[str, Any]]:
    """What the matrix products of a pass cost by the rows in it, which decides what a tree may be.

    All linear layers and the head of the target's language model, and of the draft, run one after
    another as in a pass, so that every weight comes from memory. The counts take turns within a
    round.

    Args:
        pair: the models.
        row_counts: rows of a pass, one for no speculation, drafted tokens and one to verify them.
        dtype: what vLLM computes in.
        rounds: how often each count is timed.

    Returns:
        ``target`` and ``draft``, each with the number of ``matrices`` in a pass and the median
        ``milliseconds`` by rows.
    """
    engine = Engine(pair.target, draft=pair.draft, drafting=Drafting(1), dtype=dtype)
    return products_of(engine, row_counts, dtype=dtype, rounds=rounds)


def products_of(
    engine: Engine, row_counts: Sequence[int], *, dtype: str, rounds: int = 7
) -> dict[str, dict[str, Any]]:
    """As `products_by_rows`, of an engine with a draft, as it stands."""
    runner = engine.model_runner
    models = {"target": runner.model.get_language_model(), "draft": runner.drafter.model}
    layers = {name: _linear_layers(model) for name, model in models.items()}
    passes = {
        name: _products(model, layers[name], getattr(torch, dtype))
        for name, model in models.items()
    }
    seconds: dict[str, dict[int, list[float]]] = {
        name: {rows: [] for rows in row_counts} for name in models
    }
    for timed_round in range(rounds + 1):
        for name, run in passes.items():
            for rows in row_counts:
                start = time.perf_counter()
                run(rows)
                if timed_round:  # the first meets each shape for the first time
                    seconds[name][rows].append(time.perf_counter() - start)
    return {
        name: {
            "matrices": len(layers[name]) + 1,  # the head
            "milliseconds": {r: 1000 * statistics.median(found) for r, found in by_rows.items()},
        }
        for name, by_rows in seconds.items()
    }


def _products(
    model: nn.Module, layers: Sequence[nn.Module], dtype: torch.dtype
) -> Callable[[int], None]:
    """A call that runs the model's linear layers and its head on so many random rows."""
    widths = {layer: layer.input_size for layer in layers}
    hidden = model.config.hidden_size

    @torch.inference_mode()
    def run(rows: int) -> None:
        inputs = {w: torch.randn(rows, w, dtype=dtype) for w in {hidden, *widths.values()}}
        for layer in layers:
            layer(inputs[widths[layer]])
        model.compute_logits(inputs[hidden])

    return run


def _linear_layers(model: nn.Module) -> list[nn.Module]:
    from vllm.model_executor.layers.linear import LinearBase

    return [m for m in model.modules() if isinstance(m, LinearBase | nn.Linear)]


def _shares(clock: StepClock) -> dict[str, Any]:
    mean = {part: 1000 * seconds / clock.steps for part, seconds in clock.total.items()}
    target = mean["target"] + mean["target head"]
    parts = {"target": target}
    if "target products" in mean:
        products = mean["target products"] + mean["target head"]
        parts = {
            "target's matrix products": products,
            "rest of the target": target - products,
        }
    parts |= {
        "sampling and acceptance": mean["sampling"],
        "settling": mean["sampling and settling"] - mean["sampling"],
        "draft's matrix products": mean["draft products"],
        "rest of drafting": mean["drafting"] - mean["draft products"],
    }
    parts["rest of the step"] = mean["step"] - sum(parts.values())
    own = parts["settling"] + parts["rest of drafting"]
    return {
        "steps": clock.steps,
        "milliseconds_per_step": {**parts, "whole step": mean["step"]},
        "drafting_and_settling_share": own / mean["step"],
    }
