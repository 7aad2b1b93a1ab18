"""Who may ask: requests that carry a key, which is compared in constant time."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

from s2ft.serve.errors import ApiError, respond

PAGE = {  # address → file in serve/page, and its type
    "/": ("page.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
OPEN = {*PAGE, "/health"}  # a page without contents, and a word; all else is for those who have a key

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class Keys:
    """Lets requests through that carry one of the keys; with no keys, all of them.

    It stands before everything that reads a request's body.
    """

    def __init__(self, app: App, keys: Iterable[str]) -> None:
        self._app, self._digests = app, [_digest(key.encode()) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As every ASGI application."""
        if scope["type"] == "http" and scope["path"] not in OPEN and not self._knows(scope):
            error = ApiError(401, "a key is needed: Authorization: Bearer KEY", code="invalid_api_key")
            await respond(error, scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _knows(self, scope: Scope) -> bool:
        if not self._digests:
            return True
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        kind, _, key = given.partition(b" ")
        digest = _digest(key.strip())
        found = [hmac.compare_digest(digest, known) for known in self._digests]  # all of them, whichever fits
        return kind.lower() == b"bearer" and any(found)


def _digest(key: bytes) -> bytes:
    """Of one length for all keys, so that comparing tells nothing of theirs."""
    return hashlib.sha256(key).digest()
