"""`s2ft reproduce`: a row of the S²FT paper's tables, from data to a score beside the paper's."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Annotated, Any

import typer

from s2ft.cli.importing import importing
from s2ft.cli.leaving import INTERRUPTED
from s2ft.cli.options import model_options, parameter, with_options
from s2ft.cli.tables import show
from s2ft.common.errors import raise_together
from s2ft.common.files import write_json
from s2ft.common.outputs import check_writable
from s2ft.lab.reproduce.options import ReproduceOptions

HELP = """Train and evaluate as a row of the paper's tables says, and put the result beside the paper's figure.

Example: s2ft reproduce arithmetic/llama2-7b/s2ft --data llm-adapters --output runs/arithmetic
"""
WANTED = {
    "RECIPE": "`s2ft reproduce --list` shows them all",
    "--data": "name a folder laid out like LLM-Adapters, or MT-Bench's",
    "--output": "name a folder",
}


def reproduce(recipe: str | None, listed: bool, json_file: Path | None, **values: Any) -> int:
    """Runs `s2ft reproduce`; the signature that typer reads is made below."""
    check_writable(json_file)
    if listed:
        _list(json_file)
        return 0
    typed = {name: value for name, value in values.items() if value is not None}
    named = {"RECIPE": recipe, "--data": typed.get("data"), "--output": typed.get("output")}
    raise_together(f"{name}: missing; {WANTED[name]}" for name, value in named.items() if value is None)
    options = ReproduceOptions.parse({"recipe": recipe, **typed})
    with importing():
        from s2ft.cli.progress import bars, quiet
        from s2ft.lab.reproduce import run

    try:
        with quiet(), bars() as tell:
            found = run.reproduce(options, tell)
    except KeyboardInterrupt:
        found = None
    if found is None:
        return _interrupted()
    _report(found.result, options.output)
    if json_file is not None:
        write_json(json_file, found.result, ensure_ascii=False)
    return 0


_RECIPE = typer.Argument(help=ReproduceOptions.model_fields["recipe"].description, show_default=False)
with_options(
    reproduce,
    [
        inspect.Parameter(
            "recipe",
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
            default=None,
            annotation=Annotated[str | None, _RECIPE],
        ),
        *model_options(ReproduceOptions, without=["recipe"]),
        parameter("listed", bool, "Show the recipes, and what each needs", False, "--list"),
        parameter("json_file", Path | None, "Write the result, or the list, here", None, "--json"),
    ],
)


def _interrupted() -> int:
    from s2ft.runtime.processes import leads

    if not leads():
        return 0  # the leading process evaluates
    typer.echo("interrupted; what is done is kept: the same command continues from there")
    return INTERRUPTED


def _list(json_file: Path | None) -> None:
    with importing():
        from s2ft.cli.progress import bar, quiet
        from s2ft.lab.reproduce.table import recipe_line, recipe_rows

    with quiet(), bar("computing memory") as tell:
        rows = recipe_rows(tell)
    show([recipe_line(row) for row in rows])
    if json_file is not None:
        write_json(json_file, rows, indent=1)


def _report(result: dict[str, Any], output: Path) -> None:
    from rich.console import Console

    console = Console(highlight=False, markup=False)
    show([result_line(result)])
    if result["deviations"]:
        smaller = ", ".join(f"{name}={value}" for name, value in result["deviations"].items())
        console.print(f"not the paper's run: {smaller}")
    if result["errors"]:
        console.print(f"{result['errors']} answers or ratings failed; the same command tries only those again")
    console.print(f"result: {output}/reproduction.json", soft_wrap=True)


def result_line(result: dict[str, Any]) -> dict[str, str]:
    """The table's row: the paper's figure and ours."""
    score = result["score"]
    return {
        "recipe": result["recipe"],
        "paper": f"{result['paper']:g}",
        "here": "not rated" if score is None else f"{score:.2f}",
        "95%": "–" if result["low"] is None else f"{result['low']:.2f}–{result['high']:.2f}",
        "difference": "–" if score is None else f"{result['difference']:+.2f}",
    }
