"""The HTTP side: routes, and what stands before them.

request → log and count → is the host ours? → has it a key? → is it small enough, and here in time? → route
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware

from s2ft.serve.access import PAGE, App, Keys
from s2ft.serve.answering import answer
from s2ft.serve.errors import ApiError, no_model
from s2ft.serve.limits import Limits
from s2ft.serve.logs import Logged
from s2ft.serve.requests import ChatRequest, CompletionRequest, parsed
from s2ft.serve.service import Service

POLICY = "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; form-action 'none'; base-uri 'none'"
LOCAL = ("localhost", "127.0.0.1", "[::1]", "::1")


def create_app(service: Service, keys: Iterable[str] = ()) -> App:
    """The server's application; the engine starts and ends with it."""
    app = _routes(service)
    routes = frozenset(getattr(route, "path", "") for route in app.routes)
    options, keys = service.options, list(keys)
    inner: App = Keys(Limits(app, options.max_body, options.timeout), keys)
    if options.is_local and not keys:  # a web page elsewhere could otherwise ask in its reader's name
        inner = TrustedHostMiddleware(inner, [*LOCAL, options.host], www_redirect=False)
    return Logged(inner, routes, service.metrics.request)


def _routes(service: Service) -> FastAPI:
    @asynccontextmanager
    async def running(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await service.close()

    app = FastAPI(lifespan=running, docs_url=None, redoc_url=None, openapi_url=None)
    app.exception_handler(ApiError)(_api_error)
    app.exception_handler(HTTPException)(_http_error)
    app.exception_handler(Exception)(_bug)

    @app.get("/health")
    async def health() -> Response:
        return JSONResponse(
            {"status": "ok"} if service.is_alive else {"status": "stopping"}, 200 if service.is_alive else 503
        )

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await answer(service, parsed(CompletionRequest, await request.body()), request)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await answer(service, parsed(ChatRequest, await request.body()), request)

    _model_routes(app, service)
    _page_routes(app, service)
    return app


def _model_routes(app: FastAPI, service: Service) -> None:
    adapters = service.adapters

    def card(name: str) -> dict[str, Any]:
        parent = None if name == adapters.base else adapters.base
        head = {"id": name, "object": "model", "created": service.created, "owned_by": "s2ft"}
        return {**head, "root": adapters.base, "parent": parent}

    @app.get("/v1/models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [card(name) for name in (adapters.base, *adapters.names)]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        if name not in (adapters.base, *adapters.names):
            raise no_model(name)
        return JSONResponse(card(name))

    if service.options.allow_loading:

        @app.put("/v1/adapters/{name}")
        async def add(name: str) -> Response:
            if not adapters.add(name):
                raise no_model(name)
            return JSONResponse(card(name))

        @app.delete("/v1/adapters/{name}")
        async def remove(name: str) -> Response:
            if not adapters.remove(name):
                raise no_model(name)
            return JSONResponse({"id": name, "object": "model", "deleted": True})


def _page_routes(app: FastAPI, service: Service) -> None:
    """The page at /, its parts, and what only the page asks for."""
    for address, (file, kind) in PAGE.items():
        body = (Path(__file__).parent / "page" / file).read_bytes()
        app.get(address)(partial(_part_of_page, body, kind))

    @app.get("/v1/adapters/{name}/channels")
    async def channels(name: str) -> Response:
        return JSONResponse({"object": "list", "data": await service.channels(name)})


async def _part_of_page(body: bytes, kind: str) -> Response:
    return Response(body, media_type=kind, headers={"Content-Security-Policy": POLICY, "Cache-Control": "no-cache"})


async def _api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response


async def _http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    what = {404: "there is nothing at this address", 405: "this address takes another method"}
    said = ApiError(error.status_code, what.get(error.status_code, "the request cannot be read"), headers=error.headers)
    return said.response


async def _bug(_: Request, __: Exception) -> Response:
    return ApiError(500, "the server failed; its log says how").response
