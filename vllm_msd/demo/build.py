"""Rebuild the demo pair from nothing: tokenizer, target, draft, figures, provenance.

    vllm-msd demo build --output my-pair --minutes 75

Both trainings follow the clock: on a faster or idle machine the same minutes give a better pair.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

from vllm_msd.training import parallel, train_draft
from vllm_msd.training.train_draft import DraftTraining

from . import evaluate, train_target
from .provenance import provenance
from .train_target import TargetTraining

# Share of the time that goes to the target; the rest is the draft's.
TARGET_SHARE = 0.75
WORK = "work"


def build(output: Path, minutes: float = 75.0, per_kind: int = 60, processes: int = 2) -> Path:
    """Train a pair into `output/target` and `output/draft`, with `output/evaluation.json`.

    Intermediate states lie in `output/work`, from where a broken run resumes; it can be deleted
    afterwards.

    Returns:
        The output folder.
    """
    work = output / WORK
    target_settings = TargetTraining(
        output=str(work / "target"), minutes=minutes * TARGET_SHARE, processes=processes
    )
    train_target.prepare_tokenizer(work / "target")
    parallel.launch(train_target.train, (target_settings,), processes, work)
    trained = work / "target" / "model"

    draft_settings = DraftTraining(
        target=str(trained),
        output=str(work / "draft"),
        minutes=minutes * (1 - TARGET_SHARE),
        processes=processes,
    )
    parallel.launch(train_draft.train, (draft_settings,), processes, work)

    for name, source in (("target", trained), ("draft", work / "draft")):
        shutil.copytree(source, output / name, dirs_exist_ok=True)
    settings = {"per_kind": per_kind, "first_seed": evaluate.FIRST_SEED, "split": "test"}
    header = provenance(**settings)
    figures = header | evaluate.evaluate(output / "target", output / "draft", per_kind)
    (output / "evaluation.json").write_text(json.dumps(figures, indent=2) + "\n")
    return output


def main(arguments: list[str] | None = None) -> int:
    """Command line of `vllm-msd demo build`."""
    parser = argparse.ArgumentParser(prog="vllm-msd demo build", description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("build/pair"))
    parser.add_argument("--minutes", type=float, default=75.0, help="training time in all")
    parser.add_argument("--per-kind", type=int, default=60, help="held-out samples of each kind")
    parser.add_argument("--processes", type=int, default=2, help="one thread each")
    args = parser.parse_args(arguments)
    if args.minutes <= 0 or args.processes < 1 or args.per_kind < 1:
        print("--minutes, --per-kind and --processes must be positive.", file=sys.stderr)
        return 2
    folder = build(args.output, args.minutes, args.per_kind, args.processes)
    print(json.dumps({"target": str(folder / "target"), "draft": str(folder / "draft")}))
    return 0
