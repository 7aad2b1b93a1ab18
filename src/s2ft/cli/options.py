"""Commands whose options are declared elsewhere, as fields of a model or in a table: their signatures, which typer reads."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from s2ft.finetune.values import repeats
from s2ft.lab.registry import Entry

AdapterFolder = Annotated[Path, typer.Argument(help="Folder of the adapter", show_default=False)]
Base = Annotated[
    str | None, typer.Option(help="Base model [default: the one that the adapter names]", show_default=False)
]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write the result here", show_default=False)]
_SHORT = {"model": "-m", "data": "-d", "output": "-o", "config": "-c"}


def parameter(name: str, kind: Any, help: str, default: Any = None, *flags: str, **more: Any) -> inspect.Parameter:
    """An option `--name`, with a short form where people expect one, or with the `flags` that are given.

    Args:
        kind: The type that typer reads.
        help: Shown as it is, brackets included.
        default: `...` if the option has to be given.
        more: Of `typer.Option`.
    """
    flags = flags or (f"--{name.replace('_', '-')}", *filter(None, [_SHORT.get(name)]))
    settings = {"show_default": default not in (None, ..., False), **more}
    option = typer.Option(*flags, help=help.replace("[", "\\["), **settings)
    default = inspect.Parameter.empty if default is ... else default
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option])


def with_options(
    command: Callable[..., Any], parameters: Sequence[inspect.Parameter], returns: Any = int
) -> Callable[..., Any]:
    """The command, which takes anything, with the options that it is called with."""
    command.__signature__ = inspect.Signature(parameters, return_annotation=returns)  # type: ignore[attr-defined]
    command.__annotations__ = {each.name: each.annotation for each in parameters} | {"return": returns}
    return command


def model_options(
    model: type[BaseModel], without: Sequence[str] = (), required: str = "required"
) -> list[inspect.Parameter]:
    """An option for each field, those first that have to be given.

    Values stay the text that was typed, so that the model says all that is wrong with them at once.
    """
    fields = sorted(model.model_fields.items(), key=lambda item: not item[1].is_required())
    return [_of_field(name, field, required) for name, field in fields if name not in without]


def _of_field(name: str, field: FieldInfo, required: str) -> inspect.Parameter:
    flag = f"--{name.replace('_', '-')}"
    default = required if field.is_required() else f"default: {field.default}"
    text = f"{field.description}" + ("" if field.default in (None, []) else f" [{default}]")
    if field.annotation is bool:
        return parameter(name, bool | None, text, None, f"{flag}/--no-{flag[2:]}")
    kind = list[str] if repeats(field) else str
    return parameter(name, kind | None, text, metavar=_metavar(field))


def _metavar(field: FieldInfo) -> str:
    """What the value looks like; a field that takes several kinds says so in its description."""
    words = str(field.annotation)
    plain = "list" not in words and "dict" not in words
    return next((kind.upper() for kind in ("float", "int") if plain and kind in words), "TEXT")


def entry_options(entry: Entry) -> list[inspect.Parameter]:
    """The options of a benchmark or study: its own, `--json`, and `--png` where it has a picture."""
    own = [parameter(name, option.kind, option.help, option.default) for name, option in entry.options.items()]
    png = [parameter("png", Path | None, "Draw the result here")] if entry.has_picture else []
    return [*own, parameter("json_file", Path | None, "Write the result here", None, "--json"), *png]
