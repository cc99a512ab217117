"""LoRA adapters, videos and seeds beside other requests, with chains and trees on both runners.

Each target has a process under each runner (see ``tests.common.request_identity``), started when
it is first asked for; the tests only read its report.
Not covered: adapters of the vision tower, and videos of different lengths for LLaVA-OneVision,
which end vLLM 0.32 without speculation too.
"""

import os
from functools import cache

import pytest

from tests.common import tiny
from tests.common.adapters import write_adapter
from tests.common.worker import run_worker

pytestmark = pytest.mark.long
CASES = {
    "llava": ["lora_adapters", "seeds_in_company"],
    "qwen2_vl": ["lora_adapters", "videos", "seeds_in_company"],
    "qwen2_5_vl": ["videos"],
    "qwen3_vl": ["videos"],
    "llava_onevision": ["videos"],
}
# Triton's interpreter takes minutes a target: each kind of request once, and all with MSD_LONG=1.
SHORT = {"llava": ["lora_adapters", "seeds_in_company"], "qwen2_vl": ["videos"]}
BY_RUNNER = {"v1": CASES, "v2": CASES if os.environ.get("MSD_LONG") else SHORT}
RUNS = [
    (runner, kind, way, case)
    for runner, kinds in BY_RUNNER.items()
    for kind, cases in kinds.items()
    for way in ("chain", "tree")
    for case in cases
]


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """Runs a target on a runner when it is first asked for."""
    folder = tmp_path_factory.mktemp("kinds")
    orders = {}
    for kind, cases in CASES.items():
        pair = tiny.build_pair(folder / kind, kind, decoys=2)
        order = {"kind": kind, "target": pair.target, "draft": pair.draft, "cases": cases}
        if "lora_adapters" in cases:
            # Of these targets, vLLM adapts the embedding table and the head of LLaVA's only.
            order["adapters"] = [
                write_adapter(folder / f"{kind}-{seed}", pair.target, seed, head=kind == "llava")
                for seed in (1, 2)
            ]
        orders[kind] = order

    @cache
    def report(runner, kind):
        order = orders[kind] | {"cases": BY_RUNNER[runner][kind]}
        return run_worker("requests", runner, **order)["ways"]

    return report


@pytest.mark.parametrize(("runner", "kind", "way", "case"), RUNS)
def test_same_tokens(reports, runner, kind, way, case):
    result = reports(runner, kind)[way][case]
    assert result["same"], result["first_difference"]
    assert result["accepted"] > 0
    assert result["rejected"] > 0


@pytest.mark.parametrize(("runner", "kind", "way", "case"), RUNS)
def test_cases_saw_what_they_are_for(reports, runner, kind, way, case):
    result = reports(runner, kind)[way][case]
    if case == "lora_adapters":
        assert result["distinct"] == 6  # two prompts, two adapters and the base model
    elif case == "videos":
        assert result["distinct"] == 6
        assert result["longest"] > (80 if kind == "qwen3_vl" else 60)
    else:
        assert result["undisturbed"]
        assert result["distinct"] == 3
        # Trees are sampled row by row, with the draw of each row's place in the text.
        assert result["same_as_plain"] or way == "chain"
