"""Measure what draft vocabularies bring and cost in vLLM: decoding speed and accepted tokens.

    python -m benchmarks.bench_vocabulary --real build/real/own/own.json \\
        --num-prompts 18 --rounds 2 --max-tokens 96 --output benchmarks/results/vocabulary.json
    python -m benchmarks.bench_vocabulary --target T --draft D --trimmed D-8k D-16k \\
        --data replies.jsonl
    python -m benchmarks.bench_vocabulary --target T --draft D --trimmed D-8k \\
        --data replies.jsonl --tree 16x6x3 --num-prompts 40 --rounds 5

The draft as it is, its trimmed copies (`vllm-msd trim`) and no speculation answer the same
questions at batch 1, greedily, all engines in one process and in turn, so that a machine that slows
down in between favours none. A speed-up is the median of the rounds' ratios. Answers must be those
of no speculation where nothing rounds (float32).

--real takes the real language model's pair and people's prompts that its draft never saw. Its draft
was trained with a vocabulary of 8,192 tokens, which only the head knows of, so any other size is a
matter of counting: the file that --real names holds replies of the target (`python -m
demo_factory.real.build --until own` leaves one), and --sizes are made from it. ``whole`` is the
same draft over all tokens of the target. What lies outside the 8,192 it has learned by the hidden
states alone.

On a CPU the engines share the target's weights; starting one needs room for them twice.
"""

import argparse
import json
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.bench_trees import tree
from vllm_msd.errors import DataError, MSDError
from vllm_msd.measure.engine import Drafting, restart_tuned, timed_dtype
from vllm_msd.measure.inputs import Pair, Sample

WHOLE = "whole"


def main() -> int:
    """Run the benchmark; 1 where float32 answers differ from those of no speculation."""
    args = parse()
    restart_tuned()

    from vllm_msd.provenance import provenance

    if args.dtype == "auto":
        args.dtype = timed_dtype()
    settings = {key: value for key, value in vars(args).items() if key not in ("output", "work")}
    for name in ("target", "draft", "data", "real", "tree"):
        settings[name] = None if settings[name] is None else str(settings[name])
    try:
        result: dict[str, Any] = provenance(**settings)
        with tempfile.TemporaryDirectory(dir=args.work) as made:
            result |= measure(args, *(real(args, Path(made)) if args.real else given(args)))
    except MSDError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(result))
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=1) + "\n")
    is_same = all(one["identical"] == one["requests"] for one in result["drafts"].values())
    return 0 if is_same or args.dtype != "float32" else 1


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--real", type=Path, metavar="REPLIES", help="the real pair; its target's replies")
    add("--sizes", nargs="+", type=int, default=[2048, 16384],
        help="of --real, beside the draft's own (default: 2048 16384)")  # fmt: skip
    add("--target", type=Path, help="folder of the target")
    add("--draft", type=Path, help="folder of the draft as it is")
    add("--trimmed", nargs="+", help="folders of its trimmed copies")
    add("--data", type=Path, help="conversations; each one's last question is asked")
    add("--image-root", nargs="+", default=[], help="where relative image paths start")
    add("--chain", type=int, default=5, help="drafted tokens (default: 5)")
    add("--tree", type=tree, help="NODESxDEPTHxTOP_K, in the place of a chain")
    add("--num-prompts", type=int, default=21, help="the first ones (default: 21)")
    add("--max-tokens", type=int, default=192, help="of an answer (default: 192)")
    add("--rounds", type=int, default=3, help="(default: 3)")
    add("--max-model-len", type=int, default=1024, help="(default: 1024)")
    add("--dtype", choices=("auto", "bfloat16", "float32"), default="auto")
    add("--work", type=Path, help="where --real writes drafts (default: a temporary folder)")
    add("--output", type=Path, help="write the figures as JSON")
    args = parser.parse_args()
    pair = ("target", "draft", "trimmed", "data")
    missing = [f"--{name}" for name in pair if getattr(args, name) is None]
    if not args.real and missing:
        parser.error(f"{', '.join(missing)} missing. Give these four, or --real.")
    if args.real and len(missing) < len(pair):
        parser.error("--real takes a target, a draft and questions of its own. Leave others out.")
    return args


def questions(path: Path, image_root: list[str], count: int) -> list[Sample]:
    """The last questions of the first records."""
    from vllm_msd.training.data.batches import kind_of
    from vllm_msd.training.data.images import load_image
    from vllm_msd.training.data.index import RecordFile, image_roots
    from vllm_msd.training.data.records import BadRecordError

    file = RecordFile(path)
    roots = image_roots(image_root, [file])
    samples = []
    try:
        for number in range(min(count, len(file))):
            record = file[number]
            images = [load_image(name, roots) for name in record.images]
            samples.append(Sample(images, record.messages[:-1], kind_of(record, file)))
    except BadRecordError as error:
        raise DataError(f"{path}, line {file.line(number)}: {error}") from error
    return samples


# Target, questions, and drafts by name, ``whole`` among them.
Contest = tuple[Path, list[Sample], dict[str, Path]]


