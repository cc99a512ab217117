"""Copy the measured figures into README.md and docs/, between their results markers.

    python -m benchmarks.pages            # rewrites the sections and draws the charts
    python -m benchmarks.pages --check    # exits with 1 when one is out of date

Each part of a section is made from one result file; a part without its file is left out. Nothing
in a section is written by hand.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import (
    bench,
    chart,
    decoding,
    gpu,
    identity,
    real,
    real_making,
    serving,
    speed,
    training,
    training_chart,
    vocabulary,
)

ROOT = Path(__file__).resolve().parents[2]
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"

# By document: its parts, each with the file it is made from.
DOCUMENTS: dict[str, dict[str, Callable[[str, dict[str, Any]], str]]] = {
    "README.md": {
        "benchmarks/results/real.json": real.headline,
        "benchmarks/results/trees.json": decoding.headline,
        "benchmarks/results/gpu_speed.json": gpu.headline,
    },
    "docs/results.md": {
        "benchmarks/results/real.json": real.real,
        "benchmarks/results/demo.json": decoding.demo,
        "benchmarks/results/trees.json": decoding.trees,
        "benchmarks/results/auto.json": decoding.auto,
        "benchmarks/results/cpu_environment.json": serving.environment,
        "benchmarks/results/visual_branch.json": decoding.visual_branch,
        "vllm_msd/demo/pair/evaluation.json": decoding.evaluation,  # written with the pair
        "benchmarks/results/gpu_smoke.json": gpu.smoke,
        "benchmarks/results/gpu_speed.json": gpu.speed,
        "benchmarks/results/lossless.json": identity.lossless,
        "benchmarks/results/soak.json": identity.soak,
        "benchmarks/results/gpu_wiring.json": identity.gpu_wiring,
        "benchmarks/results/faults.json": identity.faults,
    },
    "docs/benchmarks.md": {
        "benchmarks/results/bench.json": bench.support,
        "benchmarks/results/real.json": bench.support_real,
        "benchmarks/results/bench_shape.json": bench.shaped,
    },
    "docs/kernels.md": {
        "benchmarks/results/gpu_attention.json": gpu.kernels,
        "benchmarks/results/gpu_growth.json": gpu.growth,
        "benchmarks/results/launches.json": speed.launches,
        "benchmarks/results/roofline.json": speed.roofline,
    },
    "docs/training.md": {
        "benchmarks/results/training.json": training.training,
        "benchmarks/results/training_walk.json": training.training_walk,
        "benchmarks/results/training_time.json": training.training_time,
        real_making.TARGET: real_making.target,
        real_making.DRAFTS: real_making.drafts,
        vocabulary.SOURCE: vocabulary.vocabulary,
    },
}


def section(document: str, root: Path = ROOT) -> str:
    """A document's whole section with its markers, from the files below ``root``."""
    parts = [
        make(name, read(name, root))
        for name, make in DOCUMENTS[document].items()
        if (root / name).is_file()
    ]
    return "\n\n".join([BEGIN, *parts, END])


def read(name: str, root: Path = ROOT) -> dict[str, Any]:
    """A result file."""
    return json.loads((root / name).read_text(encoding="utf-8"))


def updated(text: str, results: str) -> str:
    """A document with its section replaced. Raises SystemExit when it has no markers."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise SystemExit(
            f"expected the markers {BEGIN} and {END} in each of {', '.join(DOCUMENTS)}"
        )
    return before + results + after


def charts(root: Path = ROOT) -> dict[str, tuple[dict[str, Any], Callable[..., None]]]:
    """By picture: what it shows, and what draws it; those whose result files are there."""
    found = {chart.PICTURE: (chart.content(*(read(n, root) for n in chart.SOURCES)), chart.draw)}
    others: dict[str, tuple[str, Any]] = {
        picture: (name, training_chart) for name, picture in training_chart.PICTURES.items()
    }
    others[vocabulary.PICTURE] = (vocabulary.SOURCE, vocabulary)
    others[real_making.PICTURE] = (real_making.DRAFTS, real_making)
    for picture, (name, drawing) in others.items():
        if (root / name).is_file():
            found[f"docs/{picture}"] = (drawing.content(read(name, root)), drawing.draw)
    return found


def main() -> int:
    """Rewrite or check the sections and the charts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing, tell by exit code")
    args = parser.parse_args()
    stale = []
    for name in DOCUMENTS:
        path = ROOT / name
        old = path.read_text(encoding="utf-8")
        new = updated(old, section(name))
        if new != old:
            stale.append(name)
            if not args.check:
                path.write_text(new, encoding="utf-8")
    for name, (content, draw) in charts().items():
        if not chart.shows(ROOT / name, content):
            stale.append(name)
            if not args.check:
                draw(content, ROOT / name)
    if args.check and stale:
        print(f"out of date: {', '.join(stale)}; run python -m benchmarks.pages")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
