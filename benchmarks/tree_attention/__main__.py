"""Time tree attention, settling and the accepting walk on a GPU, beside what else there is.

    python -m benchmarks.tree_attention                         # everything, under 9 minutes
    python -m benchmarks.tree_attention --models llava-1.5-7b --batch 8 --context 4096
    python -m benchmarks.tree_attention --only ours "ours, causal" --time-limit 120
    python -m benchmarks.tree_attention --dry-run               # the cases and their bounds
    python -m benchmarks.tree_attention --plot benchmarks/results/tree_attention_h200.json
    python -m benchmarks.tree_attention --tiny --out tiny.json  # a rehearsal, no GPU

PyTorch and Triton are all it needs, from a clone that need not be installed. Each result is checked
before it is timed. Times are medians of CUDA graph replays; a graph goes round as many caches as it
takes to keep the L2 cache cold. Bandwidth is the bytes that have to be moved at least, over the
time, as a share of what a plain copy reaches on the same device. The case of the targets comes
first, the others in a fixed random order, so that a run that ends early has seen all kinds of them.
What could not be measured stands in the result with the reason. Writes JSON after every case and,
where matplotlib is installed, a plot (PNG) beside it; prints whether the targets are met.

--tiny goes the same way with small shapes on a CPU, the kernels in Triton's interpreter and calls
by the clock. It proves that the script works; its times mean nothing.
"""

import argparse
import datetime
import itertools
import json
import os
import random
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch

from vllm_msd.kernels import AcceptedPaths, LayerCaches, accept, settle
from vllm_msd.kernels.accept.eager import accept_eager
from vllm_msd.kernels.settle.eager import settle_eager
from vllm_msd.provenance import command_line

from .problem import BLOCK_SIZE, MODELS, TINY, Case, Problem, random_parents
from .record import TARGET, criteria, describe, plot, summary
from .rivals import CAUSAL, OURS, RIVALS
from .timing import copy_bandwidth, seconds_per_call, versions

START = time.monotonic()
RIVAL_SHARE = 0.25  # of the time limit that one alternative may use, compiling included
PATH = (0, 3, 9, 20, 31, 50)  # an accepted path: five rows move
COLD_BYTES = 256 * 2**20  # that settling moves before it comes back to the same rows
TINY_TARGET = Case(TINY, 3, 100, 12)


def all_cases(args: argparse.Namespace) -> list[Case]:
    """The grid, the case of the targets first."""
    grid = itertools.product(args.models, args.batch, args.context, args.nodes)
    cases = sorted((Case(*c) for c in grid), key=lambda c: c.bytes)
    random.Random(0).shuffle(cases)
    return sorted(cases, key=lambda c: c != args.target)


def measure(name: str, problem: Problem, bandwidth: float) -> dict:
    """Check and time one contestant on one case; the row has a ``reason`` where that failed."""
    case, rival = problem.case, RIVALS[name]
    row = {"name": name, **asdict(case), "bytes": case.bytes}
    try:
        calls = rival.make(problem)
        error = problem.worst_error(calls[0](), rival.tree)
        row["error_over_rounding"] = round(error, 3)
        if error > 2:
            return row | {"reason": "wrong result"}
        seconds = seconds_per_call(calls, problem.q.device.type)
    # Whatever an alternative raises belongs into the record, and the others go on.
    except Exception as problem_found:
        return row | {"reason": f"{type(problem_found).__name__}: {problem_found}"[:400]}
    share = case.bytes / seconds / bandwidth
    return row | {"microseconds": round(seconds * 1e6, 2), "share_of_copy": round(share, 4)}


