"""The server soak's verdict on memory: a process that leaks fails it, and one that does not passes.

A stand-in for the server, asked the soak's own requests; real servers are in ``tests/long``.
"""

import subprocess
import sys
import time

import pytest

from tests.common.server import Server, free_port
from tests.common.server_soak import MARGINS, grown, leaks, memory_at_rest, orders, send_all
from tests.common.worker import REPOSITORY

REQUESTS = 200


@pytest.mark.parametrize(("leak", "found"), [(0, []), (24, ["in_use_mib"])])  # KiB a request
def test_a_leak_fails(tmp_path, leak, found):
    port = free_port()
    command = [sys.executable, "-m", "tests.common.chat_server", str(port), "--leak", str(leak)]
    process = subprocess.Popen(command, cwd=REPOSITORY)
    server = Server(f"http://127.0.0.1:{port}", process, tmp_path / "log")
    try:
        while not server.is_up():
            assert process.poll() is None
            time.sleep(0.05)
        asked, rests = orders(REQUESTS, 1), []
        for _ in range(2):
            outcomes = send_all(server, asked)
            assert {outcome.status for outcome in outcomes} == {200}
            rests.append(memory_at_rest(server))
    finally:
        process.kill()
        process.wait()
    growth = grown(rests)
    assert leaks(growth) == found, rests
    assert abs(growth["in_use_mib"] - REQUESTS * leak / 1024) < 1.0


def test_each_figure_is_judged():
    first = dict.fromkeys(MARGINS, 100.0)
    assert leaks(grown([first, first])) == []
    for name, margin in MARGINS.items():
        peak = {**first, name: 100.0 + 9 * margin}
        assert leaks(grown([first, {**first, name: 100.0 + margin}])) == []
        assert leaks(grown([first, {**first, name: 101.0 + margin}])) == [name]
        assert leaks(grown([first, peak, first])) == []  # what is given back is no leak
