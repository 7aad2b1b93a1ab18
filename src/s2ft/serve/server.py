"""Starts a server, runs it until it is told to stop, and lets what is under way end."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from s2ft.common.errors import S2FTError
from s2ft.runtime.precision import choose_precision
from s2ft.serve.app import create_app
from s2ft.serve.keys import read_keys
from s2ft.serve.logs import AsJson
from s2ft.serve.model import load_base
from s2ft.serve.options import ServeOptions
from s2ft.serve.service import Service

HEADER_SECONDS = 10.0  # until a request's headers are here
_MORE_CONNECTIONS = 64  # than there may be answers: for /health, /metrics and refusals


class Protocol(H11Protocol):
    """Closes a connection whose client does not say in time what it wants."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client is there."""
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        """It says something."""
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """It is gone."""
        super().connection_lost(exc)
        self._unwatch()

    def _watch(self) -> None:
        waits = self.cycle is None or self.cycle.response_complete
        if not waits:
            self._unwatch()
        elif self._timer is None:
            self._timer = self.loop.call_later(HEADER_SECONDS, self.transport.close)

    def _unwatch(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class Server(uvicorn.Server):
    """uvicorn's; when it is told to stop, requests under way have `drain` seconds."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Takes no more connections, and waits for those there are."""
        timer = asyncio.get_running_loop().call_later(self._service.options.drain, self._service.stop)
        try:
            await super().shutdown(sockets)
        finally:
            timer.cancel()


def serve(options: ServeOptions, ready: Callable[[str, Service], Any]) -> None:
    """Serves until a signal comes.

    Args:
        options: All of them.
        ready: Is told the address, once it takes requests.

    Raises:
        S2FTError: if the address is taken, or the base cannot be served.
    """
    keys = read_keys(options.keys)
    with listening(options.host, options.port) as sock:
        service = Service(options, load_base(options.model, choose_precision(options.precision)[0]))
        server = make_server(service, keys)
        _log_as_json()
        ready(address(options.host, sock), service)
        server.run([sock])


def make_server(service: Service, keys: list[str]) -> Server:
    """The server of a service."""
    options = service.options
    config = uvicorn.Config(
        create_app(service, keys),
        http=Protocol,
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        limit_concurrency=options.rows + options.queue + _MORE_CONNECTIONS,
        timeout_graceful_shutdown=int(options.drain) + 5,
    )
    return Server(config, service)


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens there.

    Raises:
        S2FTError: if that cannot be had.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=512)
    except OSError as error:
        raise S2FTError(f"host={host!r}, port={port}: cannot listen there: {error.strerror or error}") from None


def address(host: str, sock: socket.socket) -> str:
    """What clients call the server, such as http://127.0.0.1:8000."""
    return f"http://{f'[{host}]' if ':' in host else host}:{sock.getsockname()[1]}"


def _log_as_json() -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(AsJson())
    for name, level in (("s2ft.serve", logging.INFO), ("uvicorn.error", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)
