"""The long form on the wiring of a GPU: random requests and draws, CUDA graphs emulated.

    MSD_LONG=1 python -m pytest tests/long/test_gpu_wiring.py

Model Runner V2 with Triton's attention around the tree kernel and settling by its kernel; what the
interpreter takes seconds for has a stand-in. Targets have heads of 64, the smallest that the tree
kernel takes. Results go to ``benchmarks/results/gpu_wiring.json``. ``MSD_SHARE=0.04`` tries that
share of the requests and draws, and writes into ``build/``; so few draws catch no wrong rule.
"""

import os

import pytest

from tests.common.worker import REPOSITORY
from tests.long.record import long_form, write_part
from tests.long.soak import SETTINGS, failures, sampled, workloads

pytestmark = long_form
SHARE = float(os.environ.get("MSD_SHARE", "1"))
OUT = REPOSITORY / "benchmarks" / "results" / "gpu_wiring.json"
REQUESTS, DRAWS, CONTROL, SEED = 300, 2_048, 4_096, 11


def keep(part, report, **settings):
    whole = SHARE == 1
    out = OUT if whole else REPOSITORY / "build" / OUT.name
    out.parent.mkdir(exist_ok=True)
    found = failures(part, report, quick=not whole)
    write_part(out, part, {"failures": found, **report}, seed=SEED, share=SHARE, **settings)
    assert found == [] or (part == "draws" and not whole)


@pytest.mark.parametrize("graphs", [None, "FULL_DECODE_ONLY"])
def test_random_requests(graphs):
    report = workloads(
        "v2", SEED, False, requests=round(REQUESTS * SHARE), longest=24, cache_blocks=15,
        kind="qwen3_vl", wiring={"graphs": graphs},
    )  # fmt: skip
    keep("identity-graphs" if graphs else "identity", report, graphs=graphs)


def test_draws():
    report = sampled(
        "v2", SEED, False, count=round(DRAWS * SHARE), control=round(CONTROL * SHARE),
        settings=(SETTINGS[0], *SETTINGS[2:4]), wiring={"graphs": None}, wide_heads=True,
    )  # fmt: skip
    keep("draws", report)
