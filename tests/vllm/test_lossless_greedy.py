"""Greedy answers with the demo pair are the same with and without MSD, under both model runners.

208 held-out requests of the demo world (fp32): six kinds of work, text only, two or three images.
They run in mixed batches, with prefills cut in the middle of images, and some of them once more one
at a time, where prompts come from the prefix cache. Model Runner V2 runs on the CPU in Triton's
interpreter, a hundred times slower, so most of its answers are short there.
"""

import json

import pytest

from tests.common.worker import run_worker
from vllm_msd.demo.paths import demo_pair

pytestmark = pytest.mark.long
REQUESTS = 208
SIZES = {  # max_tokens of request 0, 1, ...; how many also run alone
    "v1": {"lengths": [150, 40, 90, 64, 24], "alone": 40},
    "v2": {"lengths": [4, 5, 4, 6, 16], "alone": 24},
}


@pytest.fixture(scope="module", params=["v1", "v2"])
def report(request):
    pair = demo_pair()
    return run_worker(
        "greedy",
        request.param,
        target=str(pair.target),
        draft=str(pair.draft),
        requests=REQUESTS,
        seed=50_000,
        **SIZES[request.param],
    )


def test_requests_are_of_every_kind(report):
    assert report["requests"] == REQUESTS >= 200
    kinds = report["requests_per_kind"]
    assert set(kinds) >= {"vqa", "textvqa", "caption", "chart", "reasoning", "conversation", "text"}
    assert min(kinds.values()) >= 20
    assert report["tokens"] > 4 * REQUESTS


@pytest.mark.parametrize("part", ["mixed", "alone"])
def test_token_ids_are_the_same(report, part):
    """No tolerance: in fp32 no two tokens come close enough for the batch's shape to matter."""
    mismatches = report[part]["mismatches"]
    assert not mismatches, "\n".join(json.dumps(m, indent=1) for m in mismatches[:5])


@pytest.mark.parametrize(("part", "least"), [("mixed", 100), ("alone", 5)])
def test_drafts_were_accepted_and_rejected(report, part, least):
    assert report[part]["accepted"] > least
    assert report[part]["rejected"] > least


def test_features_side_by_side(report):
    """Logprobs within 1e-4, penalties, bad words, structure, stops, n = 3: all in one batch."""
    part = report["features"]
    assert len(part["asked"]) == 11
    assert not part["changed"], json.dumps(part["changed"], indent=1)
    assert part["accepted"] > 0
    assert part["rejected"] > 0
    assert "." not in part["asked"]["bad words"]
    assert part["words"][0] not in part["asked"]["stop string"]


def test_comparison_notices_a_wrong_rule(report):
    """With every draft accepted, answers must change."""
    assert report["broken"]["changed"] > report["broken"]["requests"] // 8
