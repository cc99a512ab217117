"""From prompts to the real pair's draft, in the commands a user would type.

    python -m demo_factory.real.draft --output build/real

fetches model and prompts, lets the model answer them (a third greedily, a third each at
temperatures 0.7 and 1), and trains a draft on its answers. After a kill the same command goes on.
``--replies`` trains on so many of the answered prompts, for a curve over the amount of data.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from vllm_msd.demo.real.pair import real_target
from vllm_msd.measure.engine import timed_dtype
from vllm_msd.storage import write_json

from .prompts import write_prompts

SETTINGS = Path(__file__).with_name("draft.yaml")
TEMPERATURES = (0.0, 0.7, 1.0)
MAX_TOKENS = 160  # of a reply
ENGINE = (
    "--max-model-len 1024 --max-num-seqs 128 --gpu-memory-utilization 0.2 --enforce-eager "
    "--limit-mm-per-prompt.image 0 --dtype "
)


def shares(rows: list[dict]) -> list[list[dict]]:
    """The prompts of each temperature."""
    return [rows[index :: len(TEMPERATURES)] for index in range(len(TEMPERATURES))]


def regenerate_command(data: Path, output: Path, target: Path, temperature: float) -> list[str]:
    """What answers a file of prompts."""
    return [
        *("regenerate", "--data", str(data), "--output", str(output), "--target", str(target)),
        *("--temperature", str(temperature), "--max-tokens", str(MAX_TOKENS)),
        *("--concurrency", "128", f"--engine-args={ENGINE}{timed_dtype()}"),
    ]


def answer(output: Path, prompts: list[dict], target: Path) -> Path:
    """Let the target answer the prompts; gives the file of conversations, in the prompts' order."""
    joined = output / "replies.json"
    if joined.is_file():
        return joined
    found: dict[str, dict] = {}
    for temperature, rows in zip(TEMPERATURES, shares(prompts), strict=True):
        asked = output / f"prompts-{temperature}.json"
        answered = output / f"replies-{temperature}.jsonl"
        if not asked.is_file():
            write_json(asked, rows)
        if not answered.is_file():
            _run(regenerate_command(asked, answered, target, temperature))
        for line in answered.read_text("utf-8").splitlines():
            record = json.loads(line)
            found[record["id"]] = record
    write_json(joined, [found[row["id"]] for row in prompts if row["id"] in found])
    return joined


def _run(arguments: list[str]) -> None:
    command = [sys.executable, "-m", "vllm_msd.cli.main", *arguments]
    print("+ vllm-msd " + " ".join(arguments), file=sys.stderr, flush=True)
    if code := subprocess.run(command, check=False).returncode:
        sys.exit(code)


def main() -> None:
    """Make the draft."""
    parser = argparse.ArgumentParser(
        prog="python -m demo_factory.real.draft", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--output", type=Path, default=Path("build/real"), help="folder")
    parser.add_argument(
        "--prompts", type=int, default=4800, help="to answer (default: %(default)s)"
    )
    parser.add_argument("--replies", type=int, default=0, help="to train on (default: all)")
    args = parser.parse_args()
    target = real_target(lambda line: print(line, file=sys.stderr, flush=True))
    args.output.mkdir(parents=True, exist_ok=True)
    prompts, _ = write_prompts(args.output)
    data = answer(args.output, prompts[: args.prompts], target)
    run = args.output / "run"
    if args.replies:
        part = args.output / f"replies-first-{args.replies}.json"
        write_json(part, json.loads(data.read_text("utf-8"))[: args.replies])
        data, run = part, args.output / f"run-{args.replies}"
    in_fp32 = timed_dtype() == "float32"  # a processor that emulates bf16 is far slower in it
    _run(
        [
            *("train", "--config", str(SETTINGS), "--target", str(target)),
            *("--text-data", str(data), "--output", str(run)),
            *("--cache-features", str(args.output / "features")),
            *(("--target-dtype", "float32", "--precision", "no") if in_fp32 else ()),
        ]
    )


if __name__ == "__main__":
    main()
