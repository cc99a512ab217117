"""What sizes left to the plugin would do on a GPU, by arithmetic: speed-ups over no speculation.

    python benchmarks/budget.py
    python benchmarks/budget.py --output benchmarks/predictions/budget.json \\
        --plot docs/pictures/budget.svg

The rule of vllm_msd/budget with the cost tables of vllm_msd/roofline. Each batch size gets the
depth and the nodes that the rule takes for usual requests: as many tokens are accepted as a tree of
60 nodes accepts in --tokens, and less by smaller ones. Fixed trees and a chain stand beside it, and
each of these with the schedule of sizes that Model Runner V2 follows (a star): a part of its nodes,
the same for each request, and the draft reads along where there are none. No GPU is needed, and
nothing here was measured on one.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.roofline import NOTE, load_figure
from vllm_msd.budget import (
    PAPER_TREE,
    AcceptancePrior,
    CostTable,
    SizeCosts,
    SizeSchedule,
    best_rate,
    candidate_sizes,
    expected_tree,
    ratio_for,
)
from vllm_msd.errors import MSDError
from vllm_msd.roofline.budget_costs import BATCHES, gpu_costs
from vllm_msd.roofline.shapes import DEVICES, SHAPES
from vllm_msd.tree import TreeConfig

MODELS = ("llava-1.5-7b", "qwen2-vl-7b")
TREE, CHAIN = PAPER_TREE, TreeConfig(8, 8, 1)
FIXED = {"tree 60": TREE, "tree 24": TreeConfig(24, 5, 4), "chain 5": TreeConfig(5, 5, 1)}
# Trees in a modified vLLM on four B300 and a 27B text model, as their authors say: another model on
# other hardware, only to compare how a curve falls.
EAGLE_4 = {1: 2.83, 8: 1.72, 64: 1.14}


def main() -> int:
    """Run the script."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--tokens",
        type=float,
        default=4.75,
        help="tokens per verification of a tree of 60 (default: %(default)s)",
    )
    parser.add_argument("--context", type=int, default=1000, help="tokens of a request")
    parser.add_argument("--output", type=Path, help="write everything as JSON")
    parser.add_argument("--plot", type=Path, help="write the curves (needs matplotlib)")
    args = parser.parse_args()
    from vllm_msd.provenance import provenance

    try:
        if args.plot:
            load_figure()
        ratio = ratio_for(args.tokens)
    except MSDError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    settings = {"tokens": args.tokens, "context": args.context, "ratio": round(ratio, 4)}
    result = {"note": NOTE, **provenance(**settings), "eagle_4": EAGLE_4}
    result["rows"] = [
        row
        for device in DEVICES
        for model in MODELS
        for hidden in (True, False)
        for row in rows(model, device, ratio, args.context, hidden)
    ]
    print(as_text(result))
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=1) + "\n")
    if args.plot:
        plot(result, args.plot)
    return 0


def rows(model: str, device: str, ratio: float, context: int, hidden: bool) -> list[dict[str, Any]]:
    """A row for each batch size, with the rule's choice and the fixed sizes."""
    shape, gpu = SHAPES[model], DEVICES[device]
    found = []
    tables = {
        tree: gpu_costs(shape, gpu, tree, context=context, hidden=hidden)
        for tree in (*FIXED.values(), CHAIN)
    }
    schedules = {name: schedule(tree, tables[tree], ratio) for name, tree in FIXED.items()}
    for batch in BATCHES:
        none = batch / float(tables[TREE].step_seconds(batch, batch))
        best, depth, nodes, top_k = max(
            (*auto(tree, tables[tree], ratio, batch), tree.top_k) for tree in (TREE, CHAIN)
        )
        found.append(
            {
                "model": model, "device": device, "launches_hidden": hidden, "batch": batch,
                "auto": round(best / none, 3), "top_k": top_k, "depth": depth,
                "nodes": nodes,
                **{name: round(fixed(tree, tables[tree], ratio, batch) / none, 3)
                   for name, tree in FIXED.items()},
                "schedule": {name: followed(rule, batch, none) for name, rule in schedules.items()},
            }
        )  # fmt: skip
    return found


def auto(tree: TreeConfig, costs: CostTable, ratio: float, batch: int) -> tuple[float, int, int]:
    """Tokens per second, depth and nodes of a request, by the rule."""
    chances, depths = expected_tree(tree, [ratio])
    choices = []
    for depth in range(tree.depth + 1):
        worths = chances[depths <= depth]
        counts = np.full(len(worths), float(batch))
        sizes = [
            (best_rate(worths[:n], counts[:n], batch, costs, depth), n)
            for n in range(len(worths) + 1)
        ]
        rate, nodes = max(sizes, key=lambda size: (size[0], -size[1]))
        choices.append((rate, depth, nodes))
    return max(choices, key=lambda choice: (choice[0], -choice[1]))


