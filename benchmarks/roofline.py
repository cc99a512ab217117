"""Predict serving under MSD by arithmetic: step times and speed-ups over no speculation. No GPU.

    python benchmarks/roofline.py
    python benchmarks/roofline.py --models qwen2-vl-7b --draft-vocab 32000 --batches 1 8 64
    python benchmarks/roofline.py --output roofline.json --plot roofline.png
    python benchmarks/roofline.py --scratch      # memory of drafting and verification

A part of a step takes the longer of its bytes over the bandwidth and its operations over the matrix
units' rate (vllm_msd/roofline). "GPU alone" is that, a bound from below; the other columns add
launches, with trees issued by Python level by level ("eager"), replayed as one graph ("graph") or
with fused kernels in it ("fused"). They are ranges: from launches hidden behind the GPU's work to
the GPU waiting for every one. Tokens per verification, launches and their costs are assumptions;
vllm_msd/roofline/launches.py says where they come from.
"""

import argparse
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from vllm_msd.errors import ConfigError, MSDError
from vllm_msd.roofline.launches import COSTS, LAUNCHES, STAGES, LaunchCosts, read
from vllm_msd.roofline.scratch import drafting_bytes, verification_bytes
from vllm_msd.roofline.shapes import DEVICES, SHAPES, free_rows
from vllm_msd.roofline.step import ARMS, Arm, Prediction, predict

ROOT = Path(__file__).resolve().parents[1]
COUNTED = ROOT / "benchmarks" / "results" / "launches.json"
SPECULATING = ARMS[1:]
MAX_BATCH = 256
SCRATCH_REQUESTS = 1024  # vLLM's default max_num_seqs on a large GPU
SCRATCH_TOKENS = 8192  # and its max_num_batched_tokens
NOTE = "arithmetic, not measured"


def main() -> int:
    """Run the script."""
    args = parse()
    from vllm_msd.provenance import provenance

    try:
        launches = LAUNCHES if args.launches is None else read(args.launches)
        if args.plot:
            load_figure()
    except MSDError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    costs = LaunchCosts(args.eager_us / 1e6, args.graph_us / 1e6)
    result: dict[str, Any] = {"note": NOTE}
    result |= provenance(
        **{key: value for key, value in vars(args).items() if key not in ("output", "plot")}
        | {"launches": _named(args.launches or ROOT / "vllm_msd" / "roofline" / "launches.py")}
    )
    result["launches"] = {kind: asdict(counts) for kind, counts in launches.items()}
    result["devices"] = {
        name: asdict(DEVICES[name]) | {"free_rows": round(free_rows(DEVICES[name]))}
        for name in args.devices
    }
    result["steps"] = [
        row
        for device in args.devices
        for model in args.models
        for batch in args.batches
        for row in step_rows(args, model, device, batch, launches, costs)
    ]
    result["scratch"] = [row for model in args.models for row in scratch_rows(args, model)]
    print(as_text(result, args.stages))
    if args.scratch:
        print(scratch_text(result["scratch"]))
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=1) + "\n")
    if args.plot:
        plot(result, args.stages, args.plot)
    return 0


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--models", nargs="+", choices=SHAPES, default=list(SHAPES), metavar="MODEL",
        help=f"of {', '.join(SHAPES)}")  # fmt: skip
    add("--devices", nargs="+", choices=DEVICES, default=list(DEVICES), metavar="DEVICE",
        help=f"of {', '.join(DEVICES)}")  # fmt: skip
    add("--batches", nargs="+", type=_count, default=[1, 8, 32, 64],
        help=f"requests decoding, at most {MAX_BATCH} (default: 1 8 32 64)")  # fmt: skip
    add("--context", type=_count, default=1000, help="tokens of a request (default: %(default)s)")
    add("--stages", nargs="+", choices=STAGES, default=["eager", "fused"], metavar="STAGE",
        help=f"of trees' launches: {', '.join(STAGES)} (default: eager fused)")  # fmt: skip
    add("--tokens", nargs=len(SPECULATING), type=float, default=[a.tokens for a in SPECULATING],
        help=f"per verification of {', '.join(a.name for a in SPECULATING)} "
        "(default: %(default)s)")  # fmt: skip
    add("--draft-vocab", type=_count, help="words of a draft's own head (default: the target's)")
    add("--compact-prefill", action="store_true",
        help="the draft's prefill has depth + 1 rows a request, not all verified ones")  # fmt: skip
    add("--launches", type=Path, default=COUNTED if COUNTED.is_file() else None,
        help=f"JSON with counts (default: {COUNTED.name} in results/ if there is one)")  # fmt: skip
    add("--eager-us", type=float, default=COSTS.eager * 1e6,
        help="microseconds a launch from Python (default: %(default).1f)")  # fmt: skip
    add("--graph-us", type=float, default=COSTS.graph * 1e6,
        help="microseconds a kernel in a graph adds (default: %(default).1f)")  # fmt: skip
    add("--scratch", action="store_true", help="also print memory, see vllm_msd/roofline/scratch")
    add("--output", type=Path, help="write everything as JSON")
    add("--plot", type=Path, help="write speed-ups by batch as PNG (needs matplotlib)")
    args = parser.parse_args()
    args.batches = sorted(set(args.batches))
    if args.batches[-1] > MAX_BATCH:
        parser.error(f"--batches: got {args.batches[-1]}, expected at most {MAX_BATCH}")
    return args


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number from 1 on")
    return int(text)


