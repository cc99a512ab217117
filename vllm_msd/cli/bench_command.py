"""``vllm-msd bench``."""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_msd.cli.arguments import positive

if TYPE_CHECKING:
    from vllm_msd.bench.settings import BenchSettings

_EXAMPLES = """examples:
  the demo pair, in a few minutes; the page is bench/report.html:
    vllm-msd bench --quick

  a model of your own, with its draft, on your own questions:
    vllm-msd bench --target ./my-model --draft ./my-draft --data questions.json

  one load and two sizes of chains:
    vllm-msd bench --target ./my-model --batch 8 --arms none chain:3 chain:5 auto

  what a published model would cost here, without its files: random weights of its shape, and the
  acceptance that others measured (about 18 GiB of memory; `--shape tiny` tries it in a minute):
    vllm-msd bench --shape llava-1.5-7b --num-prompts 3 --max-tokens 48

  the same requests for vLLM's own load generator:
    vllm-msd bench --data questions.json --write-requests requests.jsonl
    vllm bench serve --backend openai-chat --endpoint /v1/chat/completions \\
        --dataset-name custom_image --dataset-path requests.jsonl --disable-shuffle \\
        --num-prompts 128 --model MODEL

  going on after a kill, or making the page again: the same command
"""


def add_parsers(subparsers: argparse._SubParsersAction) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "bench",
        help="how much faster a model is with MSD: speed, outputs, and what would be ideal",
        description="Answer the same requests without speculation, with vLLM's ngram, and with "
        "MSD's chains, trees and sizes that follow the load, in turn on this machine. Prints a "
        "table as it goes, and writes JSON, charts and a page.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--target", metavar="T", help="folder or hub name (default: the demo pair)")
    parser.add_argument(
        "--draft", metavar="D", help="folder or hub name (default: found by the target)"
    )
    parser.add_argument(
        "--wide", metavar="SIZE", help="widen the demo pair to so many parameters, such as 350M"
    )
    parser.add_argument(
        "--shape", metavar="NAME",
        help="random weights of this shape in the place of a target: llava-1.5-7b, llava-1.5-13b, "
        "qwen2-vl-7b, or tiny. Acceptance comes from a table, cost from the true shape",
    )  # fmt: skip
    parser.add_argument(
        "--accepted", type=float, metavar="TOKENS",
        help="with --shape: tokens a verification of a tree of 60 nodes, 6 deep, top-k 10 yields "
        "(default: 4.75, what MMSpec measured of MSD on LLaVA-1.5-7B); smaller ones yield less",
    )  # fmt: skip
    parser.add_argument(
        "--data",
        metavar="PATH",
        help="ShareGPT, LLaVA or OpenAI conversations as JSON or JSONL, whose last question is "
        "asked, or a folder with mmspec.jsonl (default: the demo's held-out samples)",
    )
    parser.add_argument(
        "--image-root",
        nargs="+",
        metavar="PATH",
        help="folders of relative image paths (default: that of --data)",
    )
    parser.add_argument(
        "--arms",
        nargs="+",
        metavar="ARM",
        help="none, ngram[:TOKENS], chain[:TOKENS], tree[:NODESxDEPTHxTOP_K], auto (default: all; "
        "ngram and chain of 5, a tree of 16x6x3)",
    )
    parser.add_argument(
        "--batch", nargs="+", type=positive, metavar="N",
        help="requests at a time (default: 1 2 4 8 16 32 64)",
    )  # fmt: skip
    parser.add_argument(
        "--temperature", nargs="+", type=float, metavar="T", help="of sampling (default: 0 1)"
    )
    parser.add_argument(
        "--num-prompts", type=positive, metavar="N",
        help="requests of each batch size (default: 21), but at least twice the batch; where the "
        "data have fewer, they come again",
    )  # fmt: skip
    parser.add_argument(
        "--max-tokens", type=positive, metavar="N",
        help="of an answer, which ends where the model ends it (default: 256)",
    )  # fmt: skip
    parser.add_argument(
        "--passes", type=positive, metavar="N", help="of the whole, at least 2 (default: 2)"
    )
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="default: on a GPU the model's, on a CPU bfloat16 where the processor has it, else "
        "float32; float32 for the demo pair that is not widened",
    )
    parser.add_argument(
        "--engines",
        choices=("together", "apart"),
        help="all arms in memory, or one after another (default: together on a CPU, else apart)",
    )
    parser.add_argument(
        "--compile", action="store_true", help="compiled models on a CPU too (needs a compiler)"
    )
    parser.add_argument(
        "--max-model-len", type=positive, metavar="N",
        help="tokens of a request with its images (default: the model's, 4096 at most)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, help="of drawn answers (default: 0)")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="batches 1 and 4, greedy, 7 prompts, at most 96 tokens; what else is given counts",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("bench"), metavar="FOLDER",
        help="for JSON, charts and page (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--write-requests",
        type=Path,
        metavar="FILE",
        help="measure nothing: write the requests of the largest batch, as .jsonl, for `vllm bench "
        "serve --dataset-name custom_image`",
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="forget what was measured into --output, and measure anew",
    )
    parser.set_defaults(func=run_bench)


