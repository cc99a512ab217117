"""The server soak's verdict on memory: a process that leaks fails it, and one that does not passes.

A stand-in for the server, asked the soak's own requests; real servers are in ``tests/long``.
"""

import subprocess
import sys
import time
from dataclasses import replace

import pytest

from tests.common.server import Server, free_port
from tests.common.server_soak import MEMORY_MARGIN_MIB, Pass, leaks, orders, send_all
from tests.common.worker import REPOSITORY

REQUESTS = 200
LEAK_KIB = 600  # of 200 requests: as much in all as 240 KiB of the soak's 500


def second_pass(folder, leak: int) -> Pass:
    """Of a fresh stand-in, from which each request takes so many KiB for good."""
    port = free_port()
    command = [sys.executable, "-m", "tests.common.chat_server", str(port), "--leak", str(leak)]
    process = subprocess.Popen([*command, "--delay", "0.1"], cwd=REPOSITORY)
    server = Server(f"http://127.0.0.1:{port}", process, folder / "log")
    try:
        while not server.is_up():
            assert process.poll() is None
            time.sleep(0.05)
        asked = orders(REQUESTS, 1)
        send_all(server, asked, every=0.02)
        return send_all(server, asked, every=0.02)
    finally:
        process.kill()
        process.wait()


def test_a_leak_fails(tmp_path):
    plain, other, leaking = (second_pass(tmp_path, leak) for leak in (0, 0, LEAK_KIB))
    assert {outcome.status for outcome in plain.outcomes} == {200}
    assert not leaks(other, plain), (other.growth, plain.growth)
    assert leaks(leaking, plain)
    assert leaking.growth > REQUESTS / 2 * LEAK_KIB / 1024 / 2  # half a pass lies between medians


def test_growth_is_judged_by_that_without_speculation():
    flat = Pass([], [100.0] * 40, 1.0)
    rising = Pass([], [100.0 + 4 * i for i in range(40)], 1.0)  # by 80 between the medians
    assert rising.growth == 80.0 and flat.growth == 0.0
    assert leaks(rising, flat) and not leaks(rising, rising) and not leaks(flat, rising)
    shrinking = replace(rising, memory=rising.memory[::-1])
    slow = replace(flat, memory=[100 + MEMORY_MARGIN_MIB / 20 * i * 0.9 for i in range(40)])
    assert not leaks(slow, flat) and not leaks(slow, shrinking)  # what shrinks excuses no less
    with pytest.raises(ValueError, match="got 3 samples of memory"):
        _ = Pass([], [1.0] * 3, 1.0).growth
