"""Whatever a client sends, it gets an answer or a documented error, and the server lives on.

The long form is ``tests/long/test_serving.py``.
"""

import json

import httpx
import pytest

from tests.common.server import Server
from tests.common.server_fuzz import fuzz
from tests.common.server_soak import held_after
from tests.common.worker import HANGS

pytestmark = pytest.mark.long
GOOD = {"model": "msd-demo", "prompt": "say something", "max_tokens": 8, "temperature": 0}


class Judge:
    """Checks each answer, and now and then that a good request still gets its own."""

    def __init__(self, server: Server) -> None:
        self.server, self.count = server, 0
        self.good_answer = self._ask()

    def __call__(self, path: str, body: dict | bytes, status: int, answer: str) -> None:
        """Raise AssertionError unless the status is 200 or one of the client's mistakes.

        A stream starts with 200; what goes wrong later is an error in it.
        """
        mark = 'data: {"error"'
        streamed = [line for line in answer.splitlines() if line.startswith(mark)]
        errors = [json.loads(line.removeprefix("data: "))["error"]["code"] for line in streamed]
        for code in [status, *errors]:
            shown = f"{path} {body!r:.1000}: {status} {answer[:500]}"
            assert code == 200 or 400 <= code < 500, shown
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


def test_odd_requests(msd_server):
    judge = Judge(msd_server)
    statuses = fuzz(msd_server, 80, 1, judge)
    judge.server_is_well()
    assert statuses["200"] > 5 and statuses["400"] > 20
