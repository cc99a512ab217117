"""The demo: held-out images answered with and without MSD, figures on the terminal, a report."""

import itertools
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vllm_msd.demo import paths
from vllm_msd.demo.report.page import render
from vllm_msd.demo.samples import KIND_NAMES, HeldOutSample, held_out_samples
from vllm_msd.measure.compare import Comparison, compare, figures
from vllm_msd.measure.engine import SHORT, Drafting, timed_dtype
from vllm_msd.measure.inputs import Pair
from vllm_msd.measure.report.parts import number
from vllm_msd.provenance import provenance


@dataclass(frozen=True)
class DemoSettings:
    """What the demo runs. ``wide`` is the size that is timed (``"350M"``), None to skip it.

    ``wide_dtype`` is what it is timed in, None for `timed_dtype`. A chain of
    ``num_speculative_tokens`` stands beside a tree of ``tree_nodes`` (None: no tree). What the
    command line gives has its defaults there.
    """

    num_prompts: int
    num_speculative_tokens: int
    tree_nodes: int | None
    tree_depth: int
    tree_top_k: int
    max_tokens: int
    wide: str | None
    wide_dtype: str | None = None
    num_wide_prompts: int = 7
    wide_rounds: int = 2  # shows whether the ratio holds

    @property
    def draftings(self) -> dict[str, Drafting]:
        """What is compared with no draft at all: ``chain``, and ``tree`` if there is one."""
        found = {"chain": Drafting(self.num_speculative_tokens)}
        if self.tree_nodes is not None:
            found["tree"] = Drafting(self.tree_nodes, self.tree_depth, self.tree_top_k)
        return found


def run_demo(settings: DemoSettings, output: Path, json_output: Path | None = None) -> int:
    """Run everything, print it, write the report; returns the exit code.

    0 when the small pair's fp32 answers are the same with and without MSD, 1 when they are not.
    The process should have been started by `vllm_msd.measure.engine.restart_tuned`.
    """
    start = time.monotonic()
    dtype = settings.wide_dtype or timed_dtype()
    settings = replace(settings, wide_dtype=dtype)
    facts = provenance(**asdict(settings))
    samples = held_out_samples(settings.num_prompts)
    draftings = settings.draftings
    drafted = " and ".join(f"a {drafting}" for drafting in draftings.values())

    print(f"Drafts: {drafted}")
    print("Small pair, fp32: starting vLLM without and with MSD (about half a minute)", flush=True)
    small = _compare(paths.demo_pair(), samples, settings, dtype="float32", rounds=1, show=True)
    small_figures = {name: figures(small, name) for name in draftings}
    _print_acceptance(small_figures)

    wide_figures = None
    if settings.wide:
        pair = paths.wide_pair(settings.wide, dtype=dtype, report=_print_line)
        print(
            f"\nPair of {settings.wide} parameters, {SHORT[dtype]}: starting vLLM again", flush=True
        )
        wide = _compare(
            pair,
            samples[: settings.num_wide_prompts],
            settings,
            dtype=dtype,
            rounds=settings.wide_rounds,
            show=False,
        )
        wide_figures = {name: figures(wide, name) for name in draftings}
    _print_speed(small_figures, wide_figures, settings)

    output.parent.mkdir(parents=True, exist_ok=True)
    page = render(small, small_figures, wide_figures, draftings, facts, _token_texts())
    output.write_text(page, encoding="utf-8")
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
    return 0 if all(f["identical"] == f["requests"] for f in small_figures.values()) else 1


def _token_texts() -> Callable[[int], str]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(paths.demo_pair().target)
    return lambda token: tokenizer.decode([token])


def _compare(
    pair: Pair,
    samples: Sequence[HeldOutSample],
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
            settings.draftings,
            dtype=dtype,
            max_tokens=settings.max_tokens,
            rounds=rounds,
            keep_trees=show,
            on_start=bar.unpause,
            on_answer=answered,
        )


def _print_line(line: str) -> None:
    print(line, flush=True)


def _print_answer(comparison: Comparison) -> None:
    sample = comparison.sample
    question = "".join(p["text"] for p in sample.prompt[-1]["content"] if p["type"] == "text")
    print(f"\n[{KIND_NAMES[sample.kind]}] {question.strip()}")
    print(f"  {comparison.plain.text.strip()}")
    for name, answer in comparison.drafted.items():
        same = "identical" if comparison.identical(name) else "DIFFERENT"
        length = 1 + answer.num_accepted_tokens / answer.num_drafts if answer.num_drafts else 1
        print(f"  {name:<6} {same} to no draft; {length:.2f} tokens per verification", flush=True)
        if not comparison.identical(name):
            print(f"  {name:<6} {answer.text.strip()}", flush=True)


def _print_acceptance(found: dict[str, dict]) -> None:
    print("\nOutputs with and without MSD, fp32 greedy")
    for name, one in found.items():
        verdict = "identical" if one["identical"] == one["requests"] else "NOT ALL IDENTICAL"
        count = f"{one['identical']} of {one['requests']} requests, {one['tokens']} tokens"
        print(f"  {name:<18}{verdict}: {count}")
    print(f"\n{'Tokens per verification':<20}" + "".join(f"{name:>10}" for name in found))
    kinds = {kind: KIND_NAMES[kind] for kind in next(iter(found.values()))["by_kind"]}
    rows = [
        (label, [one["by_kind"][kind] for one in found.values()]) for kind, label in kinds.items()
    ]
    rows.append(("All with images", [one["multimodal"] for one in found.values()]))
    for label, accepted in rows:
        numbers = "".join(f"{number(a['acceptance_length']):>10}" for a in accepted)
        print(f"  {label:<21}{numbers}")
    print("  (the target's own token counted)")


def _print_speed(
    small: dict[str, dict], wide: dict[str, dict] | None, settings: DemoSettings
) -> None:
    print("\nDecoding at batch 1, tokens/s         without      with MSD    speed-up")
    pairs = [("small pair, fp32 (all overhead)", small)]
    if wide is not None:
        pairs.append((f"{settings.wide} shape, {SHORT[settings.wide_dtype]}", wide))
    for label, found in pairs:
        for name, one in found.items():
            speed = one["speed"]
            print(
                f"  {label:<36}{number(speed['plain_tokens_per_second'], 1):>7}"
                f"{name:>8}{number(speed['msd_tokens_per_second'], 1):>7}"
                f"{number(speed['speedup']):>11}x"
            )
    for name, one in (wide or {}).items():
        print(
            f"  {name}: {one['identical']} of {one['requests']} answers of this shape were "
            "identical (near ties may come out either way in bf16)."
        )
        # A step with MSD costs more than one without, so a larger ratio is somebody else's load.
        if (one["speed"]["speedup"] or 0) > (one["all"]["acceptance_length"] or 0):
            print("  Faster than its tokens per verification: the machine was busy, run it again.")
    if wide is not None:
        print("Acceptance is the small pair's, cost is the large shape's: see the report.")


def _as_dict(comparison: Comparison) -> dict[str, Any]:
    sample = comparison.sample
    return {
        "kind": sample.kind,
        "messages": sample.prompt,
        "expected": sample.answer,
        "answer": comparison.plain.text,
        "token_ids": comparison.plain.token_ids,
        "drafted": {
            name: {
                "identical": comparison.identical(name),
                "accepted": answer.accepted,
                "verifications": answer.num_drafts,
            }
            for name, answer in comparison.drafted.items()
        },
    }
