"""Measure that MSD changes nothing but speed, and write the figures to a JSON file.

Greedy identity on the demo pair and on the real one under both model runners, and the distribution
test of sampling on a vocabulary of 24 tokens; all run real vLLM on the CPU in fp32, Model Runner V2
in Triton's interpreter. The tests in ``tests/vllm/test_lossless_*.py`` run the same code with
smaller sizes and hold it to thresholds; this script only reports, but exits with 1 when an answer
differs.

    python -m tests.long.lossless [--quick] [--only PART ...] [--out benchmarks/results/FILE.json]
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from tests.common.worker import REPOSITORY, run_worker
from tests.long.draws import draws
from vllm_msd.demo.paths import demo_pair
from vllm_msd.demo.real.pair import real_pair
from vllm_msd.provenance import provenance

PARTS = (
    "greedy-v1",
    "greedy-v2",
    "real-v1",
    "real-v2",
    "sampling-v1",
    "probabilistic-v1",
    "sampling-v2",
)
TIMEOUT = 7200.0  # seconds for one part


def greedy(runner: str, seed: int, quick: bool, real: bool = False) -> dict[str, Any]:
    """Token ids with and without MSD, 200 requests or more unless ``quick``."""
    pair = real_pair() if real else demo_pair()
    lengths = {"v1": [150, 40, 90, 64, 24], "v2": [4, 5, 4, 6, 16]}[runner]
    return run_worker(
        "greedy",
        runner,
        timeout=TIMEOUT,
        target=str(pair.target),
        draft=str(pair.draft),
        requests=24 if quick else 208,
        alone=8 if quick else {"v1": 48, "v2": 24}[runner],
        lengths=lengths,
        seed=seed,
        real=real,
    )


def real(runner: str, seed: int, quick: bool) -> dict[str, Any]:
    """The same on the real language model, which is fetched on first use."""
    return greedy(runner, seed, quick, real=True)


def sampling(runner: str, seed: int, quick: bool, method: str = "greedy") -> dict[str, Any]:
    """Chi-square tests of sampled sequences; fewer draws under Model Runner V2."""
    count, control = (24_000, 4_800) if runner == "v1" else (1_024, 256)
    return draws(
        runner,
        count=count // 8 if quick else count,
        control=control // 4 if quick else control,
        timeout=TIMEOUT,
        seed=seed,
        draft_sample_method=method,
    )


def probabilistic(runner: str, seed: int, quick: bool) -> dict[str, Any]:
    """The same with drafts drawn from the draft's own law instead of its likeliest token."""
    return sampling(runner, seed, quick, "probabilistic")


JOBS = {"greedy": greedy, "real": real, "sampling": sampling, "probabilistic": probabilistic}


def show(name: str, report: dict[str, Any]) -> None:
    """Print one part's figures."""
    print(f"{name}, {report['seconds']:.0f} s")
    for part in ("mixed", "alone"):
        if part in report:
            figures = report[part]
            print(
                f"  {part}: {len(figures['mismatches'])} mismatches in "
                f"{figures.get('requests', report['requests'])} requests, "
                f"{figures['accepted']} drafts accepted, {figures['rejected']} rejected"
            )
    for trial in report.get("trials", []):
        tests = ", ".join(
            f"{r['statistic']:.0f}/{r['cells']} (p {r['p']:.2g})" for r in trial["positions"]
        )
        print(
            f"  wrong rule {trial['wrong_rule']}, temperature {trial['temperature']}, "
            f"top-p {trial['top_p']}, {trial['prompt']}, {trial['draws']} draws: {tests}"
        )


def main() -> int:
    """Run the parts one after the other; the file keeps those of earlier runs."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--quick", action="store_true", help="a part of the requests and draws")
    parser.add_argument("--seed", type=int, default=60_000)
    parser.add_argument("--out", type=Path, default=REPOSITORY / "benchmarks/results/lossless.json")
    args = parser.parse_args()

    args.out.parent.mkdir(parents=True, exist_ok=True)
    wrong = 0
    for part in args.only:
        job, _, runner = part.partition("-")
        origin = provenance(seed=args.seed, quick=args.quick, dtype="float32")
        report = JOBS[job](runner, args.seed, args.quick)
        show(part, report)
        wrong += sum(len(report.get(key, {}).get("mismatches", [])) for key in ("mixed", "alone"))
        result = json.loads(args.out.read_text()) if args.out.exists() else {}
        result[part] = {"provenance": origin, **report}
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
