"""An OpenAI-compatible chat server without a model: what it says is a digest of what it is asked.

python -m tests.common.chat_server PORT --delay 0.01
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tests.common.worker_memory import WorkerMemory

Answer = tuple[int, dict[str, Any]]


def completion(text: str, ending: str = "stop", tokens: int = 7) -> Answer:
    """A chat completion as servers send it."""
    choice = {"message": {"role": "assistant", "content": text}, "finish_reason": ending}
    return 200, {"choices": [choice], "usage": {"completion_tokens": tokens}}


def error(status: int, message: str) -> Answer:
    """An error as vLLM sends it."""
    return status, {"error": {"message": message, "type": "Error", "code": status}}


def digest(body: dict[str, Any]) -> Answer:
    """Says the same to the same messages and seed."""
    asked = json.dumps([body["messages"], body.get("seed")], sort_keys=True)
    return completion(f" it is {hashlib.sha256(asked.encode()).hexdigest()[:12]}.")


class ChatServer(ThreadingHTTPServer):
    """Serves on a port of its own, in threads, until it is closed.

    Attributes:
        respond: makes an answer of a request's body; may be exchanged.
        asked: all bodies so far.
        headers_seen: of the latest request.
    """

    daemon_threads = True
    # All connections of a run may come at once.
    request_queue_size = 128

    def __init__(self, port: int = 0, respond: Callable[[dict[str, Any]], Answer] = digest) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.respond, self.asked = respond, []
        self.headers_seen: dict[str, str] = {}
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away in the middle is no error."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)

    def __enter__(self) -> ChatServer:
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: ChatServer

    def do_GET(self) -> None:
        models = {"data": [{"id": "stand-in"}, {"id": "another"}]}
        self._send(*((200, models) if self.path == "/v1/models" else (200, {})))

    def do_POST(self) -> None:
        length = int(self.headers["Content-Length"])
        content = self.rfile.read(length)
        if len(content) < length:
            raise ConnectionAbortedError
        body = json.loads(content)
        if self.path == "/collective_rpc":
            self._send(200, {"results": [getattr(WorkerMemory(), body["method"])()]})
            return
        self.server.asked.append(body)
        self.server.headers_seen = dict(self.headers)
        self._send(*self.server.respond(body))

    def _send(self, status: int, content: dict[str, Any]) -> None:
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: object) -> None:
        """Nothing is logged."""


def main() -> None:
    """Serve until killed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("port", type=int)
    parser.add_argument("--delay", type=float, default=0.0, help="seconds before each answer")
    parser.add_argument("--leak", type=int, default=0, help="KiB that each request leaves behind")
    args = parser.parse_args()
    lost = []

    def respond(body: dict[str, Any]) -> Answer:
        time.sleep(args.delay)
        lost.append(b"\1" * (args.leak << 10))
        server.asked.clear()
        return digest(body)

    server = ChatServer(args.port, respond)
    server.serve_forever()


if __name__ == "__main__":
    main()
