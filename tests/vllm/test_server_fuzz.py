"""Whatever a client sends, it gets an answer or a documented error, and the server lives on.

Where vLLM answers with an error of its own (500), so may a server under MSD: with the very one that
vLLM gives without plugins and speculation. The long form is ``tests/long/test_serving.py``.
"""

import functools
import json
import os
from collections.abc import Callable

import httpx
import pytest

from tests.common.server import Server, start_server
from tests.common.server_fuzz import fuzz, send
from tests.common.server_soak import held_after
from tests.common.worker import HANGS

pytestmark = pytest.mark.long
GOOD = {"model": "msd-demo", "prompt": "say something", "max_tokens": 8, "temperature": 0}


class Judge:
    """Checks each answer, and now and then that a good request still gets its own.

    Attributes:
        of_vllm: how many errors were vLLM's own.
    """

    def __init__(self, server: Server, start_plain: Callable[[], Server]) -> None:
        self.server, self.count, self.of_vllm = server, 0, 0
        self._plain = functools.cache(start_plain)
        self.good_answer = self._ask()

    def __call__(self, path: str, body: dict | bytes, status: int, answer: str) -> None:
        """Raise AssertionError unless the status is 200, a mistake of the client's, or vLLM's."""
        if found := server_errors(status, answer):
            plain = server_errors(*send(self._plain(), path, body))
            assert found == plain, f"{path} {body!r:.1000}: {found}; without MSD {plain}"
            self.of_vllm += 1
        self.count += 1
        if self.count % 50 == 0:
            self.server_is_well()

    def server_is_well(self) -> None:
        """It is up, holds nothing of the odd requests, and a good one gets what it always gets."""
        assert self.server.is_up()
        assert held_after(self.server) == {}
        assert self._ask() == self.good_answer

    def _ask(self) -> str:
        reply = httpx.post(f"{self.server.url}/v1/completions", json=GOOD, timeout=HANGS)
        return reply.raise_for_status().json()["choices"][0]["text"]

    def close(self) -> None:
        """Stop the server without MSD, if there had to be one."""
        if self._plain.cache_info().currsize:
            self._plain().stop()


def server_errors(status: int, answer: str) -> list[str]:
    """Everything in an answer that is neither a success nor a mistake of the client's.

    A stream starts with 200; what goes wrong later is an error in it.
    """
    mark = 'data: {"error"'
    streamed = [line for line in answer.splitlines() if line.startswith(mark)]
    errors = [json.loads(line.removeprefix("data: "))["error"] for line in streamed]
    found = [str(error) for error in errors if not 400 <= error["code"] < 500]
    return found if status == 200 or 400 <= status < 500 else [f"{status} {answer}"]


def start_without_msd(folder, environment, cores) -> Server:
    """As the server under MSD, but with vLLM alone."""
    plain = {**environment, "VLLM_PLUGINS": ""}
    return start_server(folder, plain, cores, ["--speculative-config", "None"])


def test_odd_requests(msd_server, tmp_path, fresh_process):
    cores = os.sched_getaffinity(0)
    judge = Judge(msd_server, lambda: start_without_msd(tmp_path, fresh_process["env"], cores))
    try:
        statuses = fuzz(msd_server, 80, 1, judge)
        judge.server_is_well()
    finally:
        judge.close()
    assert statuses["200"] > 5 and statuses["400"] > 20
