"""Kinds of requests that need more than a prompt: LoRA adapters, videos, seeds beside other seeds.

One process serves them without speculation, with chains and with trees, for one tiny target. 80
tokens a step cut the longer prompts in chunks, videos included.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tests.common import tiny
from tests.common.chain_identity import Run, check_case, engine_options, greedy, require_runner
from tests.common.fp32_engine import running_engine

# Tokens, then depth and width of trees.
WAYS: dict[str, tuple[int, tuple[int, int] | None]] = {"chain": (5, None), "tree": (12, (4, 3))}
TOKENS_A_STEP = 80  # at least six requests' trees of 12 and a token, which vLLM demands with LoRA


def lora_adapters(folders: Sequence[str], run: Run) -> Any:
    """Each prompt to the base model and to every adapter, twice: the other way round at last."""
    from vllm.lora.request import LoRARequest

    loras = [LoRARequest(f"adapter-{i}", i, folder) for i, folder in enumerate(folders, 1)]
    asked = [None, *loras]
    text = "the same words for all of them, more than a block so that prefixes are found again"
    prompts = [run.prompt(text)] * len(asked) + [run.prompt(text + " {}", 1)] * len(asked)
    rounds = []
    for order in (asked, asked[::-1]):
        outputs = run.engine.generate(
            prompts, greedy(max_tokens=20), lora_request=order * 2, use_tqdm=False
        )
        rounds.append([list(output.outputs[0].token_ids) for output in outputs])
    run.seen["distinct"] = len({tuple(ids) for ids in rounds[0]})
    return rounds


def video(kind: str, seed: int, frames: int) -> Any:
    """A few small pictures as vLLM takes a video for a target of this kind."""
    pictures = np.stack([np.asarray(tiny.image(100 * seed + i, (84, 56))) for i in range(frames)])
    if kind in ("qwen2_vl", "llava_onevision"):
        return pictures
    return pictures, {
        "fps": 2.0,
        "duration": frames / 2,
        "total_num_frames": frames,
        "frames_indices": list(range(frames)),
        "video_backend": "opencv",
        "do_sample_frames": False,
    }


def videos(run: Run) -> Any:
    """Videos alone, beside pictures and beside text, and again from the prefix cache."""
    family = tiny.FAMILIES[run.kind]
    placeholder = family.placeholder.replace("image", "video")
    # vLLM ends at OneVision videos of different lengths in one step, speculation or not.
    lengths = (4, 4, 4) if run.kind == "llava_onevision" else (2, 4, 8)

    def prompt(text: str, images: Sequence[int] = (), clips: Sequence[int] = ()) -> dict:
        request = run.prompt(text, *images)
        request["prompt"] = request["prompt"].replace("[]", placeholder)
        if clips:
            made = [video(run.kind, seed, lengths[seed % 3]) for seed in clips]
            request.setdefault("multi_modal_data", {})["video"] = made
        return request

    prompts = [
        prompt("see [] there", clips=[1]),
        prompt("text only"),
        prompt("{} and [] now", [1], [2]),
        prompt("[] and {} then [] compare them all", [3], [4, 5]),
        prompt("see [] there", clips=[6]),
        prompt("a picture {} only", [4]),
    ]
    first = run.ask(prompts, max_tokens=20)
    run.seen["longest"] = max(run.seen["prompt_tokens"])
    run.seen["distinct"] = len({tuple(answer[0][0]) for answer in first})
    return [first, run.ask(prompts[::-1], max_tokens=20)]


def seeds_in_company(run: Run) -> Any:
    """Seeded requests alone, beside each other, and beside unseeded and greedy ones.

    Whether they are the same as without speculation is a matter of its own: ``same_as_plain``.
    """
    long = "a prompt that takes more than one step to read, since a step has room for so much only "
    seeded = [
        (run.prompt(long + "{}", 1), greedy(temperature=1.0, seed=1, max_tokens=16)),
        (run.prompt("short"), greedy(temperature=0.8, seed=2, max_tokens=20)),
        (run.prompt("{} once", 2), greedy(temperature=1.5, seed=1, max_tokens=16, top_k=30)),
    ]
    company = [
        (run.prompt(long), greedy(temperature=1.0, max_tokens=24)),
        (run.prompt("{} more", 3), greedy(max_tokens=12)),
        (run.prompt("and {} more", 4), greedy(temperature=2.0, seed=5, max_tokens=8, n=2)),
    ]

    def tokens(*requests: tuple[dict, Any]) -> list:
        # Prompts in the cache would not be read in chunks again.
        run.engine.reset_prefix_cache()
        prompts, params = map(list, zip(*requests, strict=True))
        return [answer[0][0] for answer in run.ask(prompts, params)]

    alone = [tokens(request)[0] for request in seeded]
    beside = [tokens(*seeded), tokens(*seeded, *company)[: len(seeded)]]
    run.seen["undisturbed"] = all(found == alone for found in beside)
    run.seen["lengths"] = [len(ids) for ids in alone]
    run.seen["distinct"] = len({tuple(ids) for ids in alone})
    run.seen["same_as_plain"] = run.shared.setdefault("alone", alone) == alone
    return run.seen["undisturbed"]


def request_identity(
    *,
    runner: str,
    kind: str,
    target: str,
    draft: str,
    cases: Sequence[str],
    adapters: Sequence[str] = (),
) -> dict[str, Any]:
    """Serve the cases without speculation and in both `WAYS`.

    Args:
        runner: ``v1`` or ``v2``.
        kind, target, draft: of a tiny pair.
        cases: names of functions above.
        adapters: their folders.

    Returns:
        `chain_identity.check_case` by way and case, and the seconds it took.
    """
    started = time.perf_counter()
    options = engine_options(kind) | {"max_num_batched_tokens": TOKENS_A_STEP}
    if tiny.FAMILIES[kind].takes_video:
        options["limit_mm_per_prompt"] = {"image": 3, "video": 2}
    if adapters:
        options |= {"enable_lora": True, "max_loras": len(adapters), "max_lora_rank": 8}
    # A place more than adapters: on a CPU vLLM 0.32 gives rows without an adapter the last place's.
    roomy = {**options, "max_loras": len(adapters) + 1} if adapters else options

    every: dict[str, Callable[[Run], Any]] = {
        "lora_adapters": functools.partial(lora_adapters, adapters),
        "videos": videos,
        "seeds_in_company": seeds_in_company,
    }
    shared: dict[str, dict] = {name: {} for name in cases}
    with running_engine(target, None, **roomy) as plain:
        require_runner(plain, runner)
        expected = {name: every[name](Run(plain, kind, shared[name])) for name in cases}
    results: dict[str, dict[str, Any]] = {}
    for way, (tokens, tree) in WAYS.items():
        with running_engine(target, draft, tokens, tree=tree, **options) as engine:
            require_runner(engine, runner)
            results[way] = {
                name: check_case(Run(engine, kind, shared[name]), every[name], expected[name])
                for name in cases
            }
    return {"ways": results, "seconds": round(time.perf_counter() - started, 1)}
