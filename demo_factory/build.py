"""Rebuild the demo pair from nothing: tokenizer, target, data, draft, figures, provenance.

    vllm-msd demo build --output my-pair --minutes 56

The target's training follows the clock: on a faster or idle machine the same minutes give a better
one. Then it answers questions about the demo's world, and the draft is trained on those replies by
`vllm-msd train`, with the settings in `draft.yaml`.
"""

import json
import shutil
from pathlib import Path

from vllm_msd.provenance import provenance
from vllm_msd.training import TrainSettings, train

from . import evaluate, parallel, train_target
from .records import world_digest
from .train_target import TargetTraining
from .write_data import write_data

WORK = "work"
DRAFT_SETTINGS = Path(__file__).with_name("draft.yaml")


def build(
    output: Path,
    minutes: float = 56.0,
    records: int = 6000,
    draft_settings: Path = DRAFT_SETTINGS,
    per_kind: int = 60,
    processes: int = 2,
    compile: bool = False,
) -> Path:
    """Train a pair into `output/target` and `output/draft`, with `output/evaluation.json`.

    Intermediate states lie in `output/work`, from where a broken run goes on: what is finished
    there is used as it is. It can be deleted afterwards.

    Args:
        output: folder.
        minutes: of the target's training.
        records: text and as many multimodal ones that the target answers for the draft.
        draft_settings: YAML file of settings of `vllm-msd train`.
        per_kind: held-out requests of each kind in the evaluation.
        processes: of one thread each that train the target.
        compile: train the target with compiled layers (see `TargetTraining`).

    Returns:
        The output folder.
    """
    work = output / WORK
    target = work / "target" / "model"
    if not (target / "provenance.json").is_file():
        training = TargetTraining(
            output=str(work / "target"), minutes=minutes, processes=processes, compile=compile
        )
        train_target.prepare_tokenizer(work / "target")
        parallel.launch(train_target.train, (training,), processes, work)

    world = {name: work / "world" / f"{name}.json" for name in ("text", "multimodal")}
    if not all(path.is_file() for path in world.values()):
        write_data(work / "world", records, target=str(target))

    run = work / "draft"
    train(
        TrainSettings.load(
            draft_settings,
            target=str(target),
            output=str(run),
            text_data=[str(world["text"])],
            multimodal_data=[str(world["multimodal"])],
            resume=(run / "run.json").is_file(),
        )
    )

    for name, source in (("target", target), ("draft", run / "best")):
        shutil.copytree(source, output / name, dirs_exist_ok=True)
    note = output / "draft" / "provenance.json"
    content = json.loads(note.read_text()) | {"world_sha256": world_digest()}
    note.write_text(json.dumps(content, indent=2) + "\n")
    settings = {"per_kind": per_kind, "first_seed": evaluate.FIRST_SEED, "split": "test"}
    header = provenance(**settings)
    figures = header | evaluate.evaluate(output / "target", output / "draft", per_kind)
    (output / "evaluation.json").write_text(json.dumps(figures, indent=2) + "\n")
    return output
