"""Decoding speed of the widened demo pair on this GPU, by requests at once.

    python tools/offline_gpu/bench_gpu.py 7B
    python tools/offline_gpu/bench_gpu.py 1B --batches 1 8 --mode eager --flash

What benchmarks/bench_trees.py asks at batch 1 on a CPU, asked in bf16 under CUDA graphs: no
speculation, a chain of 5 and a tree of 24 nodes, in turn in every round. A number of requests is
kept in the engine, a new one for each that ends; answers end where they end by themselves.
`--flash` also times no speculation with flash attention, vLLM's own choice on such a GPU. The pair
computes what the small one does, so acceptance is that of the small pair.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from engines import MODES, Drafting, Engine, demo_pair, held_out_samples, options, wide_pair, write

from vllm_msd.errors import MSDError
from vllm_msd.provenance import provenance

NONE, FLASH = "none", "none, flash attention"
DRAFTINGS = {NONE: None, "chain 5": Drafting(5), "tree 24": Drafting(24, 5, 4)}
SAMPLES, MAX_TOKENS = 14, 128
START = time.monotonic()


def say(*words: object) -> None:
    """Print with the time since the start."""
    print(f"[{time.monotonic() - START:6.1f} s]", *words, flush=True)


@dataclass
class Served:
    """What an engine did with some requests.

    steps: seconds of each engine step while all places were taken. tokens, seconds: of everything,
    prompts included. verifications, accepted: of drafts, 0 without speculation.
    """

    ids: dict[int, list[int]] = field(default_factory=dict)
    steps: list[float] = field(default_factory=list)
    seconds: float = 0.0
    verifications: int = 0
    accepted: int = 0

    @property
    def tokens(self) -> int:
        """Tokens emitted by all requests."""
        return sum(map(len, self.ids.values()))

    def figures(self) -> dict[str, Any]:
        """For the record: speed, the median step, tokens per verification."""
        length = 1 + self.accepted / self.verifications if self.verifications else None
        return {
            "tokens_per_second": round(self.tokens / self.seconds, 1),
            "median_step_ms": round(statistics.median(self.steps) * 1e3, 3) if self.steps else None,
            "tokens_per_verification": length and round(length, 3),
        }


def serve(engine: Engine, prompts: Sequence[Any], batch: int, max_tokens: int) -> Served:
    """Answer the prompts greedily, ``batch`` at once, in their order."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    params = SamplingParams(
        temperature=0, max_tokens=max_tokens, output_kind=RequestOutputKind.DELTA
    )
    served, waiting, running = Served(), list(enumerate(prompts)), set()
    recorder = engine._record
    recorder.take()
    begin = now = time.perf_counter()
    while waiting or running:
        while waiting and len(running) < batch:
            number, prompt = waiting.pop(0)
            engine.llm.add_request(str(number), prompt, params)
            running.add(number)
            served.ids[number] = []
        full = len(running) == batch
        for output in engine.llm.step():
            number = int(output.request_id.split("-")[0])
            served.ids[number] += output.outputs[0].token_ids
            if output.finished:
                running.discard(number)
        before, now = now, time.perf_counter()
        if full:
            served.steps.append(now - before)
        if (stats := recorder.take()) is not None:
            served.verifications += stats.num_drafts
            served.accepted += stats.num_accepted_tokens
    served.seconds = now - begin
    return served


def compare(engines: dict[str, Engine], args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each batch and engine: the figures of every round."""
    samples = held_out_samples(SAMPLES)
    rows = []
    for batch in args.batches:
        count = max(SAMPLES, 3 * batch)
        found: dict[str, list[Served]] = {name: [] for name in engines}
        for round_index in range(args.rounds):
            names = list(engines)
            first = round_index % len(names)  # none is favoured by going first
            for name in names[first:] + names[:first]:
                prompts = [engines[name].prompt(samples[i % SAMPLES]) for i in range(count)]
                found[name].append(serve(engines[name], prompts, batch, args.max_tokens))
        plain = found[NONE][0].ids
        for name, rounds in found.items():
            row = {"batch": batch, "drafted": name, "requests": count}
            row["identical"] = sum(rounds[0].ids[i] == ids for i, ids in plain.items())
            row["rounds"] = [one.figures() for one in rounds]
            speeds = [one["tokens_per_second"] for one in row["rounds"]]
            base = [one.figures()["tokens_per_second"] for one in found[NONE]]
            row["speedup"] = round(statistics.median(speeds) / statistics.median(base), 3)
            rows.append(row)
            say(f"batch {batch}, {name}: {json.dumps(row)}")
    return rows


def start(name: str, pair: Any, args: argparse.Namespace) -> Engine:
    """An engine, warmed up."""
    drafting = DRAFTINGS.get(name)
    spec = {} if drafting is None else {"draft": pair.draft, "drafting": drafting}
    engine = Engine(
        pair.target,
        dtype=args.dtype,
        max_model_len=512,
        **spec,
        **options(
            args.mode,
            requests=max(args.batches),
            rows=1 if drafting is None else drafting.num_tokens + 1,
            gib=args.kv_gib,
            backend="FLASH_ATTN" if name == FLASH else "TRITON_ATTN",
        ),
    )
    engine.answer(held_out_samples(1)[0], 16)
    say(name, "engine up")
    return engine


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("size", help="parameters of the widened pair, or `demo` for the small one")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32], help="requests")
    parser.add_argument("--mode", default="graphs", choices=MODES)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--max-tokens", type=int, default=MAX_TOKENS)
    parser.add_argument("--kv-gib", type=float, default=6, help="KV cache of each engine")
    parser.add_argument("--flash", action="store_true", help="also flash attention, no speculation")
    args = parser.parse_args()
    if min(args.batches) < 1 or args.rounds < 1 or args.max_tokens < 1:
        parser.error("--batches, --rounds and --max-tokens: expected whole numbers from 1 on")
    record = provenance(**vars(args))  # before an engine binds its threads to cores
    try:
        pair = demo_pair() if args.size == "demo" else wide_pair(
            args.size, dtype=args.dtype, report=lambda line: say(line)
        )  # fmt: skip
        say("the pair is there")
        names = [*DRAFTINGS, *([FLASH] if args.flash else [])]
        record["speed"] = compare({name: start(name, pair, args) for name in names}, args)
    except MSDError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    write(f"speed_{args.size}_{args.mode}.json", json.dumps(record, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