def _named(path: Path) -> str:
    """As the repository calls it; elsewhere its name alone."""
    path = path.resolve()
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name


def step_rows(args, model: str, device: str, batch: int, launches, costs) -> list[dict[str, Any]]:
    """A row for each of `ARMS`, the one without speculation first."""
    arms = [ARMS[0], *(replace(a, tokens=t) for a, t in zip(SPECULATING, args.tokens, strict=True))]

    def predicted(arm: Arm, stage: str) -> Prediction:
        return predict(
            SHAPES[model], DEVICES[device], arm, batch, context=args.context, stage=stage,
            draft_vocab=args.draft_vocab, compact_prefill=args.compact_prefill,
            launches=launches, costs=costs,
        )  # fmt: skip

    rows = []
    for arm in arms:
        one = {stage: predicted(arm, stage) for stage in args.stages}
        plain = {stage: predicted(arms[0], stage) for stage in args.stages}
        last = args.stages[-1]
        row = {"model": model, "device": device, "batch": batch, "drafted": arm.name,
               "rows": arm.rows * batch, "tokens": arm.tokens,
               "gpu_alone": _figures(one[last], one[last].bound, plain[last].bound)}  # fmt: skip
        row["gpu_alone"]["parts_ms"] = {k: round(v * 1e3, 4) for k, v in one[last].parts.items()}
        for stage in args.stages:
            row[stage] = {
                name: _figures(one[stage], *(x.seconds(hidden=hidden) for x in
                                             (one[stage], plain[stage])))
                for name, hidden in (("hidden", True), ("in_turn", False))
            }  # fmt: skip
        rows.append(row)
    return rows


def _figures(prediction: Prediction, seconds: float, plain: float) -> dict[str, float]:
    rate = prediction.rate(seconds)
    return {"ms": round(seconds * 1e3, 3), "tokens_per_second": round(rate, 1),
            "speedup": round(rate * plain, 3)}  # fmt: skip


def scratch_rows(args, model: str) -> list[dict[str, Any]]:
    """Bytes of drafting and verification at `SCRATCH_REQUESTS`, for each arm that drafts."""
    shape = SHAPES[model]
    limits = {"requests": SCRATCH_REQUESTS, "max_tokens": SCRATCH_TOKENS}
    return [
        {
            "model": model,
            "drafted": arm.name,
            **limits,
            "vocab": shape.vocab,
            "drafting": drafting_bytes(
                tree=arm.drafting,
                vocab=args.draft_vocab or shape.vocab,
                hidden=shape.hidden,
                **limits,
            ),
            "verification_logits": verification_bytes(
                nodes=arm.rows - 1, vocab=shape.vocab, **limits
            ),
        }
        for arm in SPECULATING
    ]


