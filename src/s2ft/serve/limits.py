"""What a request may take: so many bytes, of JSON, and so much time, however slowly its client sends or reads."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from s2ft.serve.errors import ApiError, failed, respond

BODY_SECONDS = 20.0  # until a request is here
GRACE = 5.0  # seconds beyond the engine's own limit, which answers properly
_log = logging.getLogger("s2ft.serve")


class Limits:
    """Reads a request's body, within its limits, before the application sees it.

    Args:
        app: The application.
        most_bytes: Of a body.
        seconds: For the whole of a request.
    """

    def __init__(self, app: Any, most_bytes: int, seconds: float) -> None:
        self._app, self._most, self._seconds = app, most_bytes, seconds

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """As every ASGI application."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = False

        async def noting(message: Any) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            async with asyncio.timeout(self._seconds + GRACE):
                await self._limited(scope, receive, noting)
        except TimeoutError:
            if started:
                raise ConnectionAbortedError("a client read its answer too slowly") from None  # the server closes it
            await respond(failed("timeout"), scope, receive, send)

    async def _limited(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            body = await self._body(scope, receive) if scope["method"] == "POST" else None
        except ApiError as error:
            await respond(error, scope, receive, send)
            return
        if body is None:  # or the client left before it was here
            if scope["method"] != "POST":
                await self._app(scope, receive, send)
            return
        await self._app(scope, _first(body, receive), send)

    async def _body(self, scope: Any, receive: Any) -> bytes | None:
        headers = dict(scope["headers"])
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self._most:
            raise self._too_large()
        if headers.get(b"content-type", b"").partition(b";")[0].strip().lower() != b"application/json":
            raise ApiError(415, "the body has to be JSON: Content-Type: application/json")
        try:
            async with asyncio.timeout(min(BODY_SECONDS, self._seconds)):
                return await self._read(receive)
        except TimeoutError:
            raise ApiError(408, "the request came too slowly", headers={"Connection": "close"}) from None

    async def _read(self, receive: Any) -> bytes | None:
        body = b""
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            if len(body) > self._most:
                raise self._too_large()
            if not message.get("more_body"):
                return bytes(body)

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the request is larger than {self._most:,} bytes", headers={"Connection": "close"})


def _first(body: bytes, receive: Any) -> Any:
    """A `receive` that gives the body, and then what the server says."""
    given = False

    async def told() -> Any:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return told
