"""The real pair answers held-out prompts and questions about pictures, with and without MSD."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_msd.demo.real.pair import NAME, real_pair, real_samples
from vllm_msd.demo.samples import WORLD_KINDS, held_out_samples
from vllm_msd.demo.terminal import (
    compare_aloud,
    print_acceptance,
    print_doubts,
    print_line,
    print_speed,
)
from vllm_msd.measure.compare import Comparison, figures
from vllm_msd.measure.engine import SHORT, Drafting, timed_dtype
from vllm_msd.measure.inputs import Sample
from vllm_msd.provenance import provenance

MAX_TOKENS = 128
ROUNDS = 2
CHAIN = "chain"


@dataclass(frozen=True)
class RealFigures:
    """`vllm_msd.measure.compare.figures` in fp32 (``exact``) and in ``dtype`` (``timed``).

    ``answers`` are those in fp32.
    """

    drafting: Drafting
    dtype: str
    answers: list[Comparison]
    exact: dict[str, Any]
    timed: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """What a result file keeps."""
        return {
            "drafting": str(self.drafting),
            "dtype": self.dtype,
            "exact": self.exact,
            "timed": self.timed,
        }


def pictured_samples() -> list[Sample]:
    """A held-out question about a drawn picture of each kind."""
    return [one for one in held_out_samples(len(WORLD_KINDS)) if one.images]


def measure_real(
    count: int, num_speculative_tokens: int, dtype: str, timeout: float | None = None
) -> RealFigures:
    """Answer prompts and questions, greedily and one at a time: in fp32 for identity, then timed.

    Args:
        count: of prompts by people; a question about a drawn picture of each kind comes besides.
        num_speculative_tokens: of the chain.
        dtype: to time in.
        timeout: of the download, where the model is not in the cache yet (s).

    Raises:
        ConfigError: there are not so many prompts.
        StorageError: the model cannot be fetched.
        CheckpointError: what came is another model.
    """
    samples = [*real_samples(count), *pictured_samples()]
    pair = real_pair(print_line, timeout)
    draftings = {CHAIN: Drafting(num_speculative_tokens)}
    print(f"\n{NAME}, a real language model, fp32: starting vLLM without and with MSD", flush=True)

    def answered(dtype: str, rounds: int) -> list[Comparison]:
        return compare_aloud(
            pair,
            samples,
            draftings,
            dtype=dtype,
            max_tokens=MAX_TOKENS,
            rounds=rounds,
            show=rounds == 1,
        )

    exact = answered("float32", 1)
    print(f"\n{NAME}, {SHORT[dtype]}: starting vLLM again", flush=True)
    timed = answered(dtype, ROUNDS)
    return RealFigures(draftings[CHAIN], dtype, exact, figures(exact, CHAIN), figures(timed, CHAIN))


def print_real(found: RealFigures) -> None:
    """What was found, on the terminal."""
    print_acceptance({CHAIN: found.exact})
    label = f"{NAME}, {SHORT[found.dtype]}"
    print_speed([(label, {CHAIN: found.timed})])
    print_doubts(label, {CHAIN: found.timed})


def run_real(count: int, num_speculative_tokens: int, json_output: Path | None) -> int:
    """`measure_real` as a command; 1 when fp32 answers differ with and without MSD."""
    dtype = timed_dtype()
    facts = provenance(count=count, num_speculative_tokens=num_speculative_tokens, dtype=dtype)
    found = measure_real(count, num_speculative_tokens, dtype)
    print_real(found)
    if json_output is not None:
        json_output.parent.mkdir(parents=True, exist_ok=True)
        json_output.write_text(json.dumps(facts | found.as_dict(), indent=1) + "\n", "utf-8")
    return 0 if found.exact["identical"] == found.exact["requests"] else 1
