"""Time tree attention, settling and the accepting walk on a GPU, beside what else there is.

    python benchmarks/bench_tree_attention.py                       # everything, about 10 minutes
    python benchmarks/bench_tree_attention.py --models llava-1.5-7b --batch 8 --context 4096
    python benchmarks/bench_tree_attention.py --only ours "ours, causal" --time-limit 120
    python benchmarks/bench_tree_attention.py --dry-run             # the cases and their bounds
    python benchmarks/bench_tree_attention.py --plot benchmarks/results/tree_attention_h200.json

Each result is checked before it is timed. Times are medians of CUDA graph replays; a graph goes
round as many caches as it takes to keep the L2 cache cold. Bandwidth is the bytes that have to be
moved at least, over the time, as a share of what a plain copy reaches on the same device. What
could not be measured stands in the result with the reason. Writes JSON and, where matplotlib is
installed, a plot beside it.
"""

import argparse
import datetime
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from tree_attention_problem import BLOCK_SIZE, MODELS, Case, Problem, random_parents
from tree_attention_rivals import CAUSAL, OURS, RIVALS

from vllm_msd.kernels import AcceptedPaths, LayerCaches, accept, settle

TARGET = Case("llava-1.5-7b", 8, 4096, 60)
PATH = (0, 3, 9, 20, 31, 50)  # an accepted path: five rows move
ROUNDS = 20  # places in the cache that settling goes round


def all_cases(args: argparse.Namespace) -> list[Case]:
    """The grid, the case of the bandwidth target first, then from small to large."""
    grid = itertools.product(args.models, args.batch, args.context, args.nodes)
    return sorted((Case(*c) for c in grid), key=lambda c: (c != TARGET, c.bytes))


