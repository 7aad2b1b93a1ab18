"""One question to a judge's server, by OpenAI's client, without some things that the client does.

The client sends further keys and headers from the environment (OPENAI_ORG_ID, say), and follows redirects: here the judge gets
its own key only, and no other server gets it. The client reads answers of any length, for as long as that takes: here both have
a limit.
"""

from __future__ import annotations

import time
from typing import Any

from openai import APIConnectionError, DefaultHttpxClient, OpenAI

LARGEST = 4 * 2**20  # bytes of an answer
SENT = frozenset({"host", "accept", "content-type", "content-length", "connection"})  # headers, beside the key


class _Client(DefaultHttpxClient):
    def __init__(self, key: str | None, seconds: float) -> None:
        super().__init__(follow_redirects=False, timeout=seconds)
        self._key, self._seconds = key, seconds

    def send(self, request: Any, **options: Any) -> Any:
        """The response, whole."""
        headers = {name: value for name, value in request.headers.items() if name in SENT}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        sent = type(request)(request.method, request.url, headers=headers, content=request.read())
        response = super().send(sent, **{**options, "stream": True})
        content, end = b"", time.monotonic() + self._seconds
        try:
            for part in response.iter_raw():
                content += part
                if time.monotonic() > end or len(content) > LARGEST:  # the client's time-out is for each read
                    raise APIConnectionError(message="the answer took too long, or has no end", request=request)
        finally:
            response.close()
        headers = {
            "Retry-After": response.headers.get("Retry-After", "")
        }  # without Content-Encoding: compressed answers are not unpacked
        return type(response)(response.status_code, headers=headers, content=content, request=request)


def ask(
    url: str,  # up to and with /v1
    key: str | None,
    model: str,
    messages: list[dict[str, str]],
    seconds: float,  # for the whole answer
) -> bytes:
    """The body of the answer.

    Raises:
        openai.APIStatusError: for an answer that is a refusal or a redirect.
        openai.APIConnectionError: if there is none, or none that ends.
    """
    with (
        _Client(key, seconds) as http,
        OpenAI(api_key=key or "none", base_url=url, max_retries=0, http_client=http) as client,
    ):
        asked: Any = messages
        found = client.chat.completions.with_raw_response.create(model=model, messages=asked, temperature=0)
    return bytes(found.content)
