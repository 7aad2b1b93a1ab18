"""A server in a process of its own, under 2,000 bad requests while adapters are replaced, stopped under load, and killed.

`make test-slow`: three minutes.
"""

import json
import random
import shutil
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

import pytest

from live_server import KEY, embedded, wait_for
from s2ft.demo import base_path
from s2ft.lab.bench.servers import Running, health, running

pytestmark = pytest.mark.slow
ASKED = {"model": "base", "prompt": "reverse: planet\n", "max_tokens": 8, "temperature": 0}
LONG = {**ASKED, "prompt": "Once upon a time", "max_tokens": 400}
JSON = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
REQUESTS, ATTACKERS = 2000, 16
CLOSED = ("BrokenPipeError", "ConnectionResetError", "RemoteDisconnected")
REPLACED = {
    200,
    429,
    404,
    400,
    500,
}  # an adapter that is not there at this moment: unknown, not to be fused, not to be read
TOO_LARGE, MOST_BODY = 200_000, 100_000  # bytes


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "adapters"
    folder.mkdir()
    embedded(folder)
    return folder


@pytest.fixture
def server(root: Path, tmp_path: Path) -> Iterator[Running]:
    keys = tmp_path / "keys"
    keys.write_text(KEY)
    words = [str(base_path()), "--adapters", str(root), "--precision", "fp32", "--keys", str(keys), "--name", "base"]
    with running([*words, "--max-body", str(MOST_BODY), "--rows", "16", "--drain", "20"], tmp_path / "log") as found:
        yield found


def ask(
    port: int, body: bytes, headers: dict[str, str] = JSON, path: str = "/v1/completions"
) -> tuple[int | None, Any]:
    """The status and the body; None where the server closed the connection."""
    connection = HTTPConnection("127.0.0.1", port, timeout=300)
    try:
        connection.request("POST", path, body, headers)
        response = connection.getresponse()
        text = response.read()
        return response.status, json.loads(text) if text else None
    except (OSError, HTTPException, ValueError) as error:
        return type(error).__name__, None
    finally:
        connection.close()


def good(port: int, model: str = "base", **more: Any) -> tuple[int | str, Any]:
    return ask(port, json.dumps({**ASKED, "model": model, **more}).encode())


def leave_early(port: int, draw: random.Random) -> None:
    """A client that says half of what it wants, and is gone."""
    with socket.create_connection(("127.0.0.1", port)) as client:
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        whole = f"{head}Authorization: Bearer {KEY}\r\nContent-Length: 1000\r\n\r\n{{"
        client.sendall(whole.encode()[: draw.randint(1, len(whole))])
        time.sleep(0.01)


def one_attack(port: int, draw: random.Random) -> str | None:
    """What is wrong with the server's answer to something bad, if anything is."""
    kind = draw.choice(["malformed", "oversized", "slow", "unauthorised", "unknown", "good", "replaced", "field"])
    if kind == "slow":
        leave_early(port, draw)
        return None
    bodies = {
        "malformed": (draw.randbytes(draw.randint(0, 300)), JSON, {400}),
        "oversized": (b"x" * TOO_LARGE, JSON, {413, *CLOSED}),  # the connection may be closed while the body is sent
        "unauthorised": (json.dumps(ASKED).encode(), {**JSON, "Authorization": f"Bearer {draw.random()}"}, {401}),
        "unknown": (json.dumps({**ASKED, "model": "../" * draw.randint(1, 5) + "etc"}).encode(), JSON, {404}),
        "good": (json.dumps({**ASKED, "model": draw.choice(["base", "user0"])}).encode(), JSON, {200, 429}),
        "replaced": (json.dumps({**ASKED, "model": draw.choice(["user1", "user0+user1"])}).encode(), JSON, REPLACED),
        "field": (
            json.dumps({**ASKED, draw.choice(["n", "max_tokens", "temperature", "stop"]): [[]]}).encode(),
            JSON,
            {400},
        ),
    }
    body, headers, expected = bodies[kind]
    status, _ = ask(port, body, headers)
    return None if status in expected else f"{kind}: {status}"


def attack(server: Running, count: int) -> Counter[str]:
    """So many bad requests by all attackers together; what was wrong with the answers."""
    wrong: list[str] = []

    def one(seed: int) -> None:
        draw = random.Random(seed)
        found = (one_attack(server.port, draw) for _ in range(count // ATTACKERS))
        wrong.extend(problem for problem in found if problem)

    attackers = [threading.Thread(target=one, args=(seed,)) for seed in range(ATTACKERS)]
    for thread in attackers:
        thread.start()
    for thread in attackers:
        thread.join()
    return Counter(wrong)


def replace(root: Path, is_over: threading.Event) -> None:
    """Puts one adapter in place of another again and again, by renaming."""
    number = 0
    while not is_over.is_set():
        number += 1
        shutil.copytree(root / f"user{number % 2}", root / ".next")
        (root / "user1").rename(root / ".last")
        (root / ".next").rename(root / "user1")
        shutil.rmtree(root / ".last")
        time.sleep(0.05)


def test_2000_bad_requests_while_adapters_are_replaced(server: Running, root: Path) -> None:
    is_over = threading.Event()
    replacing = threading.Thread(target=replace, args=(root, is_over))
    replacing.start()
    try:
        attack(server, REQUESTS // 4)  # from here on it has all the buffers that it needs
        before = server.bytes
        assert not attack(server, REQUESTS)
    finally:
        is_over.set()
        replacing.join()
    assert health(server.port) == 200
    assert good(server.port)[0] == good(server.port, "user1")[0] == 200
    assert server.bytes < 1.05 * before


def under_load(server: Running, count: int) -> tuple[list[threading.Thread], list[int | str]]:
    """So many long requests under way, and where their statuses come."""
    statuses: list[int | str] = []
    body = json.dumps(LONG).encode()
    threads = [threading.Thread(target=lambda: statuses.append(ask(server.port, body)[0])) for _ in range(count)]
    for thread in threads:
        thread.start()
    time.sleep(1.0)
    return threads, statuses


def test_sigterm_under_load_answers_or_refuses_all_that_was_accepted(server: Running) -> None:
    threads, statuses = under_load(server, 24)
    server.process.send_signal(signal.SIGTERM)
    for thread in threads:
        thread.join()
    assert len(statuses) == 24
    assert set(statuses) <= {200, 503}
    assert server.process.wait(60) in (0, -signal.SIGTERM)


def test_after_a_kill_there_is_nothing_to_repair(server: Running, root: Path, tmp_path: Path) -> None:
    expected = good(server.port, "user0")[1]["choices"][0]["text"]
    files = {path: path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}
    threads, _ = under_load(server, 8)
    server.process.kill()
    server.process.wait()
    for thread in threads:
        thread.join()
    assert {path: path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()} == files
    words = [str(base_path()), "--adapters", str(root), "--precision", "fp32", "--name", "base"]
    with running(words, tmp_path / "log") as again:
        wait_for(lambda: health(again.port) == 200)
        assert good(again.port, "user0")[1]["choices"][0]["text"] == expected
