"""Time the kernels that grow a tree on a GPU, beside the same in PyTorch's operations.

    python -m benchmarks.tree_growth                                  # a minute or two
    python -m benchmarks.tree_growth --models llava-1.5-7b --batch 1
    python -m benchmarks.tree_growth --tiny --out tiny.json           # a rehearsal, no GPU

PyTorch and Triton are all it needs, from a clone that need not be installed. Four things are
timed: the best tokens of one level's rows, a whole growth without its draft (the logits are the
same at every level), laying the trees over the rows of the target's step, and laying out the
draft's rows along accepted paths. Each result is compared with the definition's before it is
timed. Times are medians of CUDA graph replays, for both sides, so the launches that PyTorch's
operations cost without a graph come on top of theirs; the logits go round as many buffers as it
takes to keep the L2 cache cold. Writes JSON.

--tiny goes the same way with small shapes on a CPU, the kernels in Triton's interpreter.
"""

import argparse
import datetime
import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from benchmarks.tree_attention.__main__ import copy_bandwidth, seconds_per_call, versions
from vllm_msd.kernels import (
    DraftPlace,
    LevelInputs,
    PrefillRows,
    TopK,
    Verified,
    allocate_parts,
    draft_prefill,
    place_trees,
    top_k,
)
from vllm_msd.provenance import command_line
from vllm_msd.tree import (
    DraftTree,
    GrowthBuffers,
    TreeShape,
    grow_tree,
    grow_tree_fused,
    path_index,
)

COLD_BYTES = 256 * 2**20
# Columns of the head and width of a hidden row.
MODELS = {"llava-1.5-7b": (32064, 4096), "qwen2-vl-7b": (152064, 3584), "tiny": (500, 40)}
TREES = {
    "24 nodes, depth 5, top-k 4": TreeShape(25, depth=4, top_k=4),
    "60 nodes, depth 6, top-k 10": TreeShape(61, depth=5, top_k=10),
    "tiny": TreeShape(8, depth=2, top_k=2),
}


def compare(
    name: str, ours: list[Callable], definition: list[Callable], same: Callable, device: str
) -> dict:
    """Microseconds of both; the row has a ``reason`` where something failed."""
    row: dict = {"name": name}
    try:
        if not same(ours[0](), definition[0]()):
            return row | {"reason": "wrong result"}
        row["microseconds"] = round(seconds_per_call(ours, device) * 1e6, 2)
        row["pytorch_microseconds"] = round(seconds_per_call(definition, device) * 1e6, 2)
    except RuntimeError as problem:
        row["reason"] = f"{type(problem).__name__}: {problem}"[:400]
    return row


def distinct_logits(rows: int, columns: int, device: str, seed: int) -> torch.Tensor:
    """bfloat16 whose best 32 of a row differ, so that ties decide nothing."""
    g = torch.Generator(device).manual_seed(seed)
    logits = torch.rand(rows, columns, generator=g, device=device)
    order = torch.rand(rows, columns, generator=g, device=device).argsort(1)[:, :32]
    steps = torch.arange(32, device=device) / 8 + 3
    noise = torch.rand(rows, 1, generator=g, device=device).round(decimals=1)
    return logits.scatter(1, order, (steps + noise).expand(rows, 32)).bfloat16()


