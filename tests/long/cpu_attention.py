"""What a tree costs in the CPU's attention alone: one layer, against a chain of as many rows.

    python -m tests.long.cpu_attention --output benchmarks/results/cpu_attention.json

The shape is that of a model of about 1B parameters (32 heads, 8 KV heads of 64, bf16). Each way
runs over several layers in turn, as a model does, and its fastest round counts. ``gather``
is the plain alternative, dense attention in PyTorch over gathered keys and values; it is given
them in a layout that needs no conversion, which is more than vLLM's cache offers.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch

from tests.common.cpu_trees import CpuModel
from vllm_msd.provenance import provenance
from vllm_msd.tree import TreeRows, tree_relations
from vllm_msd.vllm_plugin.cpu.paths import plan_paths
from vllm_msd.vllm_plugin.cpu.scratch import MAX_BLOCKS

SHAPE = {"heads": 32, "kv_heads": 8, "head_size": 64, "dtype": torch.bfloat16}
CONTEXTS = (250, 500, 2000)  # not whole blocks: the end of the context is copied too
ROWS = (8, 12, 16)
CHILDREN = (0.6, 0.2, 0.1)  # how often the first, second and third guess is right


def likely_tree(nodes: int) -> list[int]:
    """Parents of the most probable tree, level by level, when guesses are right that often."""
    best = [(1.0, ())]  # probability and ranks from the root
    grown: list[tuple[float, tuple[int, ...]]] = []
    while len(grown) < nodes:
        best.sort(reverse=True)
        probability, path = best.pop(0)
        grown.append((probability, path))
        best += [(probability * p, (*path, rank)) for rank, p in enumerate(CHILDREN)]
    paths = sorted((path for _, path in grown), key=lambda path: (len(path), path))
    return [paths.index(path[:-1]) if path else -1 for path in paths]


def fastest(rounds: int, ways: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Seconds of each way's fastest call; the ways take turns, so a busy machine hits all alike."""
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(rounds + 1):
        for way, run in ways.items():
            begin = time.perf_counter()
            run()
            best[way] = min(best[way], time.perf_counter() - begin)
    return best


def measure(context: int, rows: int, layers: int, block_size: int, rounds: int) -> dict[str, float]:
    """Microseconds per layer of each way, and of the plan that a step makes once."""
    length = context + rows
    blocks = -(-length // block_size)
    model = CpuModel.build(blocks, num_layers=layers, block_size=block_size, **SHAPE)
    kv = (8, 64)
    for name in model.layers:
        model.write(name, *torch.randn(2, length, *kv), torch.arange(length))
    query = torch.randn(rows, 32, 64, dtype=torch.bfloat16)
    keys, values = torch.randn(2, rows, *kv, dtype=torch.bfloat16)
    batch = (
        torch.tensor([0, rows], dtype=torch.int32),
        torch.tensor([length], dtype=torch.int32),
        torch.arange(blocks, dtype=torch.int32)[None],
        torch.arange(context, length),
    )
    metadata = model.metadata(*batch)
    start = torch.tensor([context], dtype=torch.int32)
    _, ancestors = tree_relations(torch.tensor([likely_tree(rows)]))
    planned = TreeRows(start, ancestors[0], False)

    def step(tree: TreeRows | None) -> None:
        for name in model.layers:
            model.attend(name, query, keys, values, metadata, tree)

    plain = torch.randn(layers, 2, blocks, block_size, *kv, dtype=torch.bfloat16)
    table = torch.randperm(blocks)
    mask = torch.ones(rows, length, dtype=torch.bool)
    mask[:, context:] = ancestors[0][:, None] >> torch.arange(rows) & 1

    def gather() -> None:
        for layer in plain:
            k, v = layer.index_select(1, table).flatten(1, 2)[:, :length].transpose(1, 2)
            torch.nn.functional.scaled_dot_product_attention(
                query.transpose(0, 1)[None], k[None], v[None], mask, enable_gqa=True
            )

    best = fastest(
        rounds, {"chain": lambda: step(None), "tree": lambda: step(planned), "gather": gather}
    )
    plan = fastest(
        rounds,
        {"plan": lambda: plan_paths(planned, *batch[:3], block_size, MAX_BLOCKS)},
    )
    per_layer = {way: round(1e6 * seconds / layers, 1) for way, seconds in best.items()}
    return {**per_layer, "plan": round(1e6 * plan["plan"], 1)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--block-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    settings = {key: value for key, value in vars(args).items() if key != "output"}

    cases = []
    print("microseconds per layer; plan: per step")
    for context in CONTEXTS:
        for rows in ROWS:
            figures = measure(context, rows, args.layers, args.block_size, args.rounds)
            cases.append({"context": context, "rows": rows, **figures})
            print("  ".join(f"{key} {value}" for key, value in cases[-1].items()))
    if args.output:
        result = {**provenance(**settings), "microseconds_per_layer": cases}
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
