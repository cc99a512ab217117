"""What the benchmark makes of its measurements: figures, pass or fail, a plot."""

import json
import statistics
from pathlib import Path

from .problem import Case
from .rivals import CAUSAL, OURS, RIVALS

TARGET = Case("llava-1.5-7b", 8, 4096, 60)  # of bandwidth and masks; settling at its batch
MIN_SHARE_OF_COPY = 0.75
MAX_MASKS_COST = 0.05
MIN_FASTEST_SHARE = 0.9
SETTLE_MICROSECONDS = 30.0
SETTLE_OVER_BOUND = 10.0  # microseconds; the larger of the two limits counts


def summary(record: dict, target: Case = TARGET) -> dict:
    """The figures of the targets, from what was measured; None for what was not."""
    times: dict[Case, dict[str, float]] = {}
    shares: dict[Case, float] = {}
    for row in record["attention"]:
        if "microseconds" in row:
            case = Case(row["model"], row["batch"], row["context"], row["nodes"])
            times.setdefault(case, {})[row["name"]] = row["microseconds"]
            if row["name"] == OURS:
                shares[case] = row["share_of_copy"]
    measured = {case: t for case, t in times.items() if OURS in t}
    slower = {c: t[OURS] / t[CAUSAL] - 1 for c, t in measured.items() if CAUSAL in t}
    contests = [(t[OURS], [v for n, v in t.items() if n not in (OURS, CAUSAL)]) for t in
                measured.values()]  # fmt: skip
    contests = [(own, others) for own, others in contests if others]
    won = sum(own < min(others) for own, others in contests)
    settles = [
        row
        for row in record["settle"]
        if (row["model"], row["batch"]) == (target.model, target.batch) and "microseconds" in row
    ]
    return {
        "share_of_copy_at_target": shares.get(target),
        "masks_cost_at_target": round(slower[target], 4) if target in slower else None,
        "masks_cost_median": round(statistics.median(slower.values()), 4) if slower else None,
        "masks_cost_worst": round(max(slower.values()), 4) if slower else None,
        "alternatives": sorted({n for t in measured.values() for n in t} - {OURS, CAUSAL}),
        "cases_with_alternatives": len(contests),
        "fastest_in": won,
        "fastest_share": round(won / len(contests), 4) if contests else None,
        "settle_microseconds_at_target": settles[0]["microseconds"] if settles else None,
        "settle_limit_microseconds": max(
            SETTLE_MICROSECONDS, round(settles[0]["bound_microseconds"] + SETTLE_OVER_BOUND, 2)
        )
        if settles
        else None,
    }


def criteria(found: dict, target: Case = TARGET) -> list[dict]:
    """Each target with its value, its limit and ``passed``, which is None if it was not measured"""
    case = f"batch {target.batch}, context {target.context}, {target.nodes} nodes, {target.model}"
    costs = (found["masks_cost_at_target"], found["masks_cost_median"])
    masks = None if None in costs else max(costs)
    rows = [
        (f"share of copy bandwidth ({case})", found["share_of_copy_at_target"], ">=",
         MIN_SHARE_OF_COPY),
        (f"what masks cost ({case}, and the median)", masks, "<=", MAX_MASKS_COST),
        ("share of cases in which it is the fastest", found["fastest_share"], ">=",
         MIN_FASTEST_SHARE),
        (f"settling in microseconds (batch {target.batch}, {target.model})",
         found["settle_microseconds_at_target"], "<=", found["settle_limit_microseconds"]),
    ]  # fmt: skip
    return [
        {
            "what": what,
            "value": value,
            "limit": f"{sign} {limit}",
            "passed": None
            if value is None
            else (value >= limit if sign == ">=" else value <= limit),
        }
        for what, value, sign, limit in rows
    ]


def describe(criterion: dict) -> str:
    """One line: passed, failed or not measured."""
    word = {True: "PASSED", False: "FAILED", None: "NOT MEASURED"}[criterion["passed"]]
    return f"{word:12} {criterion['what']}: {criterion['value']} (limit {criterion['limit']})"


def plot(path: Path) -> Path:
    """Share of the copy bandwidth by case size, a panel per model; raises ImportError."""
    from matplotlib.figure import Figure

    record = json.loads(path.read_text())
    rows = [r for r in record["attention"] if "share_of_copy" in r]
    models = list(dict.fromkeys(r["model"] for r in rows))
    figure = Figure(figsize=(5 * max(1, len(models)), 4.5), layout="constrained")
    panels = figure.subplots(1, max(1, len(models)), sharey=True, squeeze=False)[0]
    for panel, model in zip(panels, models, strict=False):
        nodes = max(r["nodes"] for r in rows if r["model"] == model and r["nodes"] <= TARGET.nodes)
        for name in RIVALS:
            points = sorted(
                (r["bytes"] / 1e6, r["share_of_copy"])
                for r in rows
                if (r["name"], r["model"], r["nodes"]) == (name, model, nodes)
            )
            if points:
                panel.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
        panel.set(title=f"{model}, {nodes} nodes", xlabel="MB to move at least", xscale="log")
        panel.grid(alpha=0.3)
    panels[0].set(ylabel="share of copy bandwidth", ylim=(0, None))
    panels[-1].legend(fontsize="small")
    figure.suptitle(f"{record['device']}, {record['date']}")
    target = path.with_suffix(".png")
    figure.savefig(target, dpi=130)
    return target