def as_text(result: dict[str, Any], stages: list[str]) -> str:
    """The tables, one for each device and model."""
    lines, seen = [f"Step times and speed-ups: {NOTE}."], None
    for row in result["steps"]:
        if (row["device"], row["model"]) != seen:
            seen = row["device"], row["model"]
            device = result["devices"][row["device"]]
            heading = f"{'batch':>5}  {'drafted':<8}{'rows':>6}{'tokens':>8}{'GPU alone':>18}"
            lines += [
                "",
                f"{row['model']}, {device['name']} ({device['bandwidth'] / 1e12:.1f} TB/s, "
                f"{device['flops'] / 1e12:.0f} TFLOP/s; about {device['free_rows']} rows free), "
                f"context {result['settings']['context']}",
                heading + "".join(f"{stage:>27}" for stage in stages),
            ]
        alone = row["gpu_alone"]
        line = f"{row['batch']:>5}  {row['drafted']:<8}{row['rows']:>6}{row['tokens']:>8.2f}"
        line += f"{alone['ms']:>9.2f} ms {alone['speedup']:>4.2f}x"
        for stage in stages:
            ms, times = (
                "-".join(dict.fromkeys(format(n, form) for n in sorted(one[key] for one in
                                                                       row[stage].values())))
                for key, form in (("ms", ".1f"), ("speedup", ".2f"))
            )  # fmt: skip
            line += f"{ms:>13} ms {times:>9}x"
        lines.append(line)
    return "\n".join(lines)


def scratch_text(rows: list[dict[str, Any]]) -> str:
    """GB of the large tensors, for as many requests and tokens as vLLM allows by default."""
    lines = [
        "",
        f"Memory in GB with {SCRATCH_REQUESTS} requests, {SCRATCH_TOKENS} tokens a step",
        f"{'model':<15}{'drafted':<10}{'drafting':>10}{'verification logits':>22}",
    ]
    for row in rows:
        drafting = sum(row["drafting"].values()) / 1e9
        lines.append(
            f"{row['model']:<15}{row['drafted']:<10}{drafting:>10.3f}"
            f"{row['verification_logits'] / 1e9:>22.2f}"
        )
    return "\n".join(lines)


def load_figure():
    """matplotlib's `Figure`; ConfigError where it is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(
            "--plot needs matplotlib, which is not installed: pip install matplotlib, or leave "
            "--plot out."
        ) from error
    return Figure


def plot(result: dict[str, Any], stages: list[str], target: Path) -> None:
    """Speed-up by batch, a panel for each device and model.

    Dotted: the GPU alone. Filled: the ranges with launches, of the last stage darker; a chain's
    launches are the same in all stages.
    """
    devices, models = (
        list(dict.fromkeys(row[key] for row in result["steps"])) for key in ("device", "model")
    )
    batches = list(dict.fromkeys(row["batch"] for row in result["steps"]))
    size = (4 * len(models) + 1.5, 3.4 * len(devices))
    figure = load_figure()(figsize=size, layout="constrained")
    panels = figure.subplots(len(devices), len(models), squeeze=False, sharex=True, sharey=True)
    for device, line in zip(devices, panels, strict=True):
        for model, panel in zip(models, line, strict=True):
            for number, arm in enumerate(SPECULATING):
                rows = [row for row in result["steps"] if (row["device"], row["model"],
                        row["drafted"]) == (device, model, arm.name)]  # fmt: skip
                alone = [row["gpu_alone"]["speedup"] for row in rows]
                panel.plot(batches, alone, ":", color=f"C{number}", label=f"{arm.name}, GPU alone")
                for stage in stages[-1:] if arm.drafting.is_chain else stages:
                    edges = [[row[stage][k]["speedup"] for row in rows]
                             for k in ("hidden", "in_turn")]  # fmt: skip
                    label = arm.name if arm.drafting.is_chain else f"{arm.name}, {stage}"
                    alpha = 0.5 if stage == stages[-1] else 0.2
                    panel.fill_between(batches, *edges, color=f"C{number}", alpha=alpha,
                                       label=label)  # fmt: skip
            panel.axhline(1, color="black", linewidth=0.8)
            panel.set_xscale("log", base=2)
            panel.set_xticks(batches, [str(batch) for batch in batches])
            panel.set(title=f"{model}, {DEVICES[device].name}", ylim=(0, None))
            panel.grid(alpha=0.3)
    for panel in panels[-1]:
        panel.set_xlabel("requests decoding")
    for line in panels:
        line[0].set_ylabel("speed-up over none")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside right center",
                  fontsize="small")  # fmt: skip
    figure.suptitle(f"Speed-up over no speculation: {NOTE}")
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=130)


if __name__ == "__main__":
    sys.exit(main())