def given(args: argparse.Namespace) -> Contest:
    """What the command line names."""
    drafts = {WHOLE: args.draft} | {Path(name).name: Path(name) for name in args.trimmed}
    return args.target, questions(args.data, args.image_root, args.num_prompts), drafts


def real(args: argparse.Namespace, folder: Path) -> Contest:
    """The real pair's draft over vocabularies of several sizes."""
    import torch

    from vllm_msd.checkpoint import load_draft, save_draft, with_vocabulary
    from vllm_msd.demo.real.pair import real_pair, real_samples
    from vllm_msd.draft.vocabulary import OFFSETS
    from vllm_msd.training.data.index import RecordFile
    from vllm_msd.training.targets import load_renderer
    from vllm_msd.training.vocabulary import check_size, choose, count_replies, special_ids

    samples = real_samples(args.num_prompts)
    pair = real_pair(lambda line: print(line, file=sys.stderr))
    config, state = load_draft(pair.draft)
    drafts = {WHOLE: folder / WHOLE}
    renderer, _ = load_renderer(str(pair.target))
    special = special_ids(renderer, config.num_token_ids)
    for size in args.sizes:
        check_size(size, special, config.num_token_ids, "--sizes")
    file = RecordFile(args.real)
    with tqdm(total=len(file), unit="record", desc="counting tokens") as bar:
        counts = count_replies(renderer, [file], config.num_token_ids, report=bar.update)
    whole = {name: x for name, x in state.items() if name != OFFSETS}
    config = replace(config, draft_vocab_size=None)
    save_draft(drafts[WHOLE], config, whole)
    for size in args.sizes:
        ids = torch.from_numpy(choose(counts.counted + counts.held_out, special, size))
        drafts[f"{size:,}"] = save_draft(folder / str(size), *with_vocabulary(config, whole, ids))
    drafts["as it comes"] = pair.draft
    return pair.target, samples, drafts


def measure(
    args: argparse.Namespace, target: Path, samples: list[Sample], drafts: dict[str, Path]
) -> dict[str, Any]:
    """Figures by draft."""
    import torch

    from vllm_msd.checkpoint import load_draft_config
    from vllm_msd.measure.compare import PLAIN, compare, figures, rates

    sizes = {name: load_draft_config(folder).draft_vocab_size for name, folder in drafts.items()}
    drafting = args.tree or Drafting(args.chain)
    comparisons = compare(
        Pair(target, drafts[WHOLE]),
        samples,
        dict.fromkeys(drafts, drafting),
        dtype=args.dtype,
        max_tokens=args.max_tokens,
        rounds=args.rounds,
        on_answer=lambda _: print(".", end="", flush=True),
        share_weights=not torch.cuda.is_available(),
        drafts=drafts,
        max_model_len=args.max_model_len,
    )
    print()
    speeds = {name: rates(comparisons, name) for name in (PLAIN, *drafts)}
    found: dict[str, Any] = {}
    for name in drafts:
        one = figures(comparisons, name)
        found[name] = {
            "draft_vocab_size": sizes[name],
            "requests": one["requests"],
            "identical": one["identical"],
            "acceptance_length": one["all"]["acceptance_length"],
            "tokens_per_second": one["speed"]["msd_tokens_per_second"],
            "tokens_per_second_per_round": speeds[name],
            "speedup_over_none": one["speed"]["speedup"],
            "speedup_over_whole": _median_ratio(speeds[name], speeds[WHOLE]),
            "accepted_of_whole": None,
        }
    accepted = (found[WHOLE]["acceptance_length"] or 1) - 1
    for one in found.values():
        if accepted > 0:
            one["accepted_of_whole"] = ((one["acceptance_length"] or 1) - 1) / accepted
    found = dict(sorted(found.items(), key=lambda item: item[1]["draft_vocab_size"] or sys.maxsize))
    plain = {"tokens_per_second_per_round": speeds[PLAIN]}
    return {"drafting": str(drafting), "dtype": args.dtype, "plain": plain, "drafts": found}


def _median_ratio(mine: list[float | None], theirs: list[float | None]) -> float | None:
    ratios = [a / b for a, b in zip(mine, theirs, strict=True) if a and b]
    return statistics.median(ratios) if ratios else None


def table(result: dict[str, Any]) -> str:
    """What a person wants to see of it."""
    lines = [f"{'draft':<24}{'tokens':>9}{'tok/s':>9}{'x none':>8}{'x whole':>9}{'accepted':>10}"]
    for name, one in result["drafts"].items():
        size = f"{one['draft_vocab_size']:,}" if one["draft_vocab_size"] else "all"
        kept = one["accepted_of_whole"]
        lines.append(
            f"{name:<24}{size:>9}{_number(one['tokens_per_second'], '.1f'):>9}"
            f"{_number(one['speedup_over_none'], '.2f'):>8}"
            f"{_number(one['speedup_over_whole'], '.2f'):>9}{_number(kept, '.1%'):>10}"
        )
    return "\n".join(lines)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


if __name__ == "__main__":
    sys.exit(main())
