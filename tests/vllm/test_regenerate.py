"""Replies of a real target, with either side killed in between: the output of an unbroken run.

The demo's target behind `vllm serve`, under MSD, and as an engine of the command's own, without.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from demo_factory.data import MIX
from demo_factory.world import packed
from demo_factory.write_data import write_records
from tests.common.server import Server, free_port, start_server
from tests.common.worker import HANGS, REPOSITORY
from vllm_msd.demo.paths import demo_pair

pytestmark = pytest.mark.long
COUNT = 24
TURNS = 3


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Conversations of three questions, text and pictures in turn."""
    path = tmp_path_factory.mktemp("world") / "world.json"
    kinds = [("text", *MIX)[i % (1 + len(MIX))] for i in range(COUNT)]
    write_records(path, [packed(kind, 70_000 + i, TURNS) for i, kind in enumerate(kinds)])
    return path


def start(data: Path, output: Path, *source: str, **process) -> subprocess.Popen:
    """The command, as a process with a log beside its output."""
    command = [sys.executable, "-m", "vllm_msd.cli.main", "regenerate", "--data", str(data)]
    command += ["--output", str(output), "--max-tokens", "24", "--concurrency", "4", *source]
    with output.with_suffix(".log").open("a") as log:
        return subprocess.Popen(command, cwd=REPOSITORY, stdout=log, stderr=log, **process)


def finish(run: subprocess.Popen, output: Path) -> bytes:
    log = output.with_suffix(".log")
    assert run.wait(HANGS) == 0, log.read_text()[-3000:]
    return output.read_bytes()


def wait_for_lines(journal: Path, count: int, run: subprocess.Popen) -> None:
    """Until the journal holds so many conversations."""
    deadline = time.monotonic() + HANGS
    while not journal.exists() or len(journal.read_bytes().splitlines()) - 1 < count:
        assert run.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)


def kill(process: subprocess.Popen) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait()


def kill_server(server: Server) -> None:
    os.killpg(server.process.pid, signal.SIGKILL)
    server.process.wait()


def test_kills_of_server_and_client_change_no_reply(data, tmp_path, fresh_process):
    port, cores = free_port(), os.sched_getaffinity(0)
    broken, whole, own = (tmp_path / f"{name}.json" for name in ("broken", "whole", "own"))
    journal = broken.with_name(broken.name + ".journal")
    source = ("--server", f"http://127.0.0.1:{port}")
    server = start_server(tmp_path, fresh_process["env"], cores, port=port)
    try:
        run = start(data, broken, *source, **fresh_process)
        wait_for_lines(journal, 5, run)
        kill_server(server)
        time.sleep(1)
        assert run.poll() is None  # it waits
        server = start_server(tmp_path, fresh_process["env"], cores, port=port)
        wait_for_lines(journal, 10, run)
        kill(run)
        there = len(journal.read_bytes().splitlines())
        assert 10 <= there - 1 < COUNT and not broken.exists()
        found = finish(start(data, broken, *source, **fresh_process), broken)
        assert found == finish(start(data, whole, *source, **fresh_process), whole)
    finally:
        server.stop()
    options = (
        "--dtype float32 --enforce-eager --max-model-len 1024 --kv-cache-memory-bytes 67108864"
    )
    source = ("--target", str(demo_pair().target), f"--engine-args={options}")
    process = {
        **fresh_process,
        "env": {**fresh_process["env"], "VLLM_CPU_NUM_OF_RESERVED_CPU": "0"},
    }
    assert found == finish(start(data, own, *source, **process), own)

    new, old = json.loads(found), json.loads(data.read_text())
    assert [row["id"] for row in new] == [row["id"] for row in old]
    replies = {turn["value"] for row in new for turn in row["conversations"][1::2]}
    assert len(replies) > COUNT  # of 72: they follow from what is asked
    assert sum("image" in row for row in new) > COUNT // 2
    assert not [path.name for path in tmp_path.iterdir() if "journal" in path.name]
