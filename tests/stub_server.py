"""An OpenAI-compatible server on this machine that does what a function says."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = dict[str, Any] | tuple[int, dict[str, str], str]


def chat(text: str | None, finish: str = "stop", **more: Any) -> dict[str, Any]:
    """A chat completion that says ``text``."""
    message = {"role": "assistant", "content": text, **more}
    return {"choices": [{"message": message, "finish_reason": finish}], "usage": {"completion_tokens": 3}}


def completion(text: str) -> dict[str, Any]:
    return {"choices": [{"text": text, "finish_reason": "length"}]}


class Server:
    """``requests`` are the bodies that came in; ``most`` is the largest number at one time."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.requests: list[dict[str, Any]] = []
        self.most = 0


@contextmanager
def serving(answer: Callable[[dict[str, Any], int], Reply], delay: float = 0.0) -> Iterator[Server]:
    """Serves ``answer(body, number of this request)``: an object, or (status, headers, text)."""
    lock, now = threading.Lock(), [0]

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            body["path"], body["authorization"] = self.path, self.headers.get("Authorization")
            with lock:
                server.requests.append(body)
                number = len(server.requests)
                now[0] += 1
                server.most = max(server.most, now[0])
            try:
                time.sleep(delay)
                reply = answer(body, number)
            finally:
                with lock:
                    now[0] -= 1
            status, headers, text = (200, {}, json.dumps(reply)) if isinstance(reply, dict) else reply
            data = text.encode()
            try:
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(data))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)
            except (BrokenPipeError, ConnectionResetError):
                pass  # a client that timed out

        def log_message(self, *_: Any) -> None:
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.daemon_threads = True
    server = Server(f"http://127.0.0.1:{httpd.server_port}/v1")
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        httpd.shutdown()
        httpd.server_close()
