"""`s2ft serve`: many adapters of one base behind OpenAI's API."""

from __future__ import annotations

import inspect
import json
from typing import Annotated, Any

import typer

from s2ft.cli.options import model_options, with_options
from s2ft.runtime.lookup import check_hub
from s2ft.serve.options import ServeOptions

HELP = """Serve a base model and its adapters by OpenAI's API; rows of different adapters share one batch.

Example: s2ft serve Qwen/Qwen3-0.6B --adapters adapters
"""


def serve(**values: Any) -> None:
    """Runs `s2ft serve`; the signature that typer reads is made below."""
    options = ServeOptions.parse({name: value for name, value in values.items() if value is not None})
    check_hub(options.model)
    from s2ft.cli.progress import quiet
    from s2ft.serve.server import serve as run

    with quiet():
        run(options, _tell)


_BASE = Annotated[str, typer.Argument(metavar="BASE", help="Base model: a folder, a .gguf file or a name on the Hub")]
with_options(
    serve,
    [
        inspect.Parameter("model", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=_BASE),
        *model_options(ServeOptions, without=["model"]),
    ],
    returns=None,
)


def _tell(address: str, service: Any) -> None:
    """What is served, and a command that works."""
    base, names = service.adapters.base, service.adapters.names
    typer.echo(f"{base}, with {len(names)} adapters: {', '.join(names)}" if names else f"{base}, without adapters")
    typer.echo(f"\n{curl(address, [*names, base][0])}\n")


def curl(address: str, model: str) -> str:
    """A command that asks the server."""
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 32})
    return f"curl {address}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'"
