"""Decoding speed of the widened demo pair on this GPU, by requests at once.

    python tools/offline_gpu/bench_gpu.py 7B
    python tools/offline_gpu/bench_gpu.py 1B --batches 1 8 --mode eager --flash

What benchmarks/bench_trees.py asks at batch 1 on a CPU, asked in bf16 under CUDA graphs: no
speculation, a chain of 5 and a tree of 24 nodes, in turn in every round. A number of requests is
kept in the engine, a new one for each that ends; answers end where they end by themselves.
`--flash` also times no speculation with flash attention, vLLM's own choice on such a GPU. `auto`
leaves the sizes to the plugin, of a chain and of a tree of 24. The pair computes what the small one
does, so acceptance is that of the small pair.

`--profile N` traces N steps of every engine at each batch size afterwards: what a step takes on the
GPU by kernel, how many kernels it launches, and for how long the GPU waits.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engines import MODES, Drafting, Engine, demo_pair, held_out_samples, options, wide_pair, write

from vllm_msd.errors import MSDError
from vllm_msd.provenance import provenance

NONE, FLASH = "none", "none, flash attention"
DRAFTINGS = {
    NONE: None,
    "chain 5": Drafting(5),
    "tree 24": Drafting(24, 5, 4),
    "tree 60": Drafting(60, 6, 10),
    "auto chain": Drafting(5),
    "auto tree": Drafting(24, 5, 4),
    FLASH: None,
}
USUAL = [NONE, "chain 5", "tree 24"]
SAMPLES, MAX_TOKENS = 14, 128
READ = 3  # steps after which the prompts that came last are read
START = time.monotonic()


def say(*words: object) -> None:
    """Print with the time since the start."""
    print(f"[{time.monotonic() - START:6.1f} s]", *words, flush=True)


@dataclass
class Served:
    """What an engine did with some requests.

    steps: seconds of each engine step while all places were taken and no prompt was read. tokens,
    seconds: of everything, prompts included. verifications, accepted: of drafts, 0 without
    speculation.
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
    """Answer the prompts greedily, ``batch`` at once, in their order.

    Their images are made ready before the clock starts: a server does that beside its steps, an
    engine in this process between them.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    params = SamplingParams(
        temperature=0, max_tokens=max_tokens, output_kind=RequestOutputKind.DELTA
    )
    rendered = engine.llm.renderer.render_cmpl(list(prompts))
    served, waiting, running = Served(), list(enumerate(rendered)), set()
    recorder = engine._record
    recorder.take()
    begin = now = time.perf_counter()
    since = 0  # steps since the last request came
    while waiting or running:
        since += 1
        while waiting and len(running) < batch:
            number, prompt = waiting.pop(0)
            engine.llm.add_request(str(number), prompt, params)
            running.add(number)
            served.ids[number], since = [], 0
        full = len(running) == batch
        for output in engine.llm.step():
            number = int(output.request_id.split("-")[0])
            served.ids[number] += output.outputs[0].token_ids
            if output.finished:
                running.discard(number)
        before, now = now, time.perf_counter()
        if full and since >= READ:
            served.steps.append(now - before)
        if (stats := recorder.take()) is not None:
            served.verifications += stats.num_drafts
            served.accepted += stats.num_accepted_tokens
    served.seconds = now - begin
    return served


def compare(
    engines: dict[str, Engine], args: argparse.Namespace, rows: list[dict[str, Any]]
) -> Iterator[None]:
    """A row for each batch and engine: the figures of every round. Yields after each batch."""
    samples = held_out_samples(SAMPLES)
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
        yield


def draft_of(name: str, pair: Any) -> dict[str, Any]:
    """What the engine is told of speculation; `auto` takes its largest sizes from the draft."""
    drafting = DRAFTINGS[name]
    if drafting is None or not name.startswith("auto"):
        return {} if drafting is None else {"draft": pair.draft, "drafting": drafting}
    own, folder = Path(pair.draft), Path(tempfile.mkdtemp())
    sizes = {"num_speculative_tokens": drafting.num_tokens}
    if drafting.is_tree:
        sizes |= {"tree_depth": drafting.depth, "tree_top_k": drafting.top_k}
    config = json.loads((own / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | sizes))
    (folder / "model.safetensors").symlink_to(own.resolve() / "model.safetensors")
    return {"speculative_config": {"method": "msd", "model": str(folder)}}


def start(name: str, pair: Any, args: argparse.Namespace) -> Engine:
    """An engine, warmed up."""
    drafting = DRAFTINGS[name]
    spec = draft_of(name, pair)
    engine_options = options(
        args.mode,
        requests=max(args.batches),
        rows=1 if drafting is None else drafting.num_tokens + 1,
        gib=args.kv_gib,
        backend="FLASH_ATTN" if name == FLASH else "TRITON_ATTN",
    )
    if name.startswith("auto"):  # graphs of all its sizes, which the plugin chooses
        engine_options.get("compilation_config", {}).pop("cudagraph_capture_sizes", None)
    engine = Engine(
        pair.target,
        dtype=args.dtype,
        max_model_len=512,
        **spec,
        **engine_options,
    )
    engine.answer(held_out_samples(1)[0], 16)
    say(name, "engine up")
    return engine


def traced(engine: Engine, prompts: Sequence[Any], steps: int) -> dict[str, Any]:
    """So many steps of one request a prompt under PyTorch's profiler: a step's parts, in ms."""
    import torch
    from torch.profiler import ProfilerActivity, profile
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=384, ignore_eos=True)
    for number, prompt in enumerate(prompts):
        engine.llm.add_request(f"traced-{number}", prompt, params)
    for _ in range(8):  # prompts, and the first steps
        engine.llm.step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        begin = time.perf_counter()  # the profiler's own start does not count
        for _ in range(steps):
            engine.llm.step()
        torch.cuda.synchronize()
        wall = time.perf_counter() - begin
    engine.llm.abort_request([f"traced-{number}" for number in range(len(prompts))])
    while engine.llm.has_unfinished_requests():
        engine.llm.step()
    kernels = [k for k in found.key_averages() if k.device_type == torch.autograd.DeviceType.CUDA]
    kernels.sort(key=lambda k: -k.self_device_time_total)
    per_step = {
        k.key[:100]: [round(k.self_device_time_total / 1e3 / steps, 4), round(k.count / steps, 1)]
        for k in kernels[:40]
    }
    return {
        "steps": steps,
        "wall_ms": round(wall / steps * 1e3, 3),
        "gpu_ms": round(sum(k.self_device_time_total for k in kernels) / 1e3 / steps, 3),
        "launches": round(sum(k.count for k in kernels) / steps, 1),
        "kernels": per_step,
    }


def record_name(args: argparse.Namespace) -> str:
    """Name of the result's file."""
    return f"speed_{args.size}_{args.mode}.json"


