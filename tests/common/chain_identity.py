"""Chain drafting on the constructed pairs: every way to ask for tokens, with and without MSD.

One process opens two engines (plain, MSD), runs the same cases on both, and reports which cases
differ and what each case saw (accepted and rejected drafts, preemptions, cached tokens). Sizes are
small on purpose: 44 tokens a step cut prompts inside images, 23 blocks force preemption, and the
encoder cache holds one image of 25 tokens at a time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.common import tiny
from tests.common.cuda_graphs.engines import replays
from tests.common.fp32_engine import acceptance, counted, open_engine, runner_of

MAX_MODEL_LEN = 320
OPTIONS: dict[str, Any] = {
    "max_model_len": MAX_MODEL_LEN,
    "max_num_batched_tokens": 44,
    "max_num_seqs": 6,
    "block_size": 32,
    "num_gpu_blocks_override": 23,
    "kv_cache_memory_bytes": 16 << 20,
    "enable_prefix_caching": True,
    # The same picture must reach the engine's own caches again, not the front end's.
    "mm_processor_cache_gb": 0,
}

# Text and pictures of the third prompt of `mixed_batch`.
THREE_PICTURES = ("{} and {} and then {} compare them", 2, 3, 4)


def engine_options(kind: str) -> dict[str, Any]:
    """Engine arguments of both engines."""
    limits = {"image": 3}
    if tiny.FAMILIES[kind].takes_video:
        limits["video"] = 0
    return {**OPTIONS, "limit_mm_per_prompt": limits}


@dataclass
class Run:
    """One engine and what its cases leave for the other engine's run."""

    engine: Any
    kind: str
    shared: dict[str, Any]  # filled by the plain run, read by the MSD run
    seen: dict[str, Any] = field(default_factory=dict)  # facts about this run of the case

    def prompt(self, text: str, *images: int) -> dict[str, Any]:
        """A prompt with the pictures of these seeds."""
        return tiny.prompt(self.kind, text, [tiny.picture(self.kind, seed) for seed in images])

    def ask(self, prompts: list[dict], params: Any = None, **overrides: Any) -> list[Any]:
        """Answers as plain data: ids, text, finish and stop reason of every sample."""
        if params is None:
            params = greedy(**overrides)
        outputs = self.engine.generate(prompts, params, use_tqdm=False)
        self.seen["prompt_tokens"] = [len(o.prompt_token_ids) for o in outputs]
        self.seen["cached_tokens"] = [o.num_cached_tokens for o in outputs]
        return [
            [[list(c.token_ids), c.text, c.finish_reason, c.stop_reason] for c in o.outputs]
            for o in outputs
        ]

    def metric(self, name: str) -> float:
        """A counter of vLLM's, such as ``vllm:num_preemptions``."""
        return sum(m.value for m in self.engine.get_metrics() if m.name == name)


def greedy(**overrides: Any) -> Any:
    """Greedy sampling parameters that do not stop by themselves."""
    from vllm import SamplingParams

    return SamplingParams(**{"temperature": 0.0, "max_tokens": 32, "ignore_eos": True} | overrides)


def mixed_batch(run: Run) -> Any:
    """Text-only requests and one to three images in one batch, prompts cut in many chunks."""
    return run.ask(
        [
            run.prompt("how are you?"),
            run.prompt("look: {} what is it?", 1),
            run.prompt(*THREE_PICTURES),
            run.prompt("a request that has no image but goes on, to be cut in chunks " * 3),
            run.prompt("{}", 5),
            run.prompt("the last one: {} is short", 6),
            run.prompt("one more in the queue, {}?", 1),
        ],
        max_tokens=40,
    )


def chunk_inside_image(run: Run) -> Any:
    """Alone in the batch, so the first chunk ends at row 44: inside the first image."""
    tokenizer = run.engine.get_tokenizer()
    placeholder = tokenizer.convert_tokens_to_ids(tiny.FAMILIES[run.kind].image_token)
    prompt = run.prompt("thirty-five characters before it: {} and {}", 7, 8)
    output = run.engine.generate([prompt], greedy(), use_tqdm=False)[0]
    ids, limit = output.prompt_token_ids, OPTIONS["max_num_batched_tokens"]
    run.seen["cut_inside_image"] = ids[limit - 1] == ids[limit] == placeholder
    return list(output.outputs[0].token_ids)


def adjacent_images(run: Run) -> Any:
    """The encoder cache cannot hold two LLaVA images at once."""
    return run.ask([run.prompt("{}{}{} three", 9, 10, 11), run.prompt("text beside it")])


