"""The distribution test: sequences sampled by real vLLM under MSD against the target's own law.

Used by ``tests/vllm/test_lossless_sampling.py`` and ``benchmarks/lossless.py``, through
``tests.common.worker``.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from tests.common.distribution import check_sequences
from tests.common.fp32_engine import acceptance, counted, open_engine, runner_of
from tests.common.small_vocabulary import ExactTarget, prompts
from tests.common.wrong_rules import WRONG_RULES

SETTINGS = ((1.0, 1.0), (0.7, 0.9))  # temperature, top-p


def sampled_distribution(
    *,
    runner: str,
    target: str,
    draft: str | None,
    draws: int,
    control_draws: int,
    seed: int,
    spec_tokens: int = 2,
    settings: Sequence[tuple[float, float]] = SETTINGS,
    draft_sample_method: str = "greedy",
) -> dict[str, Any]:
    """Test sequences of ``spec_tokens + 2`` tokens sampled under MSD against the target's own law.

    The first token comes from the prompt's prefill, the next ``spec_tokens`` can be accepted drafts
    and the last one a bonus token. The pair is ``tests.common.small_vocabulary``'s.

    Args:
        draft: None samples without speculation, to try the test itself.
        draws: sequences for each setting, shared out evenly among the prompts.
        control_draws: the same for each wrong rule, at the first setting.
        draft_sample_method: ``greedy`` drafts the likeliest token, ``probabilistic`` draws one from
            the draft's own law, which the acceptance rule then takes into account.
    """
    if runner == "v2":
        use_torch_top_p()
    exact = ExactTarget(target)
    started = time.perf_counter()
    engine = open_engine(
        target,
        draft,
        spec_tokens,
        max_model_len=128,
        max_num_seqs=256,
        max_num_batched_tokens=4096,
        block_size=32,
        draft_sample_method=draft_sample_method,
    )
    if runner_of(engine) != runner:
        raise RuntimeError(f"wanted model runner {runner}, vLLM uses {runner_of(engine)}")
    trials = []
    for temperature, top_p in settings:
        trials += sampling_trial(
            engine, exact, "none", temperature, top_p, draws, spec_tokens + 2, seed
        )
    for rule in WRONG_RULES[runner] if control_draws else ():
        with rule(runner):
            trials += sampling_trial(
                engine, exact, rule.__name__, *settings[0], control_draws, spec_tokens + 2, seed
            )
    return {
        "runner": runner,
        "draft_sample_method": draft_sample_method,
        "trials": trials,
        "seconds": round(time.perf_counter() - started, 1),
        "cpu_seconds": round(time.process_time(), 1),
    }


def use_torch_top_p() -> None:
    """Let vLLM take its PyTorch top-p: Triton's interpreter cannot run the kernel (Triton 3.9)."""
    from vllm.v1.sample.ops import topk_topp_sampler

    topk_topp_sampler.apply_top_k_top_p_triton = topk_topp_sampler.apply_top_k_top_p_pytorch


def sampling_trial(
    engine: Any,
    exact: Any,
    wrong_rule: str,
    temperature: float,
    top_p: float,
    draws: int,
    length: int,
    seed: int,
) -> list[dict[str, Any]]:
    """Draw for every prompt in one mixed batch; one record for each prompt."""
    from vllm import SamplingParams

    asked = prompts()
    params = SamplingParams(
        n=draws // len(asked),
        temperature=temperature,
        top_p=top_p,
        max_tokens=length,
        ignore_eos=True,
        detokenize=False,
    )
    torch.manual_seed(seed)
    before = acceptance(engine)
    outputs = engine.generate([p.for_vllm() for p in asked], params, use_tqdm=False)
    counts = counted(acceptance(engine) - before)
    records = []
    for prompt, output in zip(asked, outputs, strict=True):
        sequences = [tuple(one.token_ids) for one in output.outputs]
        law = exact.law(prompt, sequences, temperature, top_p)
        records.append(
            {
                "wrong_rule": wrong_rule,
                "temperature": temperature,
                "top_p": top_p,
                "prompt": prompt.name,
                "draws": len(sequences),
                "distinct": len(set(sequences)),
                "batch": counts,
                "positions": [asdict(result) for result in check_sequences(sequences, law)],
            }
        )
    return records