def trace_all(engines: dict[str, Engine], args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each batch and engine."""
    samples, rows = held_out_samples(SAMPLES), []
    for batch in args.batches:
        for name, engine in engines.items():
            prompts = [engine.prompt(samples[i % SAMPLES]) for i in range(batch)]
            rows.append({"batch": batch, "drafted": name, **traced(engine, prompts, args.profile)})
            say("profile", json.dumps({k: v for k, v in rows[-1].items() if k != "kernels"}))
    return rows


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
    parser.add_argument("--arms", nargs="+", choices=DRAFTINGS, default=USUAL)
    parser.add_argument("--flash", action="store_true", help="also flash attention, no speculation")
    parser.add_argument("--profile", type=int, default=0, metavar="N", help="trace N steps")
    args = parser.parse_args()
    if NONE not in args.arms:
        parser.error(f"--arms: expected {NONE!r} among them, what all others are compared with")
    if min(args.batches) < 1 or args.rounds < 1 or args.max_tokens < 1:
        parser.error("--batches, --rounds and --max-tokens: expected whole numbers from 1 on")
    record = provenance(**vars(args))  # before an engine binds its threads to cores
    try:
        pair = demo_pair() if args.size == "demo" else wide_pair(
            args.size, dtype=args.dtype, report=lambda line: say(line)
        )  # fmt: skip
        say("the pair is there")
        names = dict.fromkeys([*args.arms, *([FLASH] if args.flash else [])])
        engines = {name: start(name, pair, args) for name in names}
        record["speed"] = []
        for _ in compare(engines, args, record["speed"]):  # a run cut short keeps what it has
            write(record_name(args), json.dumps(record, indent=1))
        if args.profile:
            record["profile"] = trace_all(engines, args)
    except MSDError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    write(record_name(args), json.dumps(record, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