def prefix_cache(run: Run) -> Any:
    """Text and image prefixes hit; another picture under the same text must not."""
    long = "a prefix of text that fills more than one block, so that it can be found again. "
    prompts = [
        run.prompt(long + "what now?"),
        run.prompt("{} " + long + "what is it?", 12),
        run.prompt(long + "{} in the middle {} of a second block of text?", 13, 14),
    ]
    first = run.ask(prompts)
    second = run.ask([*prompts, run.prompt("{} " + long + "what is it?", 15)])
    run.seen["repeated"] = first == second[:3]
    return [first, second]


def multi_turn(run: Run) -> Any:
    """Three turns by the chat template, each with the answer of the one before; two with images."""
    messages: list[dict] = []
    answers = []
    for turn, text in enumerate(("what is this?", "and this one?", "thanks, why?")):
        content: list[dict] = [{"type": "text", "text": text}]
        if turn < 2:
            content.insert(0, {"type": "image_pil", "image_pil": tiny.image(20 + turn)})
        messages.append({"role": "user", "content": content})
        output = run.engine.chat(messages, greedy(max_tokens=20), use_tqdm=False)[0]
        answers.append(list(output.outputs[0].token_ids))
        messages.append({"role": "assistant", "content": output.outputs[0].text})
    return answers


def preemption(run: Run) -> Any:
    """Six long requests want 30 blocks and more, the cache has 22."""
    before = run.metric("vllm:num_preemptions")
    prompts = [run.prompt(f"{i}: {{}}" + " tell a long story" * 4, 30 + i) for i in range(6)]
    answers = run.ask(prompts, max_tokens=80)
    run.seen["preemptions"] = run.metric("vllm:num_preemptions") - before
    return answers


def several_samples(run: Run) -> Any:
    """n = 3. Top-1 sampling has one answer, so the samples can be compared token for token."""
    return run.ask(
        [run.prompt("{} tell", 1), run.prompt("tell me")], temperature=1.0, top_k=1, n=3,
        max_tokens=16,
    )  # fmt: skip


def logprobs(run: Run) -> Any:
    """Logprobs of output tokens and of the prompt's."""
    outputs = run.engine.generate(
        [run.prompt("numbers: {}", 2), run.prompt("numbers!")],
        [greedy(logprobs=3, max_tokens=20), greedy(logprobs=0, prompt_logprobs=2, max_tokens=20)],
        use_tqdm=False,
    )

    def plain(table: list[dict | None] | None) -> Any:
        return table and [
            step and {str(token): round(entry.logprob, 3) for token, entry in sorted(step.items())}
            for step in table
        ]

    return [
        [list(o.outputs[0].token_ids), plain(o.outputs[0].logprobs), plain(o.prompt_logprobs)]
        for o in outputs
    ]


def penalties(run: Run) -> Any:
    """Repetition, presence and frequency penalties, and forbidden words."""
    from vllm import SamplingParams

    def params(**overrides: Any) -> SamplingParams:
        return SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True, **overrides)

    prompt = run.prompt("again: {}", 3)
    common = run.ask([prompt])[0][0][1]
    return run.ask(
        [prompt] * 4,
        [
            params(repetition_penalty=1.5),
            params(presence_penalty=1.5, frequency_penalty=0.5),
            params(bad_words=[common[4], common[9]]),
            params(),
        ],
    )


def stop_conditions(run: Run) -> Any:
    """Stop strings and stop tokens (some within a draft), with and without ``min_tokens``."""
    prompt = run.prompt("stop: {}", 4)
    ids, text = run.ask([prompt])[0][0][:2]
    stop = run.shared.setdefault("stop", text[9:11])
    stop_token = run.shared.setdefault("stop_token", ids[6])
    return run.ask(
        [prompt] * 4,
        [
            greedy(stop=[stop]),
            greedy(stop=[stop], include_stop_str_in_output=True, min_tokens=14),
            greedy(stop_token_ids=[stop_token]),
            greedy(stop_token_ids=[stop_token], min_tokens=14),
        ],
    )


def structured_output(run: Run) -> Any:
    """A regular expression, a choice and a JSON schema, beside a free request."""
    from vllm.sampling_params import StructuredOutputsParams as Structured

    schema = {"type": "object", "properties": {"n": {"enum": [1, 25, 40]}}, "required": ["n"]}
    prompts = [run.prompt("{} say", 5), run.prompt("say"), run.prompt("{} say", 6), run.prompt("?")]
    constraints = [
        Structured(regex="(ab|cd|[x-z]{3}){8}"),
        Structured(choice=["a long answer to choose", "b is shorter"]),
        Structured(json=schema),
        None,
    ]
    params = [greedy(structured_outputs=c, ignore_eos=c is None) for c in constraints]
    return run.ask(prompts, params)


