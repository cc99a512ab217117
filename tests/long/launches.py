"""Count what a decoding step of one request launches, and write the counts to a JSON file.

    python -m tests.long.launches [--out benchmarks/results/launches.json]
    python -m tests.long.launches --before OTHER.json    # counted so at an earlier commit

Engines run under Model Runner V2 on the wiring of a GPU, their CUDA graphs emulated on a CPU, and
the emulator's record is counted: operations of PyTorch that launch, and Triton kernels, attention
and cache updates as one each. `benchmarks/roofline.py` reads the counts. Not counted: what a CUDA
operation launches inside, copies of memory that a GPU's engine makes and a CPU's does not.
"""

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

from tests.common.worker import REPOSITORY, run_worker
from vllm_msd.demo.paths import demo_pair
from vllm_msd.provenance import provenance

OUT = REPOSITORY / "benchmarks" / "results" / "launches.json"
# Each kind twice, one level apart, so that levels can be told from the rest.
KINDS: dict[str, list[dict[str, Any]]] = {
    "none": [{}],
    "chain": [{"spec_tokens": 5}, {"spec_tokens": 4}],
    "tree fused": [
        {"spec_tokens": 24, "tree": [5, 4]},
        {"spec_tokens": 24, "tree": [4, 4]},
    ],
}


def steady_step(kind: str, speculation: dict[str, Any]) -> dict[str, Any]:
    """The most usual step of a decoding request: launches outside graphs and in each of them."""
    pair = demo_pair()
    report = run_worker(
        "count_launches",
        "v2",
        show_errors=True,
        target=str(pair.target),
        draft=str(pair.draft) if speculation else None,
        speculation=speculation,
    )
    usual, _ = Counter(json.dumps(step, sort_keys=True) for step in report["steps"]).most_common(1)[
        0
    ]
    return json.loads(usual)


def count(kind: str) -> tuple[dict[str, int], dict[str, Any]]:
    """`roofline.launches.LaunchCounts` of a kind, and the step that they were counted in."""
    steps = [steady_step(kind, speculation) for speculation in KINDS[kind]]
    step = steps[0]
    counts = {"outside": step["outside"]}
    if kind != "none":  # graphs: the target's, the draft's prefill, its levels
        _, prefill, levels = step["graphs"]
        level = levels - steps[1]["graphs"][2]
        number = (KINDS[kind][0].get("tree") or [KINDS[kind][0]["spec_tokens"]])[0] - 1
        counts |= {"prefill": prefill, "level": level, "once": levels - number * level}
    return counts, step


def main() -> None:
    """Count and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=OUT, help="default: %(default)s")
    parser.add_argument("--before", type=Path, help="a file of this script's, to keep beside")
    args = parser.parse_args()
    found = {kind: count(kind) for kind in KINDS}
    result: dict[str, Any] = provenance()
    result["launches"] = {kind: counts for kind, (counts, _) in found.items()}
    result["steps"] = {kind: step for kind, (_, step) in found.items()}
    if args.before:
        before = json.loads(args.before.read_text())
        result["before"] = {name: before[name] for name in ("date", "launches", "steps")}
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["launches"], indent=1))


if __name__ == "__main__":
    main()
