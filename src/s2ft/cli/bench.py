"""`s2ft bench`: how long things take, beside their floor."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from s2ft.cli.outputs import check_writable

app = typer.Typer(help="Measure, beside the floor of what is measured.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Keeps `bench` a group of commands, however few there are."""


@app.command()
def selection(
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the rows here", show_default=False)] = None,
) -> None:
    """Time the choice of channels at the shape of LLaMA2-7B.

    Example: s2ft bench selection --json selection.json
    """
    check_writable(json_file)
    from rich.console import Console

    from s2ft.cli.quiet import quiet
    from s2ft.work.bench.selection import bench_selection

    console = Console()
    with quiet(), console.status("choosing channels in 32 layers, several times ..."):
        report = bench_selection()
    show(report.rows, console)
    if json_file is not None:
        json_file.write_text(json.dumps(report.as_dict(), indent=2) + "\n", encoding="utf-8")


def show(rows: list[dict[str, Any]], console: Any) -> None:
    """Rows with the same keys, as a table."""
    from rich.table import Table

    table = Table(*rows[0])
    for row in rows:
        table.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()))
    console.print(table)
