"""A server under load and under attack: right answers, proper statuses, no growth, while adapters are replaced on disk."""

import asyncio
import random
import shutil
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from openai import AsyncOpenAI

from live_server import KEY, Live, embedded, live, wait_for
from s2ft.demo import base_path
from s2ft.demo.skills import SKILLS
from s2ft.runtime.models import load_model, load_tokenizer
from served import greedy

pytestmark = [pytest.mark.soak, pytest.mark.usefixtures("one_thread")]
ADAPTERS, CLIENTS, TOKENS = 8, 64, 10
PROMPTS = [example["prompt"] for skill in ("reverse", "add") for example in SKILLS[skill].examples(2, seed=7)]
RAW = (
    b"GET / HT",
    b"\x00\xff" * 20,
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{",
    b"GET /health HTTP/1.1\r\nHost: " + b"x" * 100_000 + b"\r\n\r\n",
)
PROPER = {200, 400, 401, 404, 405, 413, 415, 429}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    embedded(folder, ADAPTERS)
    return folder


@pytest.fixture(scope="module")
def alone(root: Path) -> dict[tuple[str, str], str]:
    """(model, prompt) → what `generate` writes by itself."""
    base, tokenizer = load_model(str(base_path()), torch.float32), load_tokenizer(str(base_path()))

    def write(name: str, prompt: str) -> str:
        tokens = greedy(base, None if name == "base" else root / name, tokenizer(prompt)["input_ids"], TOKENS)
        return tokenizer.decode(tokens, skip_special_tokens=True)

    names = ["base", *(f"user{number}" for number in range(ADAPTERS))]
    return {(name, prompt): write(name, prompt) for name in names for prompt in PROMPTS}


async def wrong(server: Live, alone: dict[tuple[str, str], str], requests: int) -> int:
    """How many answers of so many requests are wrong; none may fail."""
    asked = iter([random.choice([*alone]) for _ in range(requests)])
    found = 0
    async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key=server.keys[0], max_retries=0) as client:

        async def ask_on() -> None:
            nonlocal found
            for model, prompt in asked:
                how: Any = {"model": model, "prompt": prompt, "temperature": 0, "max_tokens": TOKENS}
                found += (await client.completions.create(**how)).choices[0].text != alone[model, prompt]

        await asyncio.gather(*(ask_on() for _ in range(CLIENTS)))
    return found


@contextmanager
def being_replaced(root: Path) -> Iterator[None]:
    """During the block, adapters are replaced by copies of themselves, by a rename each."""
    stop = threading.Event()

    def replace() -> None:
        while not stop.wait(0.02):
            name = f"user{random.randrange(ADAPTERS)}"
            shutil.copytree(root / name, root / ".new")
            (root / name).rename(root / ".old")
            (root / ".new").rename(root / name)
            shutil.rmtree(root / ".old")

    thread = threading.Thread(target=replace)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def attack(server: Live) -> int | None:
    """One bad request of some kind; its status, if there is one."""
    if random.random() < 0.15:
        with socket.create_connection(("127.0.0.1", server.port)) as client:
            client.sendall(random.choice(RAW))
        return None
    good = {"model": "user1", "prompt": "reverse: a\n", "max_tokens": 3}
    bodies: list[Any] = [
        b"{",
        [],
        b"\xff" * 50,
        {**good, "model": "../.."},
        {**good, "n": 1000},
        {**good, "prompt": [[1], [10**6]]},
    ]
    bodies += [
        {**good, "model": "base", "fuse": {"user1": random.random(), "user2": 1}},
        {**good, "prompt": "a" * 3000},
    ]
    bodies += [b"x" * 2_000_000, good, {**good, "stream": True}, {**good, "seed": "x"}]
    body = random.choice(bodies)
    path = random.choice(["/v1/completions", "/v1/completions", "/v1/chat/completions", "/nowhere"])
    key = f"Bearer {random.choice([KEY, KEY, KEY, 'another-key'])}"
    try:
        return server.ask(random.choice(["POST", "POST", "GET", "DELETE"]), path, body, Authorization=key)[0]
    except (BrokenPipeError, ConnectionResetError):  # refused before all of a large body was sent
        assert isinstance(body, bytes)
        assert len(body) > 1_000_000
        return 413


def test_a_crowd_gets_right_answers_with_room_for_a_few_adapters(
    root: Path, alone: dict[tuple[str, str], str], tries: Callable[[int, int], int]
) -> None:
    size = sum((root / f"user{number}" / "adapter_model.safetensors").stat().st_size for number in range(ADAPTERS))
    for share in (0.4, 2.0):  # of all adapters' bytes beside the model; half as many in memory
        with live(root, keys=(KEY,), adapter_gb=share * size / 1e9, host_gb=share * size / 2e9) as server:
            assert asyncio.run(wrong(server, alone, tries(100, 10_000))) == 0


def test_bad_requests_have_proper_statuses_and_leave_nothing(
    root: Path, alone: dict[tuple[str, str], str], tries: Callable[[int, int], int]
) -> None:
    with live(root, keys=(KEY,)) as server:
        with being_replaced(root):
            seen = Counter(attack(server) for _ in range(tries(60, 1000)))
            before = psutil.Process().memory_info().rss
            seen += Counter(attack(server) for _ in range(tries(60, 1000)))
        assert set(seen) - {None} <= PROPER, seen
        wait_for(lambda: server.under_way == 0)
        assert psutil.Process().memory_info().rss < 1.05 * before
        assert server.ask("GET", "/health")[1] == {"status": "ok"}
        assert asyncio.run(wrong(server, alone, 50)) == 0
