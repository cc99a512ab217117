"""Let a small target answer many prompts: several engines on one GPU, each a part of the file.

    python3 tools/offline_gpu/answer.py TARGET prompts.json FOLDER --engines 6 \\
        --max-tokens 160 --temperature 0.7 --stop-after-minutes 2

One engine of a small target is bound by its processes' Python, not by the GPU. FOLDER gets
`answered-0.json` and so on, to train on as they are (`--text-data FOLDER/answered-*.json`), and a
log of each. Options that this script does not know go to `vllm-msd regenerate`, which says how each
engine fared; a second call goes on where the first one was stopped.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from engines import options


def engine_arguments(requests: int, gib: float, mode: str, length: int) -> str:
    """Options of `vllm serve` for one of the engines, in one string."""
    kind = "eager" if mode == "eager" else "graphs"
    found: dict[str, Any] = options(kind, requests=requests, gib=gib) | {"max_model_len": length}
    if mode != "eager":  # as few as waste little: capturing takes a large part of the start
        sizes = [n for n in (1, 2, 4, 8, 16, *range(32, requests, 32)) if n < requests]
        sizes.append(requests)
        graphs = found["compilation_config"]
        if mode == "full":
            graphs["cudagraph_mode"] = "FULL"
            sizes += [int(requests * factor) for factor in (1.25, 1.5, 2, 3, 4)]
        graphs["cudagraph_capture_sizes"] = sizes
    words = []
    for name, value in found.items():
        if value is False:
            continue
        words.append("--" + name.replace("_", "-"))
        if value is not True:
            words.append(value if isinstance(value, str) else json.dumps(value))
    return shlex.join(words)


def commands(args: argparse.Namespace, rest: list[str]) -> list[list[str]]:
    """A command for every engine; writes its part of the prompts, where it is not there."""
    args.folder.mkdir(parents=True, exist_ok=True)
    records = json.loads(args.prompts.read_text())
    engine = engine_arguments(args.requests, args.gib, args.mode, args.max_model_len)
    found = []
    for number in range(args.engines):
        part = args.folder / f"prompts-{number}.json"
        part.write_text(json.dumps(records[number :: args.engines]))
        output = args.folder / f"answered-{number}.json"
        found.append(
            [sys.executable, "-m", "vllm_msd.cli.main", "regenerate", "--data", str(part),
             "--output", str(output), "--target", args.target,
             "--image-root", str(args.prompts.parent), "--concurrency", str(args.requests),
             f"--engine-args={engine}", *rest]
        )  # fmt: skip
    return found


def main() -> int:
    """Start the engines and wait for them; 1 if one of them has left something out."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target")
    parser.add_argument("prompts", type=Path, help="conversations, a JSON list")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--engines", type=int, default=6)
    parser.add_argument("--requests", type=int, default=256, help="at once, of an engine")
    parser.add_argument("--gib", type=float, default=6.0, help="of KV cache, of an engine")
    parser.add_argument(
        "--mode",
        choices=("graphs", "full", "eager"),
        default="graphs",
        help="CUDA graphs of steps that only decode, of those with prompts too, or none",
    )
    parser.add_argument("--max-model-len", type=int, default=2048)
    parser.add_argument("--print", action="store_true", help="only say what would be started")
    args, rest = parser.parse_known_args()
    todo = commands(args, rest)
    if args.print:
        print(*map(shlex.join, todo), sep="\n")
        return 0
    started = time.monotonic()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    running = []
    for number, command in enumerate(todo):
        log = (args.folder / f"engine-{number}.log").open("w")
        running.append(
            subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        )
    codes = [process.wait() for process in running]
    for number, code in enumerate(codes):
        lines = (args.folder / f"engine-{number}.log").read_text().splitlines()
        print(f"engine {number}: code {code}: {lines[-1] if lines else 'said nothing'}")
    print(f"{time.monotonic() - started:.0f} s")
    return 0 if not any(codes) else 1


if __name__ == "__main__":
    sys.exit(main())
