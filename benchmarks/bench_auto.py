"""Measure sizes that follow the load against fixed ones and no speculation, by batch size.

    python -m benchmarks.bench_auto --output benchmarks/results/auto.json
    python -m benchmarks.bench_auto --size 350M --batches 1 16 --chains 5 --rounds 1

All engines run in one process and in turn, on the pair widened to --size parameters; they share the
target's weights. Each batch size answers as many held-out samples at once, greedily. Figures are
tokens per second of whole answers, prefill included. A draft with shuffled weights, which is always
wrong, stands for the worst case; its engine chooses sizes too.
"""

import argparse
import json
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_msd.errors import MSDError
from vllm_msd.measure.engine import Drafting, Engine, restart_tuned, timed_dtype
from vllm_msd.measure.inputs import Sample

AUTO, NONE, WRONG = "auto", "none", "auto, wrong draft"


@dataclass(frozen=True)
class AutoDrafting(Drafting):
    """Sizes left to the plugin."""

    def speculative_config(self, draft: Path) -> dict[str, Any]:
        """vLLM's ``speculative_config``."""
        return {"method": "msd", "model": str(draft)}


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="350M", help="parameters of the widened pair")
    parser.add_argument("--dtype", choices=("auto", "bfloat16", "float32"), default="auto")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--chains", nargs="+", type=int, default=[2, 5])
    parser.add_argument("--num-waves", type=int, default=3, help="batches of each size")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--max-tokens", type=int, default=192)
    parser.add_argument("--seed", type=int, default=60_000)
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    args = parser.parse_args()
    restart_tuned()
    from vllm_msd.provenance import provenance

    if args.dtype == "auto":
        args.dtype = timed_dtype()
    result = provenance(**{k: v for k, v in vars(args).items() if k != "output"})
    try:
        result["batches"] = measure(args)
    except MSDError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second by batch size and engine, and what follows from them."""
    from vllm_msd.demo import paths

    paths.use_factory()
    from demo_factory.held_out import held_out_samples

    pair = paths.wide_pair(args.size, dtype=args.dtype, report=print)
    wrong = shuffled(pair.draft)
    arms: dict[str, tuple[Path | None, Drafting]] = {NONE: (None, Drafting())}
    arms |= {str(Drafting(n)): (pair.draft, Drafting(n)) for n in args.chains}
    arms |= {AUTO: (pair.draft, AutoDrafting()), WRONG: (wrong, AutoDrafting())}
    engines: dict[str, Engine] = {}
    for name, (draft, drafting) in arms.items():
        engines[name] = Engine(
            pair.target,
            draft=draft,
            drafting=drafting,
            dtype=args.dtype,
            max_num_seqs=max(args.batches),
        )
        if name != NONE:
            engines[name].share_target(engines[NONE])
    found = {}
    for batch in args.batches:
        samples = held_out_samples(batch * args.num_waves, args.seed + batch)
        speeds: dict[str, list[float]] = {name: [] for name in engines}
        texts: dict[str, list[list[int]]] = {}
        for turn in range(args.rounds):
            order = [*engines][turn % len(engines) :] + [*engines][: turn % len(engines)]
            for name in order:
                ids, seconds = answer(engines[name], samples, batch, args.max_tokens)
                speeds[name].append(sum(map(len, ids)) / seconds)
                texts.setdefault(name, ids)
        found[str(batch)] = summary(speeds, texts)
        print(f"batch {batch:>3}: " + ", ".join(
            f"{name} {one['tokens_per_second']:.1f} ({one['speedup']:.2f}x)"
            for name, one in found[str(batch)]["arms"].items()), flush=True)  # fmt: skip
    return found


def answer(
    engine: Engine, samples: list[Sample], batch: int, max_tokens: int
) -> tuple[list[list[int]], float]:
    """Token ids of all samples, ``batch`` at a time, and the seconds they took."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=max_tokens)
    ids: dict[str, list[int]] = {}
    started = time.perf_counter()
    for first in range(0, len(samples), batch):
        for number, sample in enumerate(samples[first : first + batch], first):
            engine.llm.add_request(f"{started}-{number}", engine.prompt(sample), params)
        while engine.llm.has_unfinished_requests():
            for output in engine.llm.step():
                ids[output.request_id] = list(output.outputs[0].token_ids)
    seconds = time.perf_counter() - started
    return [ids[f"{started}-{number}"] for number in range(len(samples))], seconds


def summary(speeds: dict[str, list[float]], texts: dict[str, list[list[int]]]) -> dict[str, Any]:
    """Medians with their rounds, speed-ups, identical answers, and auto against the best."""
    medians = {name: statistics.median(rounds) for name, rounds in speeds.items()}
    fixed = {name: m for name, m in medians.items() if name not in (AUTO, WRONG)}
    best = max(fixed, key=lambda name: fixed[name])
    arms = {
        name: {
            "tokens_per_second": round(medians[name], 2),
            "per_round": [round(x, 2) for x in rounds],
            "speedup": round(medians[name] / medians[NONE], 3),
            "identical": sum(a == b for a, b in zip(texts[name], texts[NONE], strict=True)),
            "requests": len(texts[NONE]),
        }
        for name, rounds in speeds.items()
    }
    share = round(medians[AUTO] / fixed[best], 3)
    return {"arms": arms, "best_fixed": best, "auto_of_best_fixed": share}


def shuffled(draft: Path) -> Path:
    """A copy of a draft whose fusion layer has its rows in another order: always wrong."""
    import tempfile

    import torch
    from safetensors.torch import load_file, save_file

    folder = Path(tempfile.mkdtemp())
    (folder / "config.json").write_text((draft / "config.json").read_text())
    weights = load_file(draft / "model.safetensors")
    torch.manual_seed(0)
    order = torch.randperm(len(weights["fc.weight"]))
    save_file(weights | {"fc.weight": weights["fc.weight"][order]}, folder / "model.safetensors")
    return folder


if __name__ == "__main__":
    sys.exit(main())
