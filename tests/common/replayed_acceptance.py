"""What engines of random weights accept, where acceptance comes from a table."""

from __future__ import annotations

import os
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Any

ARMS = ("none", "chain:3", "tree:8x4x2")
TOKENS = 96  # of each answer


def replayed_acceptance(runner: str) -> dict[str, Any]:
    """What `tests/vllm/test_bench_shape.py` reads: counts by arm, of two requests at a time."""
    from vllm_msd.bench.data import load_requests
    from vllm_msd.bench.drive import run_cell
    from vllm_msd.bench.engines import Engines, models_of
    from vllm_msd.bench.settings import BenchSettings

    with tempfile.TemporaryDirectory() as folder:
        os.environ["MSD_CACHE_DIR"] = folder
        settings = BenchSettings(
            Path(folder), shape="tiny", arms=ARMS, batch=(2,), temperature=(0.0,), dtype="float32",
            max_model_len=512, engines="apart", num_prompts=4,
        )  # fmt: skip
        settings.check()
        samples = load_requests(None, (), 4).samples
        report = {}
        with closing(Engines(settings, models_of(settings), samples)) as engines:
            for arm in settings.parsed_arms[1:]:
                engine = engines.get(arm.name)
                is_v2 = engine.llm.vllm_config.use_v2_model_runner
                assert is_v2 == (runner == "v2")
                cell = run_cell(
                    engine, [engine.prompt(sample) for sample in samples], 2, arm.depth,
                    temperature=0.0, max_tokens=TOKENS, seed=0, fixed_length=True,
                )  # fmt: skip
                report[arm.name] = {
                    "lengths": [len(reply.token_ids) for reply in cell.replies],
                    "verifications": cell.verifications,
                    "accepted": cell.accepted,
                    "drafted": cell.drafted,
                    "by_depth": cell.accepted_by_depth,
                }
    return report
