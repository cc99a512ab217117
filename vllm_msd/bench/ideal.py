"""What the acceptance allows, beside what was reached, and where the rest of a step's time goes.

Two bounds, which are not to be mixed up. The ideal *speed-up*: both arms pay what the cost table of
`vllm_msd.budget` says for the target's rows and the draft's levels, and nothing besides. The ideal
*tokens per second*: nothing takes time but the matrix products, so that no speculation does not
reach it either.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from vllm_msd.bench.arms import NONE, Arm
from vllm_msd.bench.engines import Engines
from vllm_msd.budget import CostTable
from vllm_msd.budget.costs import Curve
from vllm_msd.errors import MSDError
from vllm_msd.measure.inputs import Sample

ROWS = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)


def measure_ideal(
    engines: Engines, arms: Sequence[Arm], samples: Sequence[Sample], *, max_tokens: int
) -> dict[str, Any]:
    """What the bounds are made of, from engines that know it; in JSON's types.

    Args:
        engines: idle.
        arms: of the run.
        samples: to answer for the profile, at batch 1.
        max_tokens: of an answer.

    Returns:
        ``costs`` by shape and ``widths``, the rows of a level, of the same shapes; ``products``
        (milliseconds by rows, of target and draft), ``profile`` (milliseconds of a step by part, or
        ``missing``, why not) with the arm it is of; or ``missing``, why there are none.
    """
    from vllm_msd.measure.step_profile import products_of, profile_engine

    auto = next((arm.name for arm in arms if arm.method == "auto"), None)
    if auto is None:
        return {"missing": "the arm `auto`, whose engine knows what steps cost, did not run"}
    engine = engines.get(auto)
    tables = getattr(getattr(engine.model_runner, "drafter", None), "tables", None)
    if not tables:
        return {
            "missing": "no engine knows what the parts of a step cost: sizes are fixed here, or "
            "follow whole steps under Model Runner V2"
        }
    drafter = engine.model_runner.drafter
    chosen = drafter.config
    shapes = {"auto": chosen} | {"chain" if s.is_chain else "tree": s for s in tables}
    products = products_of(engine, ROWS, dtype=engine.dtype)
    try:
        profile = profile_engine(engine, samples, max_tokens=max_tokens, split_target=True)
    except MSDError as error:  # where nothing pays, nothing is drafted
        profile = {"missing": str(error)}
    return {
        "costs": {name: tables[shape].to_dict() for name, shape in shapes.items()},
        "widths": {name: shape.top_k for name, shape in shapes.items()},
        "products": {
            name: {str(rows): ms for rows, ms in one["milliseconds"].items()}
            for name, one in products.items()
        },
        "profile": {"arm": auto, **profile},
    }


class Bounds:
    """The ideal speeds of decoding with the whole batch running.

    Args:
        measured: of `measure_ideal`, without ``missing``.
    """

    def __init__(self, measured: Mapping[str, Any]) -> None:
        self._costs = {name: CostTable.from_dict(t) for name, t in measured["costs"].items()}
        self._widths = measured["widths"]
        self._products = {
            name: Curve.through((float(rows), ms / 1000) for rows, ms in by_rows.items())
            for name, by_rows in measured["products"].items()
        }

    def speedup(self, arm: Arm, batch: int, full_steps: Sequence[Sequence[float]]) -> float | None:
        """How much faster than no speculation these steps would be.

        None without such steps, where no table reaches so many requests, and for a draft whose
        levels are of another width than those that were measured.

        Args:
            arm: whose steps they are.
            batch: requests in each.
            full_steps: see `vllm_msd.bench.drive.Cell`.
        """
        name = next(name for name in (arm.method, "chain", "auto") if name in self._costs)
        table = self._costs[name]
        is_other = arm.method in ("chain", "tree") and arm.width != self._widths[name]
        if is_other or batch > max(requests for requests, _, _ in table.step):
            return None
        tokens = sum(step[4] for step in full_steps)
        seconds = sum(
            count
            * float(
                table.step_seconds(batch, batch + drafted)
                + table.draft_seconds(batch, batch + drafted, int(depth))
            )
            for drafted, depth, count, _, _ in full_steps
        )
        if not seconds:
            return None
        return tokens / seconds / (batch / float(table.step_seconds(batch, batch)))

    def tokens_per_second(
        self, arm: Arm, batch: int, full_steps: Sequence[Sequence[float]]
    ) -> float | None:
        """What the matrix products of these steps alone would allow."""
        target, draft = self._products["target"], self._products["draft"]
        width = self._widths["auto"] if arm.method == "auto" else arm.width
        seconds = 0.0
        for drafted, depth, count, _, _ in full_steps:
            rows = batch + drafted
            step = float(target.at(rows))
            if depth:
                step += float(draft.at(rows)) + (depth - 1) * float(draft.at(batch * width))
            seconds += count * step
        return sum(step[4] for step in full_steps) / seconds if seconds else None


def shares(
    bounds: Bounds | None, arm: Arm, batch: int, full_steps: Sequence[Sequence[float]], plain: float
) -> dict[str, float | None]:
    """Reached and ideal speed of an arm's decoding, and the one as a share of the other.

    Args:
        bounds: None where nothing is known of them.
        arm, batch, full_steps: see `Bounds.speedup`.
        plain: tokens per second of no speculation in such steps; 0 where there were none.
    """
    seconds = sum(step[3] for step in full_steps)
    rate = sum(step[4] for step in full_steps) / seconds if seconds else None
    speedup = rate / plain if rate and plain else None
    ideal_speedup = bounds.speedup(arm, batch, full_steps) if bounds else None
    ideal_rate = bounds.tokens_per_second(arm, batch, full_steps) if bounds else None
    if arm.method == NONE:
        ideal_speedup = 1.0 if ideal_speedup else None
    return {
        "decode_tokens_per_second": rate,
        "decode_speedup": speedup,
        "ideal_speedup": ideal_speedup,
        "share_of_ideal_speedup": speedup / ideal_speedup if speedup and ideal_speedup else None,
        "ideal_tokens_per_second": ideal_rate,
        "share_of_ideal_tokens_per_second": rate / ideal_rate if rate and ideal_rate else None,
    }
