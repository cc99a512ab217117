"""The long forms of the tests with draft trees; writes what they found to a JSON file.

Random mixed workloads with and without trees under both model runners, chi-square tests of sampled
tokens, seeded sampling, and thousands of requests through one engine. The pairs are the tests' own
constructed ones, everything runs on the CPU in fp32, Model Runner V2 in Triton's interpreter. Exits
with 1 when an answer differs or a threshold is missed. A file that is there keeps its other parts.

    python -m tests.long.soak [--only PART ...] [--resume] [--quick] [--out FILE.json]
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tests.common import tiny
from tests.common.soak import draw_curves
from tests.common.worker import REPOSITORY, run_worker
from tests.long.draws import draws
from vllm_msd.provenance import provenance

# oneDNN keeps code for each shape of a matrix product it has met, a thousand of them by default. A
# batch has a new shape in many a step, so the process grows for hours by what is no leak.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16")
TIMEOUT = 4 * 3600.0  # seconds for one part
TREE = {"spec_tokens": 5, "tree": (2, 3)}  # of the draws: nodes, depth and width
SETTINGS = (
    {"temperature": 1.0},
    {"temperature": 0.7},
    {"temperature": 1.0, "top_p": 0.8},
    {"temperature": 1.0, "top_k": 4},
    {"temperature": 1.0, "min_p": 0.1},
    {"temperature": 0.7, "top_p": 0.95, "top_k": 6, "min_p": 0.02},
)
FALSE_ALARM = 1e-6  # of each chi-square test; there are about a hundred
CAUGHT = 1e-12  # a wrong acceptance rule's smallest p-value lies below
# More than without speculation, between two medians 2,500 requests apart: 3.3 KiB for each request.
# Without it vLLM and the answers that are kept take some 5 KiB. A leaked block would be 48 KiB.
MEMORY_GROWTH_MIB = 8.0


def workloads(
    runner: str,
    seed: int,
    quick: bool,
    *,
    requests: int,
    kind: str = "llava",
    job: str = "random",
    **more: Any,
) -> dict[str, Any]:
    """Token ids of a random workload with trees and without speculation."""
    with tempfile.TemporaryDirectory() as folder:
        pair = tiny.build_pair(Path(folder), kind, decoys=2)
        return run_worker(
            job,
            runner,
            timeout=TIMEOUT,
            show_errors=True,
            show_progress=True,
            kind=kind,
            target=pair.target,
            draft=pair.draft,
            requests=requests // 10 if quick else requests,
            seed=seed,
            **more,
        )


def sampled(
    runner: str, seed: int, quick: bool, *, count: int, control: int, **more: Any
) -> dict[str, Any]:
    """Chi-square tests of sequences sampled with trees, ``count`` for each setting."""
    return draws(
        runner,
        count=count // 10 if quick else count,
        control=control // 4 if quick else control,
        timeout=TIMEOUT,
        seed=seed,
        **{"settings": SETTINGS, **TREE, **more},
    )


PARTS: dict[str, Callable[[int, bool], dict[str, Any]]] = {
    "identity-v1": partial(workloads, "v1", requests=500, longest=120),
    "identity-v2": partial(workloads, "v2", requests=500, longest=24, cache_blocks=15),
    "identity-v2-async": partial(
        workloads, "v2", requests=500, longest=24, cache_blocks=15, async_scheduling=True
    ),
    "identity-v1-mrope": partial(
        workloads, "v1", requests=150, longest=60, cache_blocks=15, kind="qwen2_vl"
    ),
    "identity-v2-mrope": partial(
        workloads, "v2", requests=50, longest=24, cache_blocks=15, kind="qwen2_vl"
    ),
    "seeded-v2": partial(workloads, "v2", requests=300, longest=24, sampled=True),
    "draws-v1": partial(sampled, "v1", count=100_000, control=4_800),
    # An interpreter: fewer draws, though enough to catch the wrong rules.
    "draws-v2": partial(sampled, "v2", count=2_048, control=4_096),
    "soak": partial(workloads, "v1", requests=5_000, longest=40, job="soak"),
}


def failures(part: str, report: dict[str, Any], quick: bool = False) -> list[str]:
    """What a part's report misses."""
    if part.startswith("draws"):
        return [problem for trial in report["trials"] if (problem := _wrong_trial(trial))]
    found = [f"{len(report['mismatches'])} answers differ"] * bool(report["mismatches"])
    if report["used_blocks"]:
        found.append(f"{report['used_blocks']} cache blocks are still in use")
    seen = ["accepted", "rejected", "other_children"]
    if not (quick or part.startswith("seeded")):
        seen += ["aborted", "preemptions"]
    found += [f"{name}: got 0, expected more" for name in seen if not report[name]]
    if part.endswith("async") and report["scheduler"] != "AsyncScheduler":
        found.append(f"scheduler: got {report['scheduler']}, expected AsyncScheduler")
    growth = report.get("memory_growth_mib", 0.0) - report.get("plain_memory_growth_mib", 0.0)
    if growth > MEMORY_GROWTH_MIB and not quick:
        found.append(
            f"memory grew by {growth:.1f} MiB more than without speculation, expected at most "
            f"{MEMORY_GROWTH_MIB}"
        )
    return found


