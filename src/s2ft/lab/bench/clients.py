"""What `s2ft bench serve` asks, and those who ask: greedy questions with known answers, from many clients at once."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from itertools import count
from typing import Any

import numpy as np

WAIT = 300.0  # seconds for an answer


@dataclass(frozen=True)
class Question:
    """A prompt for a model of the server, and what `generate` alone answers."""

    model: str
    prompt: tuple[int, ...]  # token ids
    tokens: int  # of the answer at most
    answer: str


@dataclass(frozen=True)
class Reply:
    """What came of a question."""

    status: int | None  # None: no answer at all
    text: str
    tokens: int
    seconds: float


@dataclass
class Tally:
    """The replies of all clients."""

    seconds: float = 0.0  # from the first question to the last answer
    replies: list[tuple[Question, Reply]] = field(default_factory=list)

    def row(self) -> dict[str, Any]:
        """Counts, tokens per second, and how long answers took."""
        answered = [(question, reply) for question, reply in self.replies if reply.status == 200]
        took = [1e3 * reply.seconds for _, reply in answered] or [float("nan")]
        return {
            "requests": len(self.replies),
            "failed": len(self.replies) - len(answered),
            "wrong": sum(question.answer != reply.text for question, reply in answered),
            "seconds": self.seconds,
            "tokens_per_s": sum(reply.tokens for _, reply in answered) / self.seconds,
            "p50_ms": float(np.percentile(took, 50)),
            "p95_ms": float(np.percentile(took, 95)),
        }


def ask_for(seconds: float, port: int, questions: Sequence[Question], clients: int) -> Tally:
    """So many clients ask one question after the other, for so long, each one at least; what is under way is waited for."""
    tally, numbers, end = Tally(), count(), time.monotonic() + seconds
    start = time.monotonic()

    def ask() -> None:
        connection = HTTPConnection("127.0.0.1", port, timeout=WAIT)
        is_over = False
        while not is_over:
            question = questions[next(numbers) % len(questions)]
            tally.replies.append((question, answer_to(question, connection)))
            is_over = time.monotonic() >= end
        connection.close()

    threads = [threading.Thread(target=ask, daemon=True) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    tally.seconds = time.monotonic() - start
    return tally


def answer_to(question: Question, connection: HTTPConnection) -> Reply:
    """Asks once."""
    body = {"model": question.model, "prompt": question.prompt, "max_tokens": question.tokens, "temperature": 0}
    start = time.monotonic()
    try:
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        status, text = response.status, response.read()
        found: Mapping[str, Any] = json.loads(text) if status == 200 else {}
    except (OSError, HTTPException, ValueError):
        connection.close()
        return Reply(None, "", 0, time.monotonic() - start)
    taken = time.monotonic() - start
    if status != 200:
        return Reply(status, "", 0, taken)
    return Reply(status, found["choices"][0]["text"], found["usage"]["completion_tokens"], taken)