def run_bench(args: argparse.Namespace) -> int:
    """Measure; 1 when greedy answers differ by more than near ties."""
    from vllm_msd.bench.settings import QUICK, SHAPED, BenchSettings

    names = BenchSettings.__dataclass_fields__
    given = {n: v for n, v in vars(args).items() if n in names and v is not None}
    given = {n: tuple(v) if isinstance(v, list) else v for n, v in given.items()}
    defaults = {**(QUICK if args.quick else {}), **(SHAPED if args.shape else {})}
    settings = BenchSettings(**{**defaults, **given})
    settings.check()
    if args.write_requests is not None:
        return _write_requests(settings, args.write_requests)
    from vllm_msd.measure.engine import restart_tuned

    if not is_local(settings):  # which the restarted process would not ask
        os.environ.setdefault("HF_HUB_OFFLINE", "0")
    restart_tuned()
    from vllm_msd.bench.engines import on_gpu

    if args.engines is None and on_gpu():
        from dataclasses import replace

        settings = replace(settings, engines="apart")
    from vllm_msd.bench.run import run_bench

    found = run_bench(settings)
    greedy = [cell["arms"] for cell in found["cells"] if cell["temperature"] == 0]
    return 1 if any(one.get("differing") for arms in greedy for one in arms.values()) else 0


def is_local(settings: "BenchSettings") -> bool:
    """Whether nothing has to be asked of the hub: target and draft are folders, or the demo pair's.

    Raises:
        ConfigError: no draft belongs to the target, and an arm needs one.
    """
    if settings.target is None:
        return True
    used = [settings.target]
    if any(arm.is_msd for arm in settings.parsed_arms):
        from vllm_msd.vllm_plugin.configuration.resolve import find_draft

        used.append(find_draft(os.path.expanduser(settings.target), settings.draft))
    return all(os.path.isdir(os.path.expanduser(name)) for name in used)


def _write_requests(settings: "BenchSettings", path: Path) -> int:
    from vllm_msd.bench.data import load_requests
    from vllm_msd.bench.serving_file import write_requests
    from vllm_msd.errors import ConfigError
    from vllm_msd.storage import check_file

    path = path.expanduser()
    if path.suffix != ".jsonl":
        raise ConfigError(
            f"--write-requests: got {path.name}, expected a name that ends in .jsonl, which is all "
            "that `vllm bench serve` reads."
        )
    check_file(path, "--write-requests")
    requests = load_requests(settings.data, settings.image_root, settings.most_requests)
    write_requests(path, requests.samples)
    print(f"{path}: {len(requests.samples)} requests from {requests.source}")
    return 0
