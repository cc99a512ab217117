"""The demo: held-out images answered with and without MSD, figures on the terminal, a report."""

import itertools
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vllm_msd.demo import paths
from vllm_msd.demo.compare import (
    FIRST_SEED,
    Comparison,
    compare,
    figures,
    held_out_samples,
)
from vllm_msd.demo.provenance import provenance
from vllm_msd.demo.report import KIND_NAMES, render


@dataclass(frozen=True)
class DemoSettings:
    """What the demo runs. ``wide`` is the size that is timed (``"350M"``), None to skip it."""

    num_prompts: int = 21
    num_speculative_tokens: int = 5
    max_tokens: int = 192
    wide: str | None = "350M"
    num_wide_prompts: int = 7
    wide_rounds: int = 2  # shows whether the ratio holds
    seed: int = FIRST_SEED


def run_demo(settings: DemoSettings, output: Path, json_output: Path | None = None) -> int:
    """Run everything, print it, write the report; returns the exit code.

    0 when the small pair's fp32 answers are the same with and without MSD, 1 when they are not.
    The process should have been started by `vllm_msd.demo.engine.restart_tuned`.
    """
    start = time.monotonic()
    facts = provenance(**asdict(settings))
    samples = held_out_samples(settings.num_prompts, settings.seed)

    print("Small pair, fp32: starting vLLM without and with MSD (about half a minute)", flush=True)
    small = _compare(paths.demo_pair(), samples, settings, dtype="float32", rounds=1, show=True)
    small_figures = figures(small)
    _print_acceptance(small_figures)

    wide_figures = None
    if settings.wide:
        pair = paths.wide_pair(settings.wide, report=_print_line)
        print(f"\nPair of {settings.wide} parameters, bf16: starting vLLM twice", flush=True)
        wide = _compare(
            pair,
            samples[: settings.num_wide_prompts],
            settings,
            dtype="bfloat16",
            rounds=settings.wide_rounds,
            show=False,
        )
        wide_figures = figures(wide)
    _print_speed(small_figures, wide_figures, settings)

    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(render(small, small_figures, wide_figures, facts), encoding="utf-8")
    print(f"\nReport: {output}   ({time.monotonic() - start:.0f} s in all)")
    if json_output is not None:
        json_output.parent.mkdir(parents=True, exist_ok=True)
        result = {
            **facts,
            "small": small_figures,
            "wide": wide_figures,
            "answers": [_as_dict(c) for c in small],
        }
        json_output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0 if small_figures["identical"] == small_figures["requests"] else 1


def _compare(
    pair: paths.DemoPaths,
    samples: Sequence,
    settings: DemoSettings,
    *,
    dtype: str,
    rounds: int,
    show: bool,
) -> list[Comparison]:
    total = len(samples) * rounds
    bar = tqdm(total=total, unit="request", disable=None, leave=False)  # none without a terminal
    count = itertools.count(1)

    def answered(comparison: Comparison) -> None:
        done = next(count)
        if show:
            with bar.external_write_mode(file=sys.stdout):
                _print_answer(comparison)
        elif bar.disable:
            _print_line(f"  {done} of {total} answered")
        bar.update()

    with bar:
        return compare(
            pair,
            samples,
            dtype=dtype,
            num_speculative_tokens=settings.num_speculative_tokens,
            max_tokens=settings.max_tokens,
            rounds=rounds,
            on_start=bar.unpause,
            on_answer=answered,
        )


def _print_line(line: str) -> None:
    print(line, flush=True)


def _print_answer(comparison: Comparison) -> None:
    sample, msd = comparison.sample, comparison.msd
    question = "".join(p["text"] for p in sample.prompt[-1]["content"] if p["type"] == "text")
    same = "identical" if comparison.identical else "DIFFERENT"
    length = 1 + msd.num_accepted_tokens / msd.num_drafts if msd.num_drafts else 1
    print(f"\n[{KIND_NAMES[sample.kind]}] {question.strip()}")
    print(f"  {msd.text.strip()}")
    print(f"  with and without MSD: {same}; {length:.2f} tokens per verification", flush=True)
    if not comparison.identical:
        print(f"  without MSD: {comparison.plain.text.strip()}", flush=True)


def _print_acceptance(found: dict[str, Any]) -> None:
    verdict = "identical" if found["identical"] == found["requests"] else "NOT ALL IDENTICAL"
    print(f"\nOutputs with and without MSD, fp32 greedy: {verdict}")
    print(f"  {found['identical']} of {found['requests']} requests, {found['tokens']} tokens")
    print("\nTokens per verification (the target's own token counted)")
    for kind, accepted in found["by_kind"].items():
        print(f"  {KIND_NAMES[kind]:<18}{_number(accepted['acceptance_length'])}")
    print(f"  {'All with images':<18}{_number(found['multimodal']['acceptance_length'])}")


def _print_speed(small: dict, wide: dict | None, settings: DemoSettings) -> None:
    print("\nDecoding at batch 1, tokens/s        without     with MSD    speed-up")
    rows = [("small pair, fp32 (all overhead)", small)]
    if wide is not None:
        rows.append((f"{settings.wide} shape, bf16", wide))
    for name, found in rows:
        speed = found["speed"]
        print(
            f"  {name:<34}{_number(speed['plain_tokens_per_second'], 1):>8}"
            f"{_number(speed['msd_tokens_per_second'], 1):>13}{_number(speed['speedup']):>11}x"
        )
    if wide is not None:
        print(
            f"  {wide['identical']} of {wide['requests']} bf16 answers were identical (near ties "
            "may come out either way in bf16)."
        )
        # A step with MSD costs more than one without, so a larger ratio is somebody else's load.
        if (wide["speed"]["speedup"] or 0) > (wide["all"]["acceptance_length"] or 0):
            print("  Faster than its tokens per verification: the machine was busy, run it again.")
        print("Acceptance is the small pair's, cost is the large shape's: see the report.")


def _as_dict(comparison: Comparison) -> dict[str, Any]:
    sample, msd = comparison.sample, comparison.msd
    return {
        "kind": sample.kind,
        "messages": sample.prompt,
        "expected": sample.answer,
        "answer": msd.text,
        "identical": comparison.identical,
        "token_ids": msd.token_ids,
        "accepted": msd.accepted,
        "verifications": msd.num_drafts,
    }


def _number(value: float | None, digits: int = 2) -> str:
    return "n/a" if value is None else f"{value:.{digits}f}"