def measure_settle(model: str, batch: int, bandwidth: float, device: str) -> dict:
    """One launch over all layers, five rows a request; the first and the last layer are checked."""
    shape, context = MODELS[model], 5
    row_bytes = shape.kv_heads * 2 * shape.head_size * 2
    moved = 2 * (len(PATH) - 1) * batch * shape.layers * row_bytes
    row = {"name": "settle", "model": model, "batch": batch, "bytes": moved}
    rounds = max(2, min(20, -(-COLD_BYTES // moved)))
    blocks = -(-(context + rounds * 64) // BLOCK_SIZE)
    try:
        layers = [
            torch.randn(
                batch * blocks, shape.kv_heads, BLOCK_SIZE, 2 * shape.head_size,
                dtype=torch.bfloat16, device=device,
            )
            for _ in range(shape.layers)
        ]  # fmt: skip
        caches = LayerCaches.of([layer.transpose(1, 2) for layer in layers])
        table = torch.randperm(batch * blocks, device=device).view(batch, blocks).int()
        nodes = torch.full((batch, 64), -1, device=device)
        nodes[:, : len(PATH)] = torch.tensor(PATH)
        starts = [
            torch.full((batch,), context + 64 * i, dtype=torch.int32, device=device)
            for i in range(rounds)
        ]
        ends = (layers[0], layers[-1])
        expected = [layer.clone() for layer in ends]
        settle_eager([layer.transpose(1, 2) for layer in expected], table, starts[0], nodes)
        settle(caches, table, starts[0], nodes)
        if not all(map(torch.equal, ends, expected)):
            return row | {"reason": "wrong result"}
        calls = [lambda s=s: settle(caches, table, s, nodes) for s in starts]
        seconds = seconds_per_call(calls, device)
    except RuntimeError as problem_found:
        return row | {"reason": f"{type(problem_found).__name__}: {problem_found}"[:400]}
    return row | {
        "microseconds": round(seconds * 1e6, 2),
        "bound_microseconds": round(moved / bandwidth * 1e6, 2),
    }


def measure_accept(batch: int, device: str) -> dict:
    row = {"name": "accept", "batch": batch}
    parents = torch.tensor([random_parents(61)] * batch, device=device)
    rows = torch.randint(0, 4, (2, batch * 61), device=device)
    starts = torch.arange(batch + 1, dtype=torch.int32, device=device) * 61
    out, expected = (AcceptedPaths.allocate(batch, 61, torch.device(device)) for _ in range(2))
    accept(rows[0], rows[1], parents, starts, out=out)
    accept_eager(rows[0], rows[1], parents, starts, expected)
    if not all(map(torch.equal, out, expected)):
        return row | {"reason": "wrong result"}
    calls = [lambda: accept(rows[0], rows[1], parents, starts, out=out)] * 20
    return row | {"microseconds": round(seconds_per_call(calls, device) * 1e6, 2)}


def run(args: argparse.Namespace) -> dict:
    """Measure what the time allows, case by case, everything there is on each."""
    device = "cpu" if args.tiny else "cuda"
    name = "a CPU and Triton's interpreter" if args.tiny else torch.cuda.get_device_name()
    bandwidth = copy_bandwidth(device)
    print(f"{name}: copies at {bandwidth / 1e12:.4f} TB/s", flush=True)
    record = {
        "what": "one layer's attention and one settling of all layers, median microseconds",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": command_line(),
        "device": name,
        "versions": versions(),
        "copy_bytes_per_second": round(bandwidth),
        "criteria": [],
        "summary": {},
        "settle": [
            measure_settle(m, b, bandwidth, device) for m in args.models for b in args.batch
        ],
        "accept": [measure_accept(b, device) for b in args.batch],
        "attention": [],
    }
    for row in record["settle"] + record["accept"]:
        show(row)
    cases, spent = all_cases(args), dict.fromkeys([n for n in RIVALS if n in args.only], 0.0)
    absent: set[str] = set()
    size = {"dtype": torch.float16, "max_copies": 2} if args.tiny else {}
    for position, case in enumerate(cases):
        if time.monotonic() - START > args.time_limit:
            reason = f"out of time: {len(cases) - position} of {len(cases)} cases are not measured"
            record["stopped"] = reason
            print(reason, flush=True)
            break
        problem = Problem.make(case, device, **size)
        for rival in spent:
            if rival in absent:
                continue
            begin = time.monotonic()
            may_stop = rival not in (OURS, CAUSAL)
            if may_stop and spent[rival] > RIVAL_SHARE * args.time_limit:
                row = {"name": rival, **asdict(case), "reason": "out of its share of the time"}
            else:
                row = measure(rival, problem, bandwidth)
            spent[rival] += time.monotonic() - begin
            if str(row.get("reason", "")).startswith(("ImportError", "ModuleNotFoundError")):
                row["cases"] = "all"  # not there at all: one line says so
                absent.add(rival)
            record["attention"].append(row)
            show(row)
        problem = None
        if device == "cuda":
            torch.cuda.empty_cache()
        record["summary"] = summary(record, args.target)
        record["criteria"] = criteria(record["summary"], args.target)
        args.out.write_text(json.dumps(record, indent=1) + "\n")
    return record


def show(row: dict) -> None:
    print(" ".join(f"{k}={v}" for k, v in row.items()), flush=True)


def list_cases(args: argparse.Namespace) -> None:
    """The cases with the bounds that ``docs/kernels.md`` speaks of."""
    print("model batch context nodes MB GFLOP bandwidth_bound_us")
    for case in sorted(all_cases(args), key=lambda c: (c != args.target, c.bytes)):
        bound = case.bytes / (args.bandwidth * 1e12) * 1e6
        print(
            case.model, case.batch, case.context, case.nodes, f"{case.bytes / 1e6:.1f}",
            f"{case.operations / 1e9:.1f}", f"{bound:.1f}",
        )  # fmt: skip


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tree_attention",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    grid = parser.add_argument_group("cases (every combination)")
    models = [m for m in MODELS if m != TINY]
    grid.add_argument("--models", nargs="+", choices=models, default=models)
    grid.add_argument("--batch", nargs="+", type=int, default=[1, 8, 32, 64])
    grid.add_argument("--context", nargs="+", type=int, default=[256, 1024, 4096, 8192])
    grid.add_argument("--nodes", nargs="+", type=int, default=[1, 24, 60, 63], help="1 to 63")
    parser.add_argument("--only", nargs="+", choices=RIVALS, default=list(RIVALS))
    parser.add_argument(
        "--time-limit", type=float, default=480, metavar="SECONDS",
        help="no case is begun later than this after the start (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, help="JSON (default: by device, in benchmarks/results)")
    parser.add_argument("--plot", type=Path, metavar="JSON", help="only draw a result")
    parser.add_argument("--dry-run", action="store_true", help="only list the cases")
    parser.add_argument("--tiny", action="store_true", help="rehearse on a CPU; needs --out")
    parser.add_argument(
        "--bandwidth", type=float, default=4.3, help="TB/s for --dry-run (default: an H200's copy)"
    )
    args = parser.parse_args(argv)
    args.target = TARGET
    if args.tiny:
        if args.out is None and not args.dry_run:
            parser.error("--tiny: give --out, its record is no result to keep")
        args.models, args.batch, args.context, args.nodes = [TINY], [1, 3], [100], [1, 12]
        args.target = TINY_TARGET
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
    wrong = False
    if args.plot is None:
        if args.tiny:
            os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton
        elif not torch.cuda.is_available():
            print(
                "error: no CUDA device. --dry-run lists the cases, --tiny rehearses on a CPU, "
                "benchmarks/compile_check.py compiles the kernels without a GPU.",
                file=sys.stderr,
            )
            return 2
        else:
            device = torch.cuda.get_device_name().lower().removeprefix("nvidia ").replace(" ", "_")
            results = Path(__file__).parents[1] / "results"
            args.out = args.out or results / f"tree_attention_{device}.json"
        record = run(args)
        print(json.dumps(record["summary"], indent=1))
        print(*map(describe, record["criteria"]), sep="\n")
        print(f"{args.out}, after {time.monotonic() - START:.0f} s")
        own = [r for r in record["attention"] if r["name"] in (OURS, CAUSAL)]
        own += record["settle"] + record["accept"]
        wrong = any(r.get("reason") == "wrong result" for r in own)
        if wrong:
            print("error: a kernel of ours gave a wrong result", file=sys.stderr)
    try:
        print(plot(args.plot or args.out))
    except ImportError as error:
        print(f"no plot: {error}. Install it with pip install 'vllm-msd[bench]'.", file=sys.stderr)
        return 2 if args.plot else int(wrong)
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
