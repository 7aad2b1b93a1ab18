"""What is told when something cannot be done: in OpenAI's shape, without paths, stacks or anything of a prompt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse

from s2ft.common.reading import shown
from s2ft.serve.job import FailureKind

RETRY = {"Retry-After": "1"}
_FAILED: dict[FailureKind, tuple[int, str]] = {
    "timeout": (504, "the answer took longer than this server allows"),
    "stopping": (503, "the server is stopping"),
    "adapter": (500, "the adapter cannot be used; the server's log says why"),
    "overflow": (500, "{model}: the logits are not finite; its weights are damaged, or too large for this precision"),
    "engine": (500, "the answer could not be written; the server's log says why"),
}


class ApiError(Exception):
    """A refusal.

    Args:
        status: HTTP's.
        message: For the client.
        param: The field of the request that it is about.
        code: A word for programs.
        headers: Of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """As OpenAI's API tells it."""
        kind = (
            "server_error"
            if self.status >= 500
            else "rate_limit_error"
            if self.status == 429
            else "invalid_request_error"
        )
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def response(self) -> JSONResponse:
        """The whole response."""
        return JSONResponse(self.body, self.status, self.headers)


def full() -> ApiError:
    """Too much is waiting already."""
    return ApiError(429, "too many requests are waiting; try again", code="rate_limit_exceeded", headers=RETRY)


def no_model(name: str) -> ApiError:
    """There is no model by that name."""
    message = f"there is no model {shown(name)}; GET /v1/models lists those there are"
    return ApiError(404, message, "model", "model_not_found")


def failed(kind: FailureKind, model: str = "") -> ApiError:
    """The engine has no answer by a model."""
    status, message = _FAILED[kind]
    return ApiError(
        status, message.replace("{model}", shown(model)), code=kind, headers=RETRY if status == 503 else None
    )


def overflow(label: str) -> ApiError:
    """A fusion by the client's weights has no answer."""
    message = f"fuse: the logits of {shown(label)} are not finite; take smaller weights"
    return ApiError(400, message, "fuse", "overflow")


async def respond(error: ApiError, scope: Any, receive: Any, send: Any) -> None:
    """Answers a request by the error; for what stands before the application."""
    await error.response(scope, receive, send)
