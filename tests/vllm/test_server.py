"""A server under MSD meets 300 mixed requests, eight at a time, and stays up.

Good requests, streamed or not, must get the text that the target gives without speculation. Among
them come broken images, prompts that are too long, wrong field types, unknown fields and clients
that go away in the middle of a stream. Not covered: speed, and sampling.
"""

import asyncio
import json
import random
import subprocess
import sys
from collections import Counter
from typing import Any

import httpx
import pytest

from demo_factory.world import KINDS, Sample, sample
from tests.common.server import MAX_MODEL_LEN, Outcome, Server, ask, chat_messages, image_url, png
from tests.common.server_soak import held_after
from tests.common.worker import HANGS, REPOSITORY

pytestmark = pytest.mark.long
REQUESTS = {
    "good": 90,
    "streamed": 90,
    "unknown_field": 30,
    "aborted": 40,
    "corrupt_image": 24,
    "oversized": 16,
    "wrong_type": 10,
}
CONCURRENCY = 8
MAX_TOKENS = 48
DISTINCT = 28


@pytest.fixture(scope="module")
def questions() -> list[Sample]:
    return [sample(KINDS[i % len(KINDS)], 30_000 + i, "test") for i in range(DISTINCT)]


@pytest.fixture(scope="module")
def plain_texts(questions, tmp_path_factory, fresh_process) -> list[str]:
    """What the target says without speculation."""
    folder = tmp_path_factory.mktemp("plain")
    asked = [{"messages": chat_messages(q), "max_tokens": MAX_TOKENS} for q in questions]
    (folder / "requests.json").write_text(json.dumps(asked))
    command = [sys.executable, "-m", "tests.common.plain_answers"]
    command += [str(folder / "requests.json"), str(folder / "answers.json")]
    fresh_process["env"] |= {"VLLM_CPU_NUM_OF_RESERVED_CPU": "0"}
    subprocess.run(command, check=True, cwd=REPOSITORY, timeout=HANGS, **fresh_process)
    return json.loads((folder / "answers.json").read_text())


@pytest.fixture(scope="module")
def outcomes(msd_server: Server, plain_texts, questions) -> list[Outcome]:
    """All 300, in a shuffled order."""
    cases = [case for case, count in REQUESTS.items() for _ in range(count)]
    random.Random(0).shuffle(cases)
    assert len(cases) == 300
    before = msd_server.metrics()["vllm:spec_decode_num_drafts_total"]
    found = asyncio.run(asyncio.wait_for(_send_all(msd_server, cases, questions), 240))
    assert msd_server.metrics()["vllm:spec_decode_num_drafts_total"] > before
    return found


async def _send_all(server: Server, cases: list[str], questions: list[Sample]) -> list[Outcome]:
    gate = asyncio.Semaphore(CONCURRENCY)
    async with httpx.AsyncClient(base_url=server.url, timeout=HANGS) as client:

        async def one(index: int, case: str) -> Outcome:
            async with gate:
                number = index % len(questions)
                body = _body(case, index, questions[number])
                outcome = await ask(client, case, body)
                outcome.question = number
                return outcome

        return await asyncio.gather(*(one(i, case) for i, case in enumerate(cases)))


