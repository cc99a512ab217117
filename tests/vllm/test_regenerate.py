"""Replies of a real target, with either side killed in between: the output of an unbroken run.

The demo's target behind `vllm serve`, under MSD. The unbroken run is that of an engine of the
command's own, without a draft.
"""

import json
import os
import select
import signal
import socket
import socketserver
import subprocess
import sys
import threading
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
COUNT = 16
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


class Forwarder(socketserver.ThreadingTCPServer):
    """A port that leads to another server."""

    allow_reuse_address, daemon_threads = True, True

    def __init__(self, port: int, server: Server) -> None:
        self.address = ("127.0.0.1", int(server.url.rsplit(":", 1)[1]))
        super().__init__(("127.0.0.1", port), _Forwarded)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self.shutdown()
        self.server_close()


class _Forwarded(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        with socket.create_connection(self.server.address) as server:
            pair = {self.request: server, server: self.request}
            while ready := select.select(list(pair), [], [])[0]:
                for end in ready:
                    if not (data := end.recv(1 << 16)):
                        return
                    pair[end].sendall(data)


@pytest.fixture
def restarted(msd_server, tmp_path, fresh_process):
    """Starts a server at the port of a killed one; short of MSD_LONG=1, lets one that runs answer.

    A server takes half a minute of a core to start.
    """
    found = []

    def restart(port: int) -> None:
        if os.environ.get("MSD_LONG"):
            cores = os.sched_getaffinity(0)
            found.append(start_server(tmp_path, fresh_process["env"], cores, port=port))
        else:
            found.append(Forwarder(port, msd_server))

    yield restart
    for server in found:
        server.stop()


def test_kills_of_server_and_client_change_no_reply(data, tmp_path, fresh_process, restarted):
    port, cores = free_port(), os.sched_getaffinity(0)
    broken, own = tmp_path / "broken.json", tmp_path / "own.json"
    journal = broken.with_name(broken.name + ".journal")
    source = ("--server", f"http://127.0.0.1:{port}")
    server = start_server(tmp_path, fresh_process["env"], cores, port=port)
    try:
        run = start(data, broken, *source, **fresh_process)
        wait_for_lines(journal, 4, run)
    finally:
        kill_server(server)
    time.sleep(1)
    assert run.poll() is None  # it waits
    restarted(port)
    wait_for_lines(journal, 8, run)
    kill(run)
    there = len(journal.read_bytes().splitlines())
    assert 8 <= there - 1 < COUNT and not broken.exists()
    found = finish(start(data, broken, *source, **fresh_process), broken)

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
    assert len(replies) > COUNT  # of three times as many: they follow from what is asked
    assert sum("image" in row for row in new) > COUNT // 2
    assert not [path.name for path in tmp_path.iterdir() if "journal" in path.name]
