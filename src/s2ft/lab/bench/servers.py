"""Servers in processes of their own, for `s2ft bench serve`: `s2ft serve` by this Python, or by one that has vLLM."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from pathlib import Path

import psutil

from s2ft.common.errors import S2FTError

START = 600.0  # seconds for a server to load its model
_MAIN = "from s2ft_command import main; main()"


@dataclass(frozen=True)
class Running:
    """A server that answers."""

    port: int
    process: subprocess.Popen[bytes]

    @property
    def bytes(self) -> int:
        """The memory of the process and those that it started."""
        whole = psutil.Process(self.process.pid)
        return sum(one.memory_info().rss for one in (whole, *whole.children(recursive=True)))


@contextmanager
def running(words: Sequence[str], log: Path, python: str = sys.executable) -> Iterator[Running]:
    """`s2ft serve WORDS`, until the block is left.

    Args:
        words: What is typed after `s2ft serve`, without the port.
        log: Takes what the server prints.
        python: Whose s2ft it is.

    Raises:
        S2FTError: if it does not start.
    """
    port = _free_port()
    command = [python, "-W", "ignore", "-c", _MAIN, "serve", *words, "--port", str(port)]
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=_environment(python))
    server = Running(port, process)
    try:
        _wait(server, log)
        yield server
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def health(port: int) -> int | None:
    """The status of the server's /health; None if nobody answers."""
    connection = HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status
    except (OSError, HTTPException):
        return None
    finally:
        connection.close()


def _wait(server: Running, log: Path) -> None:
    end = time.monotonic() + START
    while health(server.port) != 200:
        if server.process.poll() is not None or time.monotonic() > end:
            said = log.read_text(errors="replace").strip().splitlines()[-5:]
            raise S2FTError("the server does not start; it says:\n" + "\n".join(said))
        time.sleep(0.2)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


def _environment(python: str) -> dict[str, str]:
    """A vLLM on the CPU is told not to bind its threads to cores, and to keep to a small part of the memory."""
    if python == sys.executable:
        return dict(os.environ)
    return {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        **os.environ,
    }
