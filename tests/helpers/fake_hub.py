"""A stand-in for the Hub's API on this machine: it knows one login, makes repositories and takes commits."""

import base64
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import constants

TOKEN = "hf_standin"
REVISION = "0" * 40


class FakeHub(ThreadingHTTPServer):
    """Files of each repository, and whether it takes commits."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, dict[str, bytes]] = {}
        self.full = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub

    def do_GET(self) -> None:
        if self.path == "/api/whoami-v2":
            known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
            me = {"type": "user", "name": "me", "orgs": [{"name": "team"}]}
            self._say(me if known else {"error": "Invalid user token."}, 200 if known else 401)
        else:
            self._say({"error": "not found"}, 404)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path == "/api/repos/create":
            wanted = json.loads(body)
            name = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
            self.server.files.setdefault(name, {})
            self._say({"url": f"{self.server.url}/{name}", "name": name})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            self._say(
                {"files": [{"path": one["path"], "uploadMode": "regular", "shouldIgnore": False} for one in files]}
            )
        elif match := re.match(r"/api/models/(\w+/[\w.-]+)/commit/", self.path):
            self._take(match[1], body)
        elif self.path == "/api/validate-yaml":
            self._say({"errors": [], "warnings": []})
        else:
            self._say({"error": "not found"}, 404)

    def _take(self, name: str, body: bytes) -> None:
        if self.server.full:
            self._say({"error": "no storage left"}, 507)
            return
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                self.server.files[name][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        self._say({"commitUrl": f"{self.server.url}/{name}/commit/{REVISION}", "commitOid": REVISION, "hookOutput": ""})

    def _say(self, value: dict, code: int = 200) -> None:
        text = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: object) -> None:
        """Quiet."""


@contextmanager
def fake_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """The stand-in, as what `HF_ENDPOINT` names, with a login."""
    hub = FakeHub()
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
