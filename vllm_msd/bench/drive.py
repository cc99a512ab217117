"""One cell of the comparison: requests through one engine, so many at a time, timed."""

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from vllm_msd.errors import ConfigError
from vllm_msd.measure.engine import Engine


@dataclass
class Reply:
    """What one request got. first, last: seconds from its start to its first and last token.
    steps: engine steps that gave it tokens."""

    token_ids: list[int] = field(default_factory=list)
    first: float = 0.0
    last: float = 0.0
    steps: int = 0
    finish: str | None = None


@dataclass
class Cell:
    """What was measured of one arm, at one batch size and temperature, in one pass.

    seconds: of the whole, prompts included. accepted_by_depth: verifications that accepted a
    token at depth 1, 2, ... full_steps: of steps that only decoded, with the whole batch running:
    drafted tokens in all, levels drafted, how many such steps, their seconds, their tokens.
    """

    seconds: float = 0.0
    replies: list[Reply] = field(default_factory=list)
    verifications: int = 0
    drafted: int = 0
    accepted: int = 0
    accepted_by_depth: list[int] = field(default_factory=list)
    full_steps: list[list[float]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """In JSON's types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, table: dict[str, Any]) -> "Cell":
        """From `to_dict`; other keys are passed over."""
        known = {key: table[key] for key in cls.__dataclass_fields__}
        return cls(**{**known, "replies": [Reply(**reply) for reply in known["replies"]]})

    @property
    def tokens(self) -> int:
        """Of all replies."""
        return sum(len(reply.token_ids) for reply in self.replies)


def run_cell(
    engine: Engine,
    prompts: Sequence[dict[str, Any]],
    batch: int,
    depth: int | None,
    *,
    temperature: float,
    max_tokens: int,
    seed: int,
    fixed_length: bool = False,
    on_reply: Callable[[], None] = lambda: None,
) -> Cell:
    """Answer all prompts, ``batch`` of them at any time as long as there are so many.

    Answers end where the model ends them, or at ``max_tokens``. Drawn ones have a seed of their
    own each, the same for all arms.

    Args:
        engine: idle.
        prompts: vLLM's, see `Engine.prompt`.
        batch: requests at a time.
        depth: levels that the arm drafts; None to ask the engine's drafter after each step.
        temperature, max_tokens, seed: of sampling.
        fixed_length: every answer has ``max_tokens``, and is not made text: for random weights.
        on_reply: called after each.

    Raises:
        ConfigError: a prompt that the engine does not take, or not one token came.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    cell = Cell(replies=[Reply() for _ in prompts])
    full: dict[tuple[int, int], list[float]] = defaultdict(lambda: [0, 0.0, 0])
    waiting = list(range(len(prompts)))[::-1]
    running: set[int] = set()
    started: dict[int, float] = {}
    begun = now = time.perf_counter()
    while waiting or running:
        while waiting and len(running) < batch:
            number = waiting.pop()
            params = SamplingParams(
                temperature=temperature,
                max_tokens=max_tokens,
                seed=seed + number if temperature else None,
                ignore_eos=fixed_length,
                detokenize=not fixed_length,
                output_kind=RequestOutputKind.DELTA,
            )
            started[number] = time.perf_counter()
            try:
                engine.llm.add_request(str(number), prompts[number], params)
            except ValueError as error:
                raise ConfigError(
                    f"request {number + 1} of the data: {error} Leave it out of --data, or give "
                    "another --max-model-len."
                ) from error
            running.add(number)
        decoding = {number for number in running if cell.replies[number].token_ids}
        before = time.perf_counter()
        outputs, stats = engine.step()
        now = time.perf_counter()
        emitted = 0
        for output in outputs:
            number, delta = int(output.request_id), output.outputs[0]
            emitted += _note(cell.replies[number], delta, now - started[number])
            if output.finished:
                running.discard(number)
                on_reply()
        drafted = 0
        if stats is not None:
            drafted = stats.num_draft_tokens
            _count(cell, stats)
        if len(decoding) == batch and len(outputs) == batch:
            steps = full[drafted, _levels(engine) if depth is None else depth]
            steps[0] += 1
            steps[1] += now - before
            steps[2] += emitted
    if not cell.tokens:
        raise ConfigError(
            f"batch {batch}: got {len(prompts)} answers without a token, expected some to time. "
            "See what the target answers to --data without speculation (vllm serve)."
        )
    cell.seconds = now - begun
    cell.full_steps = [[*key, *steps] for key, steps in sorted(full.items())]
    return cell


def _note(reply: Reply, delta: Any, seconds: float) -> int:
    new = list(delta.token_ids)
    reply.finish = delta.finish_reason or reply.finish
    if new:
        if not reply.token_ids:
            reply.first = seconds
        reply.last = seconds
        reply.steps += 1
        reply.token_ids += new
    return len(new)


def _count(cell: Cell, stats: Any) -> None:
    cell.verifications += stats.num_drafts
    cell.drafted += stats.num_draft_tokens
    cell.accepted += stats.num_accepted_tokens
    by_depth = stats.num_accepted_tokens_per_pos
    before = cell.accepted_by_depth + [0] * (len(by_depth) - len(cell.accepted_by_depth))
    cell.accepted_by_depth = [a + b for a, b in zip(before, by_depth, strict=True)]


def _levels(engine: Engine) -> int:
    """How deep an engine that chooses its sizes has just drafted; 0 where it does not say."""
    plan = getattr(getattr(engine.model_runner, "drafter", None), "plan", None)
    return getattr(plan, "depth", 0)
