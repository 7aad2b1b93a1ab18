"""A server that runs in a thread of the tests, on the embedded base with adapters that change it."""

import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from openai import OpenAI

from s2ft.demo import base_path
from s2ft.runtime.models import load_model
from s2ft.serve.model import load_base
from s2ft.serve.options import ServeOptions
from s2ft.serve.server import address, listening, make_server
from s2ft.serve.service import Service
from served import save_adapters

RATIOS = {"o_proj": 0.2, "down_proj": 0.1}
KEY = "a-key-for-tests"


def embedded(root: Path, count: int = 2) -> list[str]:
    """Adapters of the embedded base, in `root`."""
    return save_adapters(load_model(str(base_path()), torch.float32), root, count, RATIOS, size=0.15)


class Live:
    """The server, and how tests speak to it."""

    def __init__(self, service: Service, keys: list[str]) -> None:
        self.service, self.keys = service, keys
        self._socket = listening("127.0.0.1", 0)
        self.port: int = self._socket.getsockname()[1]
        self.url = address("127.0.0.1", self._socket)
        self.server = make_server(service, keys)
        self._thread = threading.Thread(target=self.server.run, args=([self._socket],), daemon=True)
        self._thread.start()
        wait_for(lambda: self.server.started)

    def client(self, **more: Any) -> OpenAI:
        settings = {"api_key": self.keys[0] if self.keys else "none", "max_retries": 0, "timeout": 60.0, **more}
        return OpenAI(base_url=f"{self.url}/v1", **settings)

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any, dict[str, str]]:
        """Status, body (read as JSON, if it is) and headers; `body` may be bytes."""
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        given = {"Content-Type": "application/json", **{name.replace("_", "-"): text for name, text in headers.items()}}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, data, given)
            response = connection.getresponse()
            text, sent = response.read(), {name.lower(): value for name, value in response.getheaders()}
        finally:
            connection.close()
        try:
            return response.status, json.loads(text), sent
        except ValueError:
            return response.status, text.decode(), sent

    @property
    def under_way(self) -> int:
        """Rows that run."""
        return len(self.service._scheduler._rows)

    def stop(self) -> None:
        self.server.should_exit = True
        self._thread.join(30)
        assert not self._thread.is_alive()


@contextmanager
def live(root: Path | None, keys: tuple[str, ...] = (), endless: bool = False, **options: Any) -> Iterator[Live]:
    """A server on the embedded base; if `endless`, no token ends an answer."""
    base = load_base(str(base_path()), torch.float32)
    settings = ServeOptions.parse({"model": str(base_path()), "adapters": root, **options})
    server = Live(Service(settings, replace(base, ends=()) if endless else base), list(keys))
    try:
        yield server
    finally:
        server.stop()


def wait_for(condition: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.005)