def replay_time(calls: list[Callable], replays: int = 15) -> float:
    """Median seconds per call, all of them in one CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:2] * 2:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(replays + 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3 / len(calls))
    return statistics.median(times[3:])


def copy_bandwidth() -> float:
    """Bytes read and written per second by a copy of 2 GiB."""
    source = torch.empty(2**31, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / replay_time([lambda: target.copy_(source)])


def measure(name: str, case: Case, bandwidth: float) -> dict:
    """Check and time one contestant on one case; the row has a ``reason`` where that failed."""
    row = {"name": name, **asdict(case), "bytes": case.bytes}
    rival = RIVALS[name]
    try:
        problem = Problem.make(case)
        calls = rival.make(problem)
        error = problem.worst_error(calls[0](), rival.tree)
        row["error_over_rounding"] = round(error, 3)
        if error > 2:
            return row | {"reason": "wrong result"}
        seconds = replay_time(calls)
    # Whatever an alternative raises belongs into the record, and the others go on.
    except Exception as problem_found:
        return row | {"reason": f"{type(problem_found).__name__}: {problem_found}"[:400]}
    finally:
        problem = calls = None
        torch.cuda.empty_cache()
    share = case.bytes / seconds / bandwidth
    return row | {"microseconds": round(seconds * 1e6, 2), "share_of_copy": round(share, 4)}


def measure_settle(model: str, batch: int, bandwidth: float) -> dict:
    """One launch over all layers, five rows a request."""
    shape, context = MODELS[model], 1024
    blocks = -(-(context + ROUNDS * 64) // BLOCK_SIZE)
    layers = [
        torch.zeros(
            batch * blocks, shape.kv_heads, BLOCK_SIZE, 2 * shape.head_size,
            dtype=torch.bfloat16, device="cuda",
        )
        for _ in range(shape.layers)
    ]  # fmt: skip
    caches = LayerCaches.of([layer.transpose(1, 2) for layer in layers])
    table = torch.randperm(batch * blocks, device="cuda").view(batch, blocks).int()
    nodes = torch.full((batch, 64), -1, device="cuda")
    nodes[:, : len(PATH)] = torch.tensor(PATH)
    starts = [
        torch.full((batch,), context + 64 * i, dtype=torch.int32, device="cuda")
        for i in range(ROUNDS)
    ]
    seconds = replay_time([lambda s=s: settle(caches, table, s, nodes) for s in starts])
    row_bytes = shape.kv_heads * 2 * shape.head_size * 2
    moved = 2 * (len(PATH) - 1) * batch * shape.layers * row_bytes
    return {
        "name": "settle", "model": model, "batch": batch, "bytes": moved,
        "microseconds": round(seconds * 1e6, 2),
        "bound_microseconds": round(moved / bandwidth * 1e6, 2),
    }  # fmt: skip


def measure_accept(batch: int) -> dict:
    parents = torch.tensor([random_parents(61)] * batch, device="cuda")
    rows = torch.randint(0, 4, (2, batch * 61), device="cuda")
    starts = torch.arange(batch + 1, dtype=torch.int32, device="cuda") * 61
    out = AcceptedPaths.allocate(batch, 61, torch.device("cuda"))
    calls = [lambda: accept(rows[0], rows[1], parents, starts, out=out)] * 20
    return {
        "name": "accept",
        "batch": batch,
        "microseconds": round(replay_time(calls) * 1e6, 2),
    }


def summary(rows: list[dict]) -> dict:
    """The figures of the targets, from what was measured."""
    times: dict[tuple, dict[str, float]] = {}
    for row in rows:
        if "microseconds" in row:
            case = (row["model"], row["batch"], row["context"], row["nodes"])
            times.setdefault(case, {})[row["name"]] = row["microseconds"]
    measured = [t for t in times.values() if OURS in t]
    slower = [t[OURS] / t[CAUSAL] - 1 for t in measured if CAUSAL in t]
    contests = [(t[OURS], [v for n, v in t.items() if n not in (OURS, CAUSAL)]) for t in measured]
    contests = [(own, others) for own, others in contests if others]
    target = [
        r["share_of_copy"]
        for r in rows
        if r["name"] == OURS and "share_of_copy" in r
        if Case(r["model"], r["batch"], r["context"], r["nodes"]) == TARGET
    ]
    won = sum(own < min(others) for own, others in contests)
    return {
        "share_of_copy_at_target": target[0] if target else None,
        "masks_cost_median": round(statistics.median(slower), 4) if slower else None,
        "masks_cost_worst": round(max(slower), 4) if slower else None,
        "cases_with_alternatives": len(contests),
        "fastest_in": won,
        "fastest_share": round(won / len(contests), 4) if contests else None,
    }


def run(args: argparse.Namespace) -> dict:
    """Measure everything that the time allows: ours first, then the others with equal shares."""
    properties = torch.cuda.get_device_properties(0)
    bandwidth = copy_bandwidth()
    print(f"{properties.name}: copies at {bandwidth / 1e12:.2f} TB/s", flush=True)
    record = {
        "what": "seconds of one layer's attention by CUDA graph replay, median",
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "device": properties.name,
        "torch": torch.__version__,
        "copy_bytes_per_second": round(bandwidth),
        "summary": {},
        "settle": [measure_settle(m, b, bandwidth) for m in args.models for b in args.batch],
        "accept": [measure_accept(b) for b in args.batch],
        "attention": [],
    }
    cases, names = all_cases(args), [n for n in RIVALS if n in args.only]
    deadline = time.monotonic() + args.time_limit
    for position, name in enumerate(names):
        share = (deadline - time.monotonic()) / (len(names) - position)
        stop = time.monotonic() + share
        for case in cases:
            if time.monotonic() > stop:
                row = {"name": name, **asdict(case), "reason": "out of time"}
            else:
                row = measure(name, case, bandwidth)
                print(" ".join(f"{k}={v}" for k, v in row.items()), flush=True)
            record["attention"].append(row)
            if str(row.get("reason", "")).startswith(("ImportError", "ModuleNotFoundError")):
                row["cases"] = "all"  # not there at all: one line says so
                break
        record["summary"] = summary(record["attention"])
        args.out.write_text(json.dumps(record, indent=1) + "\n")
    return record


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
    target = path.with_suffix(".svg")
    figure.savefig(target)
    return target


def list_cases(args: argparse.Namespace) -> None:
    """The cases with the bounds that ``docs/kernels.md`` speaks of."""
    print("model batch context nodes MB GFLOP bandwidth_bound_us")
    for case in all_cases(args):
        bound = case.bytes / (args.bandwidth * 1e12) * 1e6
        print(
            case.model, case.batch, case.context, case.nodes, f"{case.bytes / 1e6:.1f}",
            f"{case.operations / 1e9:.1f}", f"{bound:.1f}",
        )  # fmt: skip


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    grid = parser.add_argument_group("cases (every combination)")
    grid.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    grid.add_argument("--batch", nargs="+", type=int, default=[1, 8, 32, 64])
    grid.add_argument("--context", nargs="+", type=int, default=[256, 1024, 4096, 8192])
    grid.add_argument("--nodes", nargs="+", type=int, default=[1, 24, 60, 63], help="1 to 63")
    parser.add_argument("--only", nargs="+", choices=RIVALS, default=list(RIVALS))
    parser.add_argument("--time-limit", type=float, default=540, help="seconds for attention")
    parser.add_argument("--out", type=Path, help="JSON (default: by device, in benchmarks/results)")
    parser.add_argument("--plot", type=Path, metavar="JSON", help="only draw a result")
    parser.add_argument("--dry-run", action="store_true", help="only list the cases")
    parser.add_argument(
        "--bandwidth", type=float, default=4.3, help="TB/s for --dry-run (default: an H200's copy)"
    )
    args = parser.parse_args(argv)
    if not all(1 <= n <= 63 for n in args.nodes):
        parser.error("--nodes: expected 1 to 63, a tree has at most 64 slots with its root")
    if min(*args.batch, *args.context, 1) < 1:
        parser.error("--batch and --context: expected at least 1")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the script."""
    args = parse(argv)
    if args.dry_run:
        list_cases(args)
        return 0
    if args.plot is None:
        if not torch.cuda.is_available():
            print(
                "error: no CUDA device. --dry-run lists the cases, benchmarks/compile_check.py "
                "compiles the kernels without one.",
                file=sys.stderr,
            )
            return 2
        device = torch.cuda.get_device_name().lower().removeprefix("nvidia ").replace(" ", "_")
        args.out = args.out or Path(__file__).parent / "results" / f"tree_attention_{device}.json"
        record = run(args)
        print(json.dumps(record["summary"], indent=1))
    try:
        print(plot(args.plot or args.out))
    except ImportError as error:
        print(f"no plot: {error}. Install it with pip install 'vllm-msd[bench]'.", file=sys.stderr)
        return 2 if args.plot else 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