def measure_top_k(rows: int, columns: int, k: int, bandwidth: float, device: str) -> dict:
    """One level's rows, against log-softmax and top-k in float32."""
    copies = max(2, min(20, -(-COLD_BYTES // (rows * columns * 2)))) if device == "cuda" else 1
    logits = [distinct_logits(rows, columns, device, seed) for seed in range(copies)]
    parts = allocate_parts(rows, columns, k, torch.device(device))
    out = TopK.allocate(rows, k, torch.device(device))
    row = compare(
        "top-k",
        [lambda x=x: top_k(x, k, parts=parts, out=out) for x in logits],
        [lambda x=x: torch.log_softmax(x.float(), -1).topk(k) for x in logits],
        lambda ours, expected: (
            torch.equal(ours.tokens.long(), expected.indices)
            and torch.allclose(ours.log_probs, expected.values, atol=1e-4)
        ),
        device,
    )
    moved = rows * columns * 2
    return row | {"bytes": moved, "bound_microseconds": round(moved / bandwidth * 1e6, 2)}


def measure_growth(shape: TreeShape, batch: int, columns: int, hidden: int, device: str) -> dict:
    """All levels, the draft replaced by logits and hidden rows that are there already."""
    k, rows = shape.top_k, batch * shape.top_k
    # Other logits at every level, or paths through the same rows in another order would tie.
    logits = [distinct_logits(rows, columns, device, seed) for seed in range(shape.depth + 1)]
    out = torch.randn(rows, hidden, dtype=torch.bfloat16, device=device)
    root = (logits[0][:batch].contiguous(), out[:batch].clone())
    integers = torch.zeros(rows, dtype=torch.int32, device=device)
    inputs = LevelInputs(
        integers, integers.long(), integers.long(), integers.clone(), torch.empty_like(out)
    )
    slots = torch.arange(batch, device=device)
    blocks = torch.arange(batch * 8, dtype=torch.int32, device=device).view(batch, 8)
    place = DraftPlace(torch.full((batch,), 9, device=device), slots, blocks, 16, 128)
    buffers = GrowthBuffers.allocate(shape, batch, columns, torch.device(device))
    relations = torch.zeros(3, batch + 1, shape.total_tokens, dtype=torch.int64, device=device)
    drafts = torch.zeros(batch, shape.total_tokens - 1, dtype=torch.int64, device=device)

    def fused() -> DraftTree:
        levels = iter(logits[1:])
        grow_tree_fused(
            *root, lambda *_: (next(levels), out), buffers, inputs, place, tuple(relations), drafts
        )
        return drafts

    def definition() -> DraftTree:
        levels = iter(logits[1:])
        return grow_tree(
            slots,
            root[0],
            root[1],
            lambda *_: (next(levels).view(batch, k, -1), out.view(batch, k, -1)),
            shape,
        )

    def same(_: torch.Tensor, tree: DraftTree) -> bool:
        expected = (tree.parents, tree.depths, tree.ancestors)
        return torch.equal(drafts, tree.tokens[:, 1:]) and all(
            torch.equal(found[:batch], e) for found, e in zip(relations, expected, strict=True)
        )

    row = compare("growth", [fused] * 5, [definition] * 5, same, device)
    return row | {"launches": 3 * (shape.depth + 1) + 1}


def measure_placing(nodes: int, batch: int, device: str) -> dict:
    """A step in which every request verifies its tree, against the operations of one launch each"""
    parents = torch.randint(0, 10**6, (batch, nodes), device=device) % torch.arange(
        1, nodes + 1, device=device
    ).roll(1)
    parents[:, 0] = -1
    tree = DraftTree.from_parents(parents, parents, check=False)
    slots = torch.arange(batch, device=device)
    starts = torch.arange(batch + 1, dtype=torch.int32, device=device) * nodes
    rows, node = batch * nodes, torch.arange(nodes, device=device).repeat(batch)
    slot_of, row_of = slots.repeat_interleave(nodes), torch.arange(rows, device=device)
    linear = row_of + 1000
    lengths = torch.full((batch,), 2000, dtype=torch.int32, device=device)
    written = {
        "tree_start": torch.zeros(batch, dtype=torch.int32, device=device),
        "root_rows": torch.zeros(batch, dtype=torch.int64, device=device),
        "row_ancestors": torch.zeros(rows, dtype=torch.int64, device=device),
        "positions": torch.zeros(rows, dtype=torch.int64, device=device),
        "shifts": torch.zeros(rows, dtype=torch.int64, device=device),
    }
    twin = {name: torch.zeros_like(t) for name, t in written.items()}
    arguments = (tree.depths, tree.ancestors, slots, starts, starts, lengths, linear)

    def operations() -> None:
        count = starts.diff()
        twin["tree_start"].fill_(-1)
        twin["tree_start"][:batch] = torch.where(count > 1, lengths - count, -1)
        twin["row_ancestors"][row_of] = tree.ancestors[slot_of, node]
        twin["root_rows"].copy_(starts[1:] - count)
        twin["shifts"].copy_(tree.depths[slot_of, node] - node)
        twin["positions"].copy_(linear)
        twin["positions"][row_of] += twin["shifts"]

    return compare(
        "placing",
        [lambda: place_trees(*arguments, **written)] * 20,
        [operations] * 20,
        lambda *_: all(torch.equal(written[name], twin[name]) for name in written),
        device,
    )


def measure_prefill(width: int, nodes: int, batch: int, hidden_size: int, device: str) -> dict:
    """Rows along accepted paths, against PyTorch's gathers over all rows of the step."""
    path = torch.arange(width - 1, device=device) * (nodes // width)
    accepted = torch.full((batch, nodes), -1, device=device)
    accepted[:, : width - 1] = path
    roots = torch.arange(batch, device=device) * nodes
    rows = batch * nodes
    hidden = torch.randn(rows, hidden_size, device=device).bfloat16()
    tokens = torch.arange(rows, dtype=torch.int32, device=device)
    step = Verified(
        accepted, roots, torch.full((batch,), 64, dtype=torch.int32, device=device),
        torch.arange(batch, device=device), tokens, hidden,
        torch.zeros(batch, 1, dtype=torch.int64, device=device),
    )  # fmt: skip
    table = torch.arange(batch * 16, dtype=torch.int32, device=device).view(batch, 16)
    zeros = partial(torch.zeros, device=device)
    inputs = LevelInputs(
        zeros(rows, dtype=torch.int32), zeros(rows, dtype=torch.int64),
        zeros(rows, dtype=torch.int64), zeros(batch, dtype=torch.int32),
        torch.zeros_like(hidden),
    )  # fmt: skip
    places = PrefillRows(
        zeros(batch + 1, dtype=torch.int32), zeros(batch, dtype=torch.int64),
        zeros(batch, dtype=torch.int64),
    )  # fmt: skip
    twin, twin_ids = torch.zeros_like(hidden), torch.zeros_like(tokens)

    def operations() -> None:
        index = path_index(roots, accepted, rows)
        twin_ids.copy_(tokens[index])
        twin.copy_(hidden[index])

    def same(*_: object) -> bool:
        mine = inputs.hidden[: batch * width].view(batch, width, -1)[:, : width - 1]
        theirs = twin.view(batch, nodes, -1)[:, : width - 1]
        return torch.equal(mine, theirs)

    return compare(
        "draft prefill",
        [lambda: draft_prefill(step, table, 16, width, inputs, places)] * 20,
        [operations] * 20,
        same,
        device,
    )


def run(args: argparse.Namespace) -> dict:
    device = "cpu" if args.tiny else "cuda"
    bandwidth = copy_bandwidth(device)
    record: dict = {
        "what": "growing trees without their draft, median microseconds in a CUDA graph",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": command_line(),
        "device": "a CPU and Triton's interpreter" if args.tiny else torch.cuda.get_device_name(),
        "versions": versions(),
        "copy_bytes_per_second": round(bandwidth),
        "rows": [],
    }
    for model in args.models:
        columns, hidden = MODELS[model]
        for tree in ["tiny"] if args.tiny else [t for t in TREES if t != "tiny"]:
            shape = TREES[tree]
            for batch in args.batch:
                case = {"model": model, "tree": tree, "batch": batch}
                rows = batch * shape.top_k
                for row in (
                    measure_top_k(rows, columns, shape.top_k, bandwidth, device),
                    measure_growth(shape, batch, columns, hidden, device),
                    measure_placing(shape.total_tokens, batch, device),
                    measure_prefill(shape.depth + 2, shape.total_tokens, batch, hidden, device),
                ):
                    record["rows"].append(case | row)
                    print(" ".join(f"{k}={v}" for k, v in record["rows"][-1].items()), flush=True)
                args.out.write_text(json.dumps(record, indent=1) + "\n")
    return record


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    models = [m for m in MODELS if m != "tiny"]
    parser.add_argument("--models", nargs="+", choices=models, default=models)
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--out", type=Path, help="JSON (default: by device, in benchmarks/results)")
    parser.add_argument("--tiny", action="store_true", help="rehearse on a CPU; needs --out")
    args = parser.parse_args(argv)
    if args.tiny:
        if args.out is None:
            parser.error("--tiny: give --out, its record is no result to keep")
        args.models, args.batch = ["tiny"], [1, 3]
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton
    elif not torch.cuda.is_available():
        print("error: no CUDA device; --tiny rehearses on a CPU", file=sys.stderr)
        return 2
    else:
        device = torch.cuda.get_device_name().lower().removeprefix("nvidia ").replace(" ", "_")
        args.out = args.out or Path(__file__).parent / "results" / f"tree_growth_{device}.json"
    record = run(args)
    wrong = any(row.get("reason") == "wrong result" for row in record["rows"])
    if wrong:
        print("error: a kernel gave a wrong result", file=sys.stderr)
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
