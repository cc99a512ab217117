"""A real ``vllm serve`` as a subprocess, started by ``examples/serve.sh``, and requests for it."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from demo_factory.world import Sample
from tests.common.worker import HANGS, REPOSITORY

MAX_MODEL_LEN = 1024


@dataclass
class Server:
    """A server that answers; ``url`` is without a path."""

    url: str
    process: subprocess.Popen
    log: Path

    def is_up(self) -> bool:
        """Whether the process runs and answers its health check."""
        if self.process.poll() is not None:
            return False
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=60) as reply:
                return reply.status == 200
        except (urllib.error.URLError, OSError):
            return False

    def metrics(self) -> dict[str, float]:
        """The server's Prometheus values, summed over labels."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=60) as reply:
            lines = reply.read().decode().splitlines()
        values: dict[str, float] = {}
        for line in lines:
            if line and not line.startswith("#"):
                name, value = line.split("{")[0].split(" ")[0], line.rsplit(" ", 1)[1]
                values[name] = values.get(name, 0.0) + float(value)
        return values

    def stop(self) -> None:
        """End the server and everything it started."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait(10)


def start_server(
    folder: Path,
    environment: Mapping[str, str],
    cores: set[int],
    options: Sequence[str] = (),
    command: Sequence[str] = ("bash", str(REPOSITORY / "examples" / "serve.sh")),
    port: int = 0,
) -> Server:
    """Start the demo pair's server and wait until it answers.

    ``environment`` and ``cores`` are those of a fresh process: an engine inside the test process
    changes both, and a subprocess would inherit one core of the machine's. ``options`` are further
    ones of ``vllm serve``. ``port``: of 127.0.0.1; 0 takes a free one.
    """
    port = port or free_port()
    log = folder / "server.log"
    given = ["--host", "127.0.0.1", "--port", str(port), "--max-num-seqs", "8"]
    given += ["--max-model-len", str(MAX_MODEL_LEN), "--limit-mm-per-prompt", '{"image": 2}']
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, *given, *options],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=dict(environment) | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
            start_new_session=True,
        )
    server = Server(f"http://127.0.0.1:{port}", process, log)
    deadline = time.monotonic() + HANGS
    while not server.is_up():
        if process.poll() is not None or time.monotonic() > deadline:
            server.stop()
            raise RuntimeError(f"the server did not come up; its log ends\n{log_end(log)}")
        time.sleep(0.5)
    return server


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass
class Outcome:
    """What came of one request; ``text`` only where the answer was awaited."""

    case: str
    status: int
    text: str | None = None
    question: int = -1
    detail: str = ""


async def ask(client: httpx.AsyncClient, case: str, body: dict[str, Any]) -> Outcome:
    """Send a chat request, streamed where it says so; the case ``aborted`` leaves its stream."""
    if not body.get("stream"):
        reply = await client.post("/v1/chat/completions", json=body)
        if reply.status_code != 200:
            return Outcome(case, reply.status_code, detail=reply.text[:300])
        return Outcome(case, 200, reply.json()["choices"][0]["message"]["content"])
    text, chunks = "", 0
    async with client.stream("POST", "/v1/chat/completions", json=body) as reply:
        async for line in reply.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            for choice in json.loads(line.removeprefix("data: ")).get("choices", []):
                text += choice["delta"].get("content") or ""
            chunks += 1
            if case == "aborted" and chunks == 3:
                return Outcome(case, reply.status_code)  # leaves the stream in the middle
        return Outcome(case, reply.status_code, text)


def log_end(log: Path) -> str:
    """The last lines of a log, for error messages."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-40:])


def image_url(data: bytes) -> str:
    """Bytes, good or bad, as a PNG data URL."""
    return "data:image/png;base64," + base64.b64encode(data).decode()


def png(sample: Sample) -> bytes:
    """The sample's image as a PNG file."""
    buffer = io.BytesIO()
    sample.images[0].save(buffer, format="PNG")
    return buffer.getvalue()


def chat_messages(sample: Sample) -> list[dict[str, Any]]:
    """The sample's prompt in OpenAI's form, images as data URLs."""
    images = iter(sample.images)
    messages = []
    for message in sample.prompt:
        parts = []
        for part in message["content"]:
            if part["type"] == "image":
                buffer = io.BytesIO()
                next(images).save(buffer, format="PNG")
                part = {"type": "image_url", "image_url": {"url": image_url(buffer.getvalue())}}
            parts.append(part)
        messages.append({"role": message["role"], "content": parts})
    return messages
