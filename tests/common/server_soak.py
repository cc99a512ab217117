"""A thousand mixed requests, 64 at a time, for a server under MSD: what to send, and what came."""

from __future__ import annotations

import asyncio
import io
import json
import random
import time
from collections.abc import Sequence
from typing import Any

import httpx
import psutil
from PIL import Image

from demo_factory.world import KINDS, sample
from tests.common.server import MAX_MODEL_LEN, Outcome, Server, ask, chat_messages, image_url, png
from tests.common.worker import HANGS

REQUESTS = 500
TIMES = 2  # that a server under MSD gets all of them: the first time much is met for the first time
CONCURRENCY = 64
# Growth at rest, at most, from after the first time to after the last: what a worker has in use
# (a leak of 8 KiB a request shows), its small Python objects (5 a request), and what all of the
# server's processes have in memory, the holes between what is in use among it.
MARGINS = {"in_use_mib": 4.0, "python_blocks": 2_500.0, "resident_mib": 32.0}
# What lets resident memory show what is in use. glibc keeps the room of freed tensors up to 32 MiB
# between what is still in use. Each step of trees needs other sizes, so the holes grow for a
# thousand requests. Under a fixed threshold, large tensors go back at once. oneDNN keeps code for
# each shape of a matrix product it has met.
FLAT_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "131072", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16"}
MAX_TOKENS = 32
DISTINCT = 28
SHARES = {
    "good": 20,
    "streamed": 20,
    "adapter": 20,
    "structured": 10,
    "seeded": 6,
    "aborted": 10,
    "corrupt_image": 5,
    "huge_image": 1,
    "oversized": 4,
    "wrong_type": 4,
}
# Whose text must be that of no speculation, and what must be refused as it is then.
ANSWERED = ("good", "streamed", "adapter", "structured", "seeded")
REFUSED = ("corrupt_image", "huge_image", "oversized", "wrong_type")
ADAPTERS = ("first", "second")
_RULES = (
    {"regex": "(yes|no), it is [a-z]{3,8}"},
    {"choice": ["a long answer to choose", "b is shorter"]},
    {"json": {"type": "object", "properties": {"n": {"enum": [1, 25]}}, "required": ["n"]}},
)
_BAD_FILES = (b"not an image", b"", bytes(range(256)) * 20)


