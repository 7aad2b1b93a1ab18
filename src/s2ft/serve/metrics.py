"""Counts for Prometheus: requests, tokens, the queue, the batch, adapters."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from s2ft.serve.scheduler import Watch

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics(Watch):
    """Of one server; each has a registry of its own."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        self._requests = Counter("s2ft_requests", "Requests answered", ["path", "status"], registry=registry)
        self._seconds = Histogram(
            "s2ft_request_seconds", "Time of a request", ["path"], registry=registry, buckets=_SECONDS
        )
        self._tokens = Counter("s2ft_tokens", "Tokens read (prompt) and written (answer)", ["kind"], registry=registry)
        self._waiting = Gauge("s2ft_waiting", "Answers that wait for their turn", registry=registry)
        self._running = Gauge("s2ft_running", "Answers that are being written", registry=registry)
        self._rows = Histogram("s2ft_batch_rows", "Rows of a batch, at each step", registry=registry, buckets=_ROWS)
        self._adapters = Counter(
            "s2ft_adapter", "Where adapters were when they were needed: device, host, disk", ["tier"], registry=registry
        )

    def request(self, path: str, status: int, seconds: float) -> None:
        """A request was answered."""
        self._requests.labels(path, str(status)).inc()
        self._seconds.labels(path).observe(seconds)

    def tokens(self, prompt: int, answer: int) -> None:
        """Tokens that a request took."""
        self._tokens.labels("prompt").inc(prompt)
        self._tokens.labels("answer").inc(answer)

    def step(self, rows: int) -> None:
        """So many rows got a token at once."""
        self._rows.observe(rows)

    def turn(self, rows: int, waiting: int) -> None:
        """The engine's state now."""
        self._running.set(rows)
        self._waiting.set(waiting)

    def adapter(self, tier: str) -> None:
        """An adapter was needed."""
        self._adapters.labels(tier).inc()

    def text(self) -> bytes:
        """In Prometheus' format."""
        return generate_latest(self._registry)
