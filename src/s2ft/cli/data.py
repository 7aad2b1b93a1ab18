"""`s2ft data`: looks at training data before it is trained on."""

from __future__ import annotations

from collections.abc import Iterator
from inspect import Parameter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from s2ft.cli.importing import importing
from s2ft.cli.options import model_options, parameter, with_options
from s2ft.common.files import write_json
from s2ft.common.outputs import check_writable
from s2ft.finetune.preview import PreviewOptions

if TYPE_CHECKING:
    from s2ft.finetune.preview import Preview

app = typer.Typer(help="Look at training data before it is trained on.", no_args_is_help=True)
HELP = """Show what `s2ft train` makes of data: what each source is taken for, one example as the model reads it, and counts.

Example: s2ft data preview math.csv --model Qwen/Qwen3-0.6B --map instruction=question,output=reply
"""


@app.callback()
def _group() -> None:
    """Keeps `preview` a command of its own, while it is the only one."""


def preview(sources: list[str], json_file: Path | None, **values: Any) -> None:
    """Runs `s2ft data preview`; the signature that typer reads is made below."""
    typed = {name: value for name, value in values.items() if value not in (None, [])}
    options = PreviewOptions.parse({**typed, "data": sources})
    check_writable(json_file)
    with importing():
        from s2ft.cli.progress import quiet
        from s2ft.finetune.preview import preview as look

    with quiet():
        found = look(options)
    _show(found)
    if json_file is not None:
        write_json(json_file, found.as_dict(), ensure_ascii=False)


def _show(found: Preview) -> None:
    from rich.console import Console
    from rich.table import Table

    from s2ft.data.masks import marked

    console = Console(markup=False, highlight=False)  # what data say may hold brackets
    for line in found.taken:
        console.print(line, soft_wrap=True)
    console.print("\nAn example, learned between ⟦ and ⟧:\n", style="bold")
    console.print(marked(found.example), soft_wrap=True)
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, text in _counts(found):
        table.add_row(name, text)
    console.print()
    console.print(table)


def _counts(found: Preview) -> Iterator[tuple[str, str]]:
    yield "examples", f"{found.examples:,}, {found.usable:,} rows to train on, of at most {found.max_length:,} tokens"
    for name, why in (
        ("empty", "have no response and are left out"),
        ("alike", "have the same answer twice and are left out"),
        ("too_long", "have their response beyond max_length and are left out"),
        ("shortened", "are cut to max_length"),
        ("endless", "have no token that ends an answer"),
        ("parted", "have a prompt that is laid out differently once the answer follows"),
    ):
        if count := getattr(found, name):
            yield name.replace("_", " "), f"{count:,} {why}"
    if found.tokens is not None:
        tokens = found.tokens
        yield (
            "tokens of a row",
            f"median {tokens['median']:,}, 95% up to {tokens['p95']:,}, longest {tokens['longest']:,}",
        )
        yield "tokens in all", f"{tokens['total']:,}, {tokens['learned'] / tokens['total']:.0%} of them learned"


_SOURCES = typer.Argument(help="Files, folders or names on the Hub, as --data of s2ft train", show_default=False)
with_options(
    preview,
    [
        Parameter("sources", Parameter.KEYWORD_ONLY, annotation=Annotated[list[str], _SOURCES]),
        *model_options(PreviewOptions, without=["data"]),
        parameter("json_file", Path | None, "Write all of it here", None, "--json"),
    ],
    returns=None,
)
app.command("preview", help=HELP)(preview)
