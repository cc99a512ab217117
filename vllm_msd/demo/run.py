"""The demo: held-out images answered with and without MSD, figures on the terminal, a report."""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from vllm_msd.demo import paths
from vllm_msd.demo.real.pair import real_samples
from vllm_msd.demo.real.run import RealFigures, measure_real, print_real
from vllm_msd.demo.report.page import render
from vllm_msd.demo.samples import held_out_samples
from vllm_msd.demo.terminal import (
    compare_aloud,
    print_acceptance,
    print_doubts,
    print_line,
    print_speed,
)
from vllm_msd.errors import MSDError
from vllm_msd.measure.compare import Comparison, figures
from vllm_msd.measure.engine import SHORT, Drafting, timed_dtype
from vllm_msd.provenance import provenance

FETCH_SECONDS = 60  # what the real pair's download may take of a demo


@dataclass(frozen=True)
class DemoSettings:
    """What the demo runs. ``wide`` is the size that is timed (``"350M"``), None to skip it.

    ``wide_dtype`` is what it is timed in, None for `timed_dtype`. A chain of
    ``num_speculative_tokens`` stands beside a tree of ``tree_nodes`` (None: no tree). ``real`` is
    how many prompts the real language model answers, None to skip it. What the command line gives
    has its defaults there.
    """

    num_prompts: int
    num_speculative_tokens: int
    tree_nodes: int | None
    tree_depth: int
    tree_top_k: int
    max_tokens: int
    wide: str | None
    real: int | None
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
    if settings.real is not None:
        real_samples(settings.real)  # a wrong number ends here, before any engine starts
    draftings = settings.draftings
    drafted = " and ".join(f"a {drafting}" for drafting in draftings.values())

    print(f"Drafts: {drafted}")
    print("Small pair, fp32: starting vLLM without and with MSD (about half a minute)", flush=True)
    small = compare_aloud(
        paths.demo_pair(),
        samples,
        draftings,
        dtype="float32",
        max_tokens=settings.max_tokens,
        rounds=1,
        show=True,
    )
    small_figures = {name: figures(small, name) for name in draftings}
    print_acceptance(small_figures)
    rows = [("small pair, fp32 (all overhead)", small_figures)]

    wide_figures = None
    if settings.wide:
        pair = paths.wide_pair(settings.wide, dtype=dtype, report=print_line)
        print(
            f"\nPair of {settings.wide} parameters, {SHORT[dtype]}: starting vLLM again", flush=True
        )
        wide = compare_aloud(
            pair,
            samples[: settings.num_wide_prompts],
            draftings,
            dtype=dtype,
            max_tokens=settings.max_tokens,
            rounds=settings.wide_rounds,
            show=False,
        )
        wide_figures = {name: figures(wide, name) for name in draftings}
        rows.append((f"{settings.wide} shape, {SHORT[dtype]}", wide_figures))
    print_speed(rows)
    if wide_figures is not None:
        print_doubts(f"{settings.wide} shape", wide_figures)
        print("Acceptance is the small pair's, cost is the large shape's: see the report.")
    real = _real(settings, dtype)

    output.parent.mkdir(parents=True, exist_ok=True)
    page = render(small, small_figures, wide_figures, draftings, facts, _token_texts(), real)
    output.write_text(page, encoding="utf-8")
    print(f"\nReport: {output}   ({time.monotonic() - start:.0f} s in all)")
    if json_output is not None:
        json_output.parent.mkdir(parents=True, exist_ok=True)
        result = {
            **facts,
            "small": small_figures,
            "wide": wide_figures,
            "real": real.as_dict() if isinstance(real, RealFigures) else real,
            "answers": [_as_dict(c) for c in small],
        }
        json_output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    exact = [*small_figures.values(), *([real.exact] if isinstance(real, RealFigures) else [])]
    return 0 if all(one["identical"] == one["requests"] for one in exact) else 1


def _real(settings: DemoSettings, dtype: str) -> RealFigures | str | None:
    """The real language model's figures, or why there are none; None when it was not asked for."""
    if settings.real is None:
        return None
    try:
        found = measure_real(settings.real, settings.num_speculative_tokens, dtype, FETCH_SECONDS)
    except MSDError as error:  # the report is not lost for it
        print(f"\nThe real language model was left out: {error}")
        return str(error)
    print_real(found)
    return found


def _token_texts() -> Callable[[int], str]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(paths.demo_pair().target)
    return lambda token: tokenizer.decode([token])


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
