"""The distribution test: sequences sampled by real vLLM under MSD against the target's own law.

Used by ``tests/vllm/test_*_sampling.py``, ``tests/long/lossless.py`` and ``tests/long/soak.py``,
through ``tests.common.worker``. Settings are arguments of `distribution.warp` and of vLLM's
sampling alike.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from tqdm import tqdm

from tests.common.distribution import check_sequences
from tests.common.fp32_engine import acceptance, counted, open_engine, runner_of
from tests.common.small_vocabulary import ExactTarget, prompts
from tests.common.wrong_rules import WRONG_RULES, WRONG_TREE_RULES

Setting = dict[str, float]

NEUTRAL: Setting = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
SETTINGS: tuple[Setting, ...] = ({"temperature": 1.0}, {"temperature": 0.7, "top_p": 0.9})
BATCH = 12_500  # sequences of a prompt that are asked for at a time


def sampled_distribution(
    *,
    runner: str,
    target: str,
    draft: str | None,
    draws: int,
    control_draws: int,
    seed: int,
    spec_tokens: int = 2,
    tree: tuple[int, int] | None = None,
    settings: Sequence[Setting] = SETTINGS,
    draft_sample_method: str = "greedy",
    show_progress: bool = False,
) -> dict[str, Any]:
    """Test sequences of ``d + 2`` tokens sampled under MSD against the target's own law.

    Drafts are ``d`` deep. The first token comes from the prompt's prefill, the next ``d`` can be
    accepted drafts and the last one a bonus token. The pair is ``tests.common.small_vocabulary``'s.

    Args:
        draft: None samples without speculation, to try the test itself.
        draws: sequences for each setting, shared out evenly among the prompts.
        control_draws: the same for each wrong rule, at the first setting.
        spec_tokens: drafted tokens of a chain, or nodes of a tree.
        tree: its depth and width; None for a chain.
        settings: each with a part of ``NEUTRAL``'s keys.
        draft_sample_method: ``greedy`` drafts the likeliest token, ``probabilistic`` draws one from
            the draft's own law, which the acceptance rule then takes into account.
        show_progress: draw a bar on standard error for each setting.
    """
    if runner == "v2":
        use_torch_top_p()
        use_plain_log1p()
    exact = ExactTarget(target)
    started = time.perf_counter()
    engine = open_engine(
        target,
        draft,
        spec_tokens,
        tree=tree,
        max_model_len=128,
        max_num_seqs=256,
        max_num_batched_tokens=4096,
        block_size=32,
        draft_sample_method=draft_sample_method,
    )
    if runner_of(engine) != runner:
        raise RuntimeError(f"wanted model runner {runner}, vLLM uses {runner_of(engine)}")
    length = (spec_tokens if tree is None else tree[0]) + 2
    rules = (WRONG_RULES if tree is None else WRONG_TREE_RULES)[runner]
    trials = []
    for setting in settings:
        trials += sampling_trial(engine, exact, "none", setting, draws, length, seed, show_progress)
    for rule in rules if control_draws else ():
        with rule(runner):
            trials += sampling_trial(
                engine, exact, rule.__name__, settings[0], control_draws, length, seed
            )
    return {
        "runner": runner,
        "draft_sample_method": draft_sample_method,
        "tree": tree,
        "trials": trials,
        "seconds": round(time.perf_counter() - started, 1),
        "cpu_seconds": round(time.process_time(), 1),
    }


def use_torch_top_p() -> None:
    """Let vLLM take its PyTorch top-p: Triton's interpreter cannot run the kernel (Triton 3.9)."""
    from vllm.v1.sample.ops import topk_topp_sampler

    def apply(logits: Any, k: Any, p: Any, **_: Any) -> Any:  # 0.33 passes the kernel a hint
        return topk_topp_sampler.apply_top_k_top_p_pytorch(logits, k, p)

    topk_topp_sampler.apply_top_k_top_p_triton = apply


def use_plain_log1p() -> None:
    """Triton's interpreter has no function of CUDA's library; drawn drafts are resampled by one."""
    from triton import language as tl
    from vllm.v1.worker.gpu.spec_decode import rejection_sampler_utils

    rejection_sampler_utils.tldevice.log1p = lambda x: tl.log(1.0 + x)


def sampling_trial(
    engine: Any,
    exact: Any,
    wrong_rule: str,
    setting: Setting,
    draws: int,
    length: int,
    seed: int,
    show_progress: bool = False,
) -> list[dict[str, Any]]:
    """Draw for every prompt in mixed batches; one record for each prompt."""
    from vllm import SamplingParams

    asked, setting = prompts(), {**NEUTRAL, **setting}
    torch.manual_seed(seed)
    before = acceptance(engine)
    sequences: list[list[tuple[int, ...]]] = [[] for _ in asked]
    missing = draws // len(asked)
    label = ", ".join(f"{name} {value}" for name, value in setting.items())
    with tqdm(total=missing, desc=label, disable=not show_progress, file=sys.stderr) as bar:
        while missing > 0:
            params = SamplingParams(
                n=min(missing, BATCH),
                max_tokens=length,
                ignore_eos=True,
                detokenize=False,
                **setting,
            )
            outputs = engine.generate([p.for_vllm() for p in asked], params, use_tqdm=False)
            for drawn, output in zip(sequences, outputs, strict=True):
                drawn += [tuple(one.token_ids) for one in output.outputs]
            missing -= params.n
            bar.update(params.n)
    counts = counted(acceptance(engine) - before)
    records = []
    for prompt, drawn in zip(asked, sequences, strict=True):
        law = exact.law(prompt, drawn, setting)
        records.append(
            {
                "wrong_rule": wrong_rule,
                **setting,
                "prompt": prompt.name,
                "draws": len(drawn),
                "distinct": len(set(drawn)),
                "batch": counts,
                "positions": [asdict(result) for result in check_sequences(drawn, law)],
            }
        )
    return records