def orders(count: int, number: int) -> list[tuple[str, dict[str, Any]]]:
    """``count`` cases and bodies in a drawn order; the same ones for the same arguments."""
    questions = [sample(KINDS[i % len(KINDS)], 40_000 + i, "test") for i in range(DISTINCT)]
    messages = [chat_messages(question) for question in questions]
    whole, huge = png(sample("vqa", 0, "test")), _huge_image()
    total = sum(SHARES.values())
    cases = [case for case, share in SHARES.items() for _ in range(share * count // total)]
    random.Random(number).shuffle(cases)
    result = []
    for index, case in enumerate(cases):
        body: dict[str, Any] = {
            "model": "msd-demo",
            "messages": messages[index % DISTINCT],
            "max_tokens": MAX_TOKENS,
            "temperature": 0,
        }
        if case in ("streamed", "aborted"):
            body["stream"] = True
        elif case == "adapter":
            body["model"] = ADAPTERS[index % len(ADAPTERS)]
        elif case == "structured":
            body["structured_outputs"] = _RULES[index % len(_RULES)]
        elif case == "seeded":
            body |= {"temperature": 0.8, "seed": index % 5}
        elif case == "corrupt_image":
            bad = (whole[: len(whole) // 3], *_BAD_FILES)[index % 4]
            body["messages"] = _about(bad)
        elif case == "huge_image":
            body["messages"] = _about(huge)
        elif case == "oversized":
            body["messages"] = [{"role": "user", "content": "word " * (MAX_MODEL_LEN * 3)}]
        elif case == "wrong_type":
            body |= ({"temperature": "hot"}, {"max_tokens": -4}, {"n": 0})[index % 3]
        result.append((case, body))
    return result


def _about(picture: bytes) -> list[dict[str, Any]]:
    url = {"type": "image_url", "image_url": {"url": image_url(picture)}}
    return [{"role": "user", "content": [url, {"type": "text", "text": "What?"}]}]


def _huge_image() -> bytes:
    """A small file that says it has 400 million pixels."""
    buffer = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(buffer, format="PNG")
    return buffer.getvalue()


def key(body: dict[str, Any]) -> str:
    """What a body asks, streamed or not."""
    return json.dumps({name: value for name, value in body.items() if name != "stream"})


def send_all(server: Server, asked: Sequence[tuple[str, dict[str, Any]]]) -> list[Outcome]:
    """Send all requests; the outcomes in their order."""
    return asyncio.run(_send_all(server, asked))


def soak(
    server: Server, asked: Sequence[tuple[str, dict[str, Any]]]
) -> tuple[list[Outcome], dict[str, Any]]:
    """Send all, `TIMES` over, with a rest after each time.

    Returns all outcomes, and what the server's processes and counters say.
    """
    before, started = server.metrics(), time.perf_counter()
    outcomes: list[Outcome] = []
    rests = []
    for _ in range(TIMES):
        outcomes += send_all(server, asked)
        left = held_after(server)
        rests.append(memory_at_rest(server))
    values = {name: value - before.get(name, 0) for name, value in server.metrics().items()}
    growth = grown(rests)
    return outcomes, {
        "seconds": round(time.perf_counter() - started, 1),
        "accepted": int(values["vllm:spec_decode_num_accepted_tokens_total"]),
        "verified": int(values["vllm:spec_decode_num_draft_tokens_total"]),
        "held": left,
        "memory_at_rest": rests,
        "memory_growth": growth,
        "leaks": leaks(growth),
    }


def memory_at_rest(server: Server) -> dict[str, float]:
    """The figures of `MARGINS`, of a server that nobody asks; see `worker_memory` for its start."""
    body = {"method": "memory_in_use"}
    reply = httpx.post(f"{server.url}/collective_rpc", json=body, timeout=HANGS)
    (found,) = reply.raise_for_status().json()["results"]
    return {**found, "resident_mib": round(resident(server), 1)}


def grown(rests: Sequence[dict[str, float]]) -> dict[str, float]:
    """Growth of each figure from the first rest to the last."""
    return {name: round(rests[-1][name] - rests[0][name], 1) for name in MARGINS}


def leaks(growth: dict[str, float]) -> list[str]:
    """Which figures have grown by more than `MARGINS`."""
    return [name for name, margin in MARGINS.items() if growth[name] > margin]


async def _send_all(server: Server, asked: Sequence[tuple[str, dict[str, Any]]]) -> list[Outcome]:
    gate = asyncio.Semaphore(CONCURRENCY)
    # A connection each: the server closes one that was idle for 5 s, maybe as it is used again.
    limits = httpx.Limits(max_connections=CONCURRENCY, max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=server.url, timeout=HANGS, limits=limits) as client:

        async def one(case: str, body: dict[str, Any]) -> Outcome:
            async with gate:
                return await ask(client, case, body)

        return await asyncio.gather(*(one(case, body) for case, body in asked))


def processes(server: Server) -> list[psutil.Process]:
    """The server and everything it has started."""
    root = psutil.Process(server.process.pid)
    return [root, *root.children(recursive=True)]


def resident(server: Server) -> float:
    """MiB that the server's processes have in memory."""
    return sum(process.memory_info().rss for process in processes(server)) / 2**20


def held_after(server: Server) -> dict[str, float]:
    """What the server still holds once all clients have gone; empty when it is nothing.

    The gauges are set by engine steps, so one more request makes sure that they are current.
    """
    body = {"model": "msd-demo", "prompt": "hello", "max_tokens": 1}
    names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    held: dict[str, float] = {}
    for _ in range(60):
        httpx.post(f"{server.url}/v1/completions", json=body, timeout=HANGS).raise_for_status()
        metrics = server.metrics()
        held = {name: metrics[f"vllm:{name}"] for name in names if metrics[f"vllm:{name}"]}
        if not held:
            break
        time.sleep(0.5)
    return held
