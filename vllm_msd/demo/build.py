"""Rebuild the demo pair from nothing: tokenizer, target, draft, figures, provenance.

    vllm-msd demo build --output my-pair --minutes 75

Both trainings follow the clock: on a faster or idle machine the same minutes give a better pair.
"""

import json
import shutil
from pathlib import Path

from vllm_msd.provenance import provenance
from vllm_msd.training import parallel, train_draft
from vllm_msd.training.train_draft import DraftTraining

from . import evaluate, train_target
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