def _wrong_trial(trial: dict[str, Any]) -> str | None:
    values = [position["p"] for position in trial["positions"]]
    names = ("wrong_rule", "temperature", "top_p", "top_k", "min_p", "prompt")
    label = ", ".join(f"{name} {trial[name]}" for name in names)
    if trial["wrong_rule"] != "none":
        return None if min(values) < CAUGHT else f"not caught: {label}, p-values {values}"
    if min(values) < FALSE_ALARM:
        return f"{label}: p-values {values}, expected at least {FALSE_ALARM}"
    if not (trial["batch"]["accepted"] and trial["batch"]["rejected"]):
        return f"{label}: got {trial['batch']}, expected accepted and rejected drafts"
    return None


def show(part: str, report: dict[str, Any]) -> None:
    """Print one part's figures."""
    print(f"{part}, {report['seconds']:.0f} s", flush=True)
    if "requests" in report:
        names = ("requests", "aborted", "images", "tokens", "preemptions", "accepted", "rejected",
                 "other_children", "used_blocks")  # fmt: skip
        print("  " + ", ".join(f"{name} {report[name]:.0f}" for name in names))
    for trial in report.get("trials", []):
        setting = ", ".join(f"{k} {trial[k]}" for k in ("temperature", "top_p", "top_k", "min_p"))
        tests = ", ".join(f"{result['p']:.2g}" for result in trial["positions"])
        print(f"  {trial['wrong_rule']}, {setting}, {trial['prompt']}, {trial['draws']}: p {tests}")


def read(path: Path) -> dict[str, Any]:
    """The parts in a result file, none if there is no such file."""
    return json.loads(path.read_text()) if path.exists() else {}


def is_done(path: Path, part: str, settings: dict[str, Any]) -> bool:
    """Whether the file has a part that was run with the same settings and held."""
    report = read(path).get(part)
    return bool(report) and report["provenance"]["settings"] == settings and not report["failures"]


def main() -> int:
    """Run the parts one after the other, writing the file after each."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--resume", action="store_true", help="skip parts that the file has")
    parser.add_argument("--quick", action="store_true", help="a tenth of the requests and draws")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--out", type=Path, default=REPOSITORY / "benchmarks/results/soak.json")
    args = parser.parse_args()

    args.out.parent.mkdir(parents=True, exist_ok=True)
    settings = {"seed": args.seed, "quick": args.quick, "dtype": "float32"}
    problems = 0
    for part in args.only:
        if args.resume and is_done(args.out, part, settings):
            print(f"{part}: already there")
            continue
        origin = provenance(**settings)
        report = PARTS[part](args.seed, args.quick)
        show(part, report)
        found = failures(part, report, args.quick)
        for problem in found:
            print(f"  FAILED: {problem}", flush=True)
        problems += len(found)
        result = read(args.out)
        result[part] = {"provenance": origin, "failures": found, **report}
        args.out.write_text(json.dumps(result, indent=1) + "\n")
        if "curve" in report:
            curves = {"trees": report["curve"], "no speculation": report["plain_curve"]}
            draw_curves(curves, args.out.with_suffix(".png"))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