def fixed(tree: TreeConfig, costs: CostTable, ratio: float, batch: int) -> float:
    """Tokens per second of a size that never changes."""
    chances, _ = expected_tree(tree, [ratio])
    verified = batch * (1 + tree.num_nodes)
    seconds = costs.step_seconds(batch, verified) + costs.draft_seconds(batch, verified, tree.depth)
    return batch * (1 + float(chances.sum())) / float(seconds)


def schedule(tree: TreeConfig, costs: CostTable, ratio: float) -> SizeSchedule:
    """The sizes by number of requests that Model Runner V2 follows, before anything is learned.

    Where it drafts nothing, the draft still reads what the target has written.
    """
    sizes = candidate_sizes(tree.num_nodes)
    points = []
    for batch in BATCHES:
        for nodes in sizes:
            rows = batch * (1 + nodes)
            depth = 1 + tree.shape.levels_for(nodes) if nodes else 1
            seconds = costs.step_seconds(batch, rows) + costs.draft_seconds(batch, rows, depth)
            points.append((batch, nodes, float(seconds)))
    prior = AcceptancePrior(by_depth=(ratio,))
    return SizeSchedule(tree, sizes, SizeCosts.of(points), BATCHES[-1], prior)


def followed(rule: SizeSchedule, batch: int, none: float) -> list[float]:
    """Speed-up over ``none`` tokens per second, and nodes of a request, by a schedule."""
    nodes = rule.table()[batch]
    rate = rule.rates()[batch - 1, rule.sizes.tolist().index(nodes)]
    return [round(float(rate) / none, 3), nodes]


def as_text(result: dict[str, Any]) -> str:
    """The rows as a table."""
    names = ["auto", *FIXED]
    stars = [f"{name}*, nodes" for name in FIXED]
    lines = [
        f"Speed-up over no speculation: {NOTE}. Launches hidden behind the GPU's work, or in turn.",
        f"{'':22}{'batch':>6} {'depth':>6} {'nodes':>6} "
        + " ".join([*(f"{n:>8}" for n in names), *(f"{n:>15}" for n in stars)]),
    ]
    for row in result["rows"]:
        where = (
            f"{row['model']} {row['device']} {'hidden' if row['launches_hidden'] else 'in turn'}"
        )
        figures = " ".join(
            [
                *(f"{row[name]:8.2f}" for name in names),
                *(f"{speed:11.2f}, {nodes:2}" for speed, nodes in row["schedule"].values()),
            ]
        )
        lines.append(f"{where:<30}{row['batch']:>4} {row['depth']:>6} {row['nodes']:>6} {figures}")
    return "\n".join(lines)


def plot(result: dict[str, Any], target: Path) -> None:
    """Speed-up by batch, a panel for each device and model; launches in turn."""
    figure = load_figure()(figsize=(9.5, 6.5), layout="constrained")
    panels = figure.subplots(len(DEVICES), len(MODELS), squeeze=False, sharex=True, sharey=True)
    for device, line in zip(DEVICES, panels, strict=True):
        for model, panel in zip(MODELS, line, strict=True):
            own = [r for r in result["rows"] if (r["model"], r["device"]) == (model, device)]
            slow = [r for r in own if not r["launches_hidden"]]
            for number, name in enumerate(["auto", *FIXED]):
                panel.plot(BATCHES, [r[name] for r in slow], color=f"C{number}", label=name,
                           linewidth=2.5 if name == "auto" else 1)  # fmt: skip
                if name in FIXED:
                    panel.plot(BATCHES, [r["schedule"][name][0] for r in slow], "--",
                               color=f"C{number}", label=f"{name}, by a schedule")  # fmt: skip
            panel.plot([*EAGLE_4], [*EAGLE_4.values()], "x", color="gray",
                       label="EAGLE-4, 27B on 4 B300 (its authors)")  # fmt: skip
            panel.axhline(1, color="black", linewidth=0.8)
            panel.set_xscale("log", base=2)
            panel.set_xticks(BATCHES, [str(batch) for batch in BATCHES])
            panel.set(title=f"{model}, {DEVICES[device].name}", ylim=(0, None))
            panel.grid(alpha=0.3)
    for panel in panels[-1]:
        panel.set_xlabel("requests decoding")
    for line in panels:
        line[0].set_ylabel("speed-up over none")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=5,
                  fontsize="small")  # fmt: skip
    figure.suptitle(f"Speed-up over no speculation: {NOTE}")
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target)


if __name__ == "__main__":
    sys.exit(main())
