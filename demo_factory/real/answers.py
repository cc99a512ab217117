"""Lets a target answer prompts: a third greedily, a third each at temperatures 0.7 and 1."""

import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest
from pathlib import Path

from vllm_msd.errors import ConfigError, MSDError
from vllm_msd.measure.engine import timed_dtype
from vllm_msd.storage import write_json

TEMPERATURES = (0.0, 0.7, 1.0)
MAX_TOKENS = 160  # of a reply
CONCURRENCY = 128
ENGINE = "--max-model-len 1024 --gpu-memory-utilization 0.2 --enforce-eager"


def shares(rows: list[dict]) -> list[list[dict]]:
    """The prompts of each temperature."""
    return [rows[index :: len(TEMPERATURES)] for index in range(len(TEMPERATURES))]


def regenerate_command(
    data: Path, output: Path, target: Path, temperature: float, samples: int, engine: str = ""
) -> list[str]:
    """What answers a file of prompts; with ``engine``, vLLM's options instead of this file's."""
    options = engine or f"{ENGINE} --max-num-seqs {CONCURRENCY} --dtype {timed_dtype()}"
    given = re.search(r"--max-num-seqs[ =](\d+)", engine)
    at_once = given[1] if given else CONCURRENCY
    return [
        *("regenerate", "--data", str(data), "--output", str(output), "--target", str(target)),
        *("--temperature", str(temperature), "--max-tokens", str(MAX_TOKENS)),
        *("--samples", str(samples), "--concurrency", str(at_once), f"--engine-args={options}"),
    ]


def answer(
    name: str,
    prompts: list[dict],
    folder: Path,
    target: Path,
    samples: int = 1,
    engine: str = "",
    jobs: int = 1,
) -> Path:
    """Let the target answer the prompts; gives the file of conversations.

    Args:
        name: of the file.
        prompts: records whose replies are to be replaced; pictures lie in ``folder``.
        folder: to work in. What is there is used as it is, so a killed run goes on.
        target: who answers.
        samples: replies to each prompt; one greedily.
        engine: options of vLLM's engine.
        jobs: engines at once; from 6 on each temperature's prompts are dealt out to several.

    Raises:
        ConfigError: the folder holds other prompts of this name.
        MSDError: an engine did not answer all; the same call asks for the rest.
    """
    joined = folder / f"{name}.json"
    if joined.is_file():
        return joined
    folder.mkdir(parents=True, exist_ok=True)

    def ask(temperature: float, part: int, rows: list[dict]) -> list[dict]:
        place = f"{name}-{temperature}" + (f"-{part}of{parts}" if parts > 1 else "")
        asked, answered = folder / f"{place}-asked.json", folder / f"{place}.jsonl"
        if not asked.is_file():
            write_json(asked, rows)
        elif json.loads(asked.read_text("utf-8")) != rows:
            raise ConfigError(f"{asked} holds other prompts. Give another --output, or delete it.")
        # What could not be answered is left out of the file, and the journal stays.
        journal = answered.with_name(answered.name + ".journal")
        if not answered.is_file() or journal.is_file():
            times = samples if temperature else 1
            run(regenerate_command(asked, answered, target, temperature, times, engine))
        return [json.loads(line) for line in answered.read_text("utf-8").splitlines()]

    parts = max(1, jobs // len(TEMPERATURES))
    work = [
        (temperature, part, rows[part::parts])
        for temperature, rows in zip(TEMPERATURES, shares(prompts), strict=True)
        for part in range(parts)
    ]
    if jobs == 1:
        found = [ask(*one) for one in work]
    else:
        with ThreadPoolExecutor(jobs) as pool:
            found = list(pool.map(lambda one: ask(*one), work))
    # Temperatures in turn, so that any first part of the file has all of them.
    rows = [row for some in zip_longest(*found) for row in some if row is not None]
    write_json(joined, rows)
    return joined


def run(arguments: list[str]) -> None:
    """A command of ``vllm-msd``; raises `MSDError` when it fails."""
    command = [sys.executable, "-m", "vllm_msd.cli.main", *arguments]
    print("+ vllm-msd " + " ".join(arguments), file=sys.stderr, flush=True)
    if code := subprocess.run(command, check=False).returncode:
        raise MSDError(f"`vllm-msd {arguments[0]}` ended with {code}: see above.")