def end_of_context(run: Run) -> Any:
    """One request runs into ``max_model_len`` while others go on."""
    long = run.prompt("{} " + "x" * 265, 7)
    params = [greedy(max_tokens=MAX_MODEL_LEN), greedy(max_tokens=48)]
    answers = run.ask([long, run.prompt("short {}", 8)], params)
    run.seen["reached_the_end"] = answers[0][0][2] == "length" and len(answers[0][0][0]) < 48
    return answers


def streaming(run: Run) -> Any:
    """Tokens as they come; one stream is aborted halfway."""
    from vllm.sampling_params import RequestOutputKind

    engine = run.engine.llm_engine
    texts: dict[str, str] = {}
    prompts = {"a": run.prompt("stream {}", 9), "b": run.prompt("stream"), "c": run.prompt("c?")}
    for name, prompt in prompts.items():
        engine.add_request(name, prompt, greedy(output_kind=RequestOutputKind.DELTA))
    while engine.has_unfinished_requests():
        for output in engine.step():
            texts[output.request_id] = texts.get(output.request_id, "") + output.outputs[0].text
            if output.request_id == "b" and len(texts["b"]) > 12:
                engine.abort_request(["b"])
    return [texts["a"], texts["b"][:12], texts["c"]]


CASES: dict[str, Callable[[Run], Any]] = {
    case.__name__: case
    for case in (
        mixed_batch, chunk_inside_image, adjacent_images, prefix_cache, multi_turn, preemption,
        several_samples, logprobs, penalties, stop_conditions, structured_output, end_of_context,
        streaming,
    )
}  # fmt: skip


Cases = Mapping[str, Callable[[Run], Any]]


def answers_of_plain_engine(
    target: str, kind: str, runner: str, cases: Cases
) -> tuple[dict[str, Any], dict[str, dict]]:
    """What every case gives without speculation, and what it left in ``Run.shared``."""
    from vllm.distributed import cleanup_dist_env_and_memory

    plain = open_engine(target, None, **engine_options(kind))
    require_runner(plain, runner)
    shared: dict[str, dict] = {name: {} for name in cases}
    answers = {name: case(Run(plain, kind, shared[name])) for name, case in cases.items()}
    plain.llm_engine.engine_core.shutdown()
    del plain
    cleanup_dist_env_and_memory()
    return answers, shared


def require_runner(engine: Any, runner: str) -> None:
    """Raise RuntimeError when the engine uses another model runner than ``runner``."""
    if runner_of(engine) != runner:
        raise RuntimeError(f"wanted model runner {runner}, vLLM uses {runner_of(engine)}")


def check_case(run: Run, case: Callable[[Run], Any], expected: Any) -> dict[str, Any]:
    """Run a case on the engine with MSD; whether it gave the same, and what it saw."""
    before = acceptance(run.engine)
    got = case(run)
    return {
        "same": got == expected,
        "first_difference": first_difference(expected, got),
        **counted(acceptance(run.engine) - before),
        **run.seen,
    }


def chain_identity(
    *,
    runner: str,
    kind: str,
    target: str,
    draft: str,
    cases: list[str] | None = None,
    tensor_parallel_size: int = 1,
) -> dict[str, Any]:
    """Run the cases (default: all) with and without MSD; one entry for each in the report.

    ``tensor_parallel_size`` is that of the MSD engine.
    """
    started = time.perf_counter()
    chosen = {name: CASES[name] for name in cases or CASES}
    expected, shared = answers_of_plain_engine(target, kind, runner, chosen)
    engine = open_engine(
        target, draft, tensor_parallel_size=tensor_parallel_size, **engine_options(kind)
    )
    if tensor_parallel_size == 1:
        require_runner(engine, runner)
    results = {
        name: check_case(Run(engine, kind, shared[name]), case, expected[name])
        for name, case in chosen.items()
    }
    return {
        "cases": results,
        "total": counted(acceptance(engine)),
        "replays": replays(engine),
        "seconds": round(time.perf_counter() - started, 1),
    }


def first_difference(expected: Any, got: Any) -> str | None:
    """Where two answers part, for the test's message."""
    if expected == got:
        return None
    if isinstance(expected, list) and isinstance(got, list) and len(expected) == len(got):
        i = next(i for i, (a, b) in enumerate(zip(expected, got, strict=True)) if a != b)
        return f"[{i}]{first_difference(expected[i], got[i])}"
    return f": expected {expected!r}, got {got!r}"
