"""One line of JSON for each request: what it took, and nothing of what was said."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from typing import Any

NOTES = "s2ft.notes"
"""Where, in a request's scope, the application notes what the line tells: model, prompt_tokens, answer_tokens."""

_log = logging.getLogger("s2ft.serve.requests")


class Logged:
    """Writes the lines, and has requests counted.

    Args:
        app: The application.
        routes: Paths by which requests are counted; all others count as "other".
        count: Takes path, status and seconds.
    """

    def __init__(self, app: Any, routes: frozenset[str], count: Callable[[str, int, float], None]) -> None:
        self._app, self._routes, self._count = app, routes, count

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """As every ASGI application."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        notes: dict[str, Any] = {}
        scope[NOTES], start, status = notes, time.monotonic(), 499  # nobody was there any more

        async def noting(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noting)
        finally:
            path, seconds = scope["path"] if scope["path"] in self._routes else "other", time.monotonic() - start
            self._count(path, status, seconds)
            line = {"method": scope["method"], "path": path, "status": status, "seconds": round(seconds, 4), **notes}
            _log.info(json.dumps(line))


class AsJson(logging.Formatter):
    """A log record as a line of JSON; the lines of requests are JSON already, and get a time."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        head: dict[str, Any] = {"time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S"), "level": record.levelname}
        if record.name == _log.name:
            return json.dumps({**head, **json.loads(record.getMessage())})
        if record.exc_info:
            head["stack"] = self.formatException(record.exc_info)
        return json.dumps({**head, "message": record.getMessage()})
