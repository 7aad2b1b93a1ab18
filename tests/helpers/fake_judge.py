"""A judge on this machine that can be as unhelpful as real ones are."""

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from s2ft.evaluate.judge import Judge

KEY = "sk-secret-7"
Reply = tuple[int, object, dict[str, str]]  # status, body (bytes, or what becomes a chat completion), headers


class FakeJudge:
    """A server on loopback; `reply` says what it answers to the n-th request. It keeps all requests."""

    def __init__(self) -> None:
        self.requests: list[dict] = []
        self.headers: list[dict[str, str]] = []
        self.reply: Callable[[int, dict], Reply | str] = lambda number, request: "Fine. Rating: [[7]]"
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append({"path": self.path, **request})
                outer.headers.append(dict(self.headers))
                self._send(outer.reply(len(outer.requests), request))

            do_GET = do_POST

            def _send(self, reply: Reply | str) -> None:
                status, body, headers = (200, reply, {}) if isinstance(reply, str) else reply
                if isinstance(body, str):
                    body = json.dumps({"choices": [{"message": {"role": "assistant", "content": body}}]}).encode()
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def judge(self, **more) -> Judge:
        return Judge(self.url, "strict-1", **{"key": KEY, "timeout": 20, "attempts": 3, "pause": 0.01, **more})
