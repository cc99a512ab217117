"""What the demo says on the terminal while it runs and when it is done."""

import itertools
import sys
from collections.abc import Mapping, Sequence

from tqdm import tqdm

from vllm_msd.demo.samples import KIND_NAMES
from vllm_msd.measure.compare import Comparison, compare
from vllm_msd.measure.engine import Drafting
from vllm_msd.measure.inputs import Pair, Sample
from vllm_msd.measure.report.parts import number


def compare_aloud(
    pair: Pair,
    samples: Sequence[Sample],
    draftings: Mapping[str, Drafting],
    *,
    dtype: str,
    max_tokens: int,
    rounds: int,
    show: bool,
) -> list[Comparison]:
    """`vllm_msd.measure.compare.compare` with a progress bar; ``show``: and every answer."""
    total = len(samples) * rounds
    bar = tqdm(total=total, unit="request", disable=None, leave=False)  # none without a terminal
    count = itertools.count(1)

    def answered(comparison: Comparison) -> None:
        done = next(count)
        if show:
            with bar.external_write_mode(file=sys.stdout):
                print_answer(comparison)
        elif bar.disable:
            print_line(f"  {done} of {total} answered")
        bar.update()

    with bar:
        return compare(
            pair,
            samples,
            draftings,
            dtype=dtype,
            max_tokens=max_tokens,
            rounds=rounds,
            keep_trees=show,
            on_start=bar.unpause,
            on_answer=answered,
        )


def print_line(line: str) -> None:
    """Print at once."""
    print(line, flush=True)


def print_answer(comparison: Comparison) -> None:
    """One request, its answer, and what each drafting made of it."""
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


def print_acceptance(found: dict[str, dict]) -> None:
    """Whether outputs are identical, and tokens per verification by kind; `figures` by drafting."""
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
    whole = [one["multimodal"] for one in found.values()]
    label = "All with images"
    if not any(one["verifications"] for one in whole):
        whole, label = [one["all"] for one in found.values()], "All"
    rows.append((label, whole))
    for label, accepted in rows:
        numbers = "".join(f"{number(a['acceptance_length']):>10}" for a in accepted)
        print(f"  {label:<21}{numbers}")
    print("  (the target's own token counted)")


def print_speed(rows: Sequence[tuple[str, dict[str, dict]]]) -> None:
    """A table of speeds; a row is a label and `figures` by drafting."""
    print("\nDecoding at batch 1, tokens/s         without      with MSD    speed-up")
    for label, found in rows:
        for name, one in found.items():
            speed = one["speed"]
            print(
                f"  {label:<36}{number(speed['plain_tokens_per_second'], 1):>7}"
                f"{name:>8}{number(speed['msd_tokens_per_second'], 1):>7}"
                f"{number(speed['speedup']):>11}x"
            )


def print_doubts(label: str, found: dict[str, dict]) -> None:
    """How many answers of a timed run were identical, and whether its speed can be believed."""
    for name, one in found.items():
        print(
            f"  {label}, {name}: {one['identical']} of {one['requests']} answers were identical "
            "(near ties may come out either way in bf16)."
        )
        # A step with MSD costs more than one without, so a larger ratio is somebody else's load.
        if (one["speed"]["speedup"] or 0) > (one["all"]["acceptance_length"] or 0):
            print("  Faster than its tokens per verification: the machine was busy, run it again.")