def _body(case: str, index: int, question: Sample) -> dict[str, Any]:
    body: dict[str, Any] = {
        "model": "msd-demo",
        "messages": chat_messages(question),
        "max_tokens": MAX_TOKENS,
        "temperature": 0,
    }
    if case in ("streamed", "aborted"):
        body["stream"] = True
    elif case == "unknown_field":
        body |= {"no_such_field": [1, 2], "another": {"deep": None}}
    elif case == "oversized":
        body["messages"] = [
            {"role": "user", "content": "word " * (MAX_MODEL_LEN * (1 + index % 9))}
        ]
    elif case == "wrong_type":
        wrong = [{"temperature": "hot"}, {"max_tokens": -4}, {"messages": "hello"}, {"n": 0}]
        body |= wrong[index % len(wrong)]
    elif case == "corrupt_image":
        whole = png(sample("vqa", index, "test"))
        bad = [whole[: len(whole) // 3], b"not an image", b"", bytes(range(256)) * 20]
        url = [*map(image_url, bad), "data:image/png;base64,@@@@", "data:image/png;base64"][
            index % 6
        ]
        parts = [
            {"type": "image_url", "image_url": {"url": url}},
            {"type": "text", "text": "What?"},
        ]
        body["messages"] = [{"role": "user", "content": parts}]
    return body


def test_server_stays_up(msd_server, outcomes):
    assert len(outcomes) == sum(REQUESTS.values())
    assert msd_server.is_up()
    assert "Traceback" not in _engine_lines(msd_server)


def _engine_lines(server: Server) -> str:
    """What the engine process logged; the API process may log a client's mistake in full."""
    return "\n".join(line for line in server.log.read_text().splitlines() if "EngineCore" in line)


def test_good_requests_get_the_text_of_no_speculation(outcomes, plain_texts):
    good = [o for o in outcomes if o.case in ("good", "streamed", "unknown_field")]
    assert [o for o in good if o.status != 200] == []
    different = [o for o in good if o.text != plain_texts[o.question]]
    assert different == []
    assert len({o.question for o in good}) == DISTINCT
    assert len(set(plain_texts)) > DISTINCT // 2, "answers too alike to tell requests apart"


@pytest.mark.parametrize("case", ["corrupt_image", "oversized", "wrong_type"])
def test_bad_requests_are_refused_as_the_clients_mistake(outcomes, case):
    bad = [o for o in outcomes if o.case == case]
    assert len(bad) == REQUESTS[case]
    statuses = Counter(o.status for o in bad)
    assert all(400 <= status < 500 for status in statuses), [o for o in bad if o.status >= 500][:3]


def test_drafts_were_accepted_and_rejected(msd_server, outcomes):
    metrics = msd_server.metrics()
    accepted = metrics["vllm:spec_decode_num_accepted_tokens_total"]
    verified = metrics["vllm:spec_decode_num_draft_tokens_total"]
    assert 0 < accepted < verified
    assert metrics["vllm:msd_accepted_tokens_per_depth_total"] == accepted
    assert metrics["vllm:msd_verifications_total"] == metrics["vllm:spec_decode_num_drafts_total"]
    assert metrics["vllm:msd_drafted_nodes_total"] > verified  # sizes follow the load here


def test_answers_after_the_storm_are_the_same(msd_server, outcomes, questions, plain_texts):
    body = _body("good", 0, questions[0])
    reply = httpx.post(f"{msd_server.url}/v1/chat/completions", json=body, timeout=HANGS)
    assert reply.json()["choices"][0]["message"]["content"] == plain_texts[0]


def test_one_request_can_have_fewer_drafts_or_none(msd_server, questions, plain_texts):
    def ask_with(**options: Any) -> tuple[httpx.Response, dict[str, float]]:
        before = msd_server.metrics()
        body = _body("good", 0, questions[0]) | {"vllm_xargs": options}
        reply = httpx.post(f"{msd_server.url}/v1/chat/completions", json=body, timeout=HANGS)
        after = msd_server.metrics()
        return reply, {name: after[name] - before.get(name, 0.0) for name in after}

    verifications, nodes = (f"vllm:spec_decode_num_{x}_total" for x in ("drafts", "draft_tokens"))
    for options, most in (({"msd": False}, 0), ({"msd_max_nodes": 2}, 2), ({"msd": True}, None)):
        reply, counted = ask_with(**options)
        assert reply.json()["choices"][0]["message"]["content"] == plain_texts[0]
        assert (counted[verifications] > 0) == (most != 0)
        assert most is None or counted[nodes] <= most * counted[verifications]
    for options in ({"msd": "never"}, {"msd_max_nodes": -1}):
        reply, _ = ask_with(**options)
        assert reply.status_code == 400 and next(iter(options)) in reply.text
    assert msd_server.is_up()


def test_nothing_is_left_running(msd_server, outcomes):
    """Aborted streams must have given their place and their cache back."""
    assert held_after(msd_server) == {}
