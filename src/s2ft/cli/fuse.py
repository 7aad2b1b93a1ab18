"""`s2ft fuse`: one adapter out of several, after a look at where they meet."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from s2ft.cli.importing import importing
from s2ft.cli.options import JsonFile
from s2ft.cli.tables import layer_table, print_table
from s2ft.common.errors import S2FTError
from s2ft.common.files import replaced_file, write_json
from s2ft.common.outputs import check_free, check_writable
from s2ft.format.folder import check_folder

if TYPE_CHECKING:
    from rich.table import Table

    from s2ft.adapters.overlap import Overlap


def fuse(  # noqa: PLR0913 - a command's options are its function's arguments
    adapters: Annotated[list[Path], typer.Argument(help="Folders of the adapters", show_default=False)],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Folder of the fused adapter; without it, only the report is made",
            show_default=False,
        ),
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="One number for each adapter [default: 1 for each]", show_default=False)
    ] = None,
    method: Annotated[str, typer.Option(help="On channels that several adapters train: sum, ties or dare")] = "sum",
    density: Annotated[float, typer.Option(help="Fraction of those entries that ties and dare keep")] = 0.5,
    seed: Annotated[int, typer.Option(help="Seed for the entries that dare drops")] = 0,
    png: Annotated[Path | None, typer.Option(help="Draw the overlap, layer by layer", show_default=False)] = None,
    json_file: JsonFile = None,
) -> None:
    """Fuse adapters of one base model, which is not read; prints where they overlap before anything is written.

    Example: s2ft fuse math-adapter code-adapter --weights 0.5,0.5 --output both --png overlap.png
    """
    check_writable(png, "png", suffix=".png")
    check_writable(json_file)
    for adapter in adapters:
        check_folder(adapter)
    numbers = None if weights is None else _numbers(weights)
    from rich.console import Console

    with importing():
        from s2ft.adapters.fusion import fuse as plan
        from s2ft.adapters.overlap import draw, summary

    if output is not None:
        check_free(output)
    console = Console()
    with console.status("reading ..."):
        fusion = plan(adapters, numbers, method, density, seed)
        facts = summary(fusion)
    for number, adapter in enumerate(adapters):
        console.print(f"adapter {number}: {adapter}", highlight=False, markup=False, soft_wrap=True)
    if fusion.overlaps:
        print_table(table(fusion.overlaps))
    console.print(f"\n{facts['shared']:,} of {facts['channels']:,} channels in {facts['modules']} modules are shared")
    if png is not None:
        with replaced_file(png) as aside:
            draw(fusion.overlaps, aside)
        console.print(f"drawn: {png}", markup=False, soft_wrap=True)
    if json_file is not None:
        write_json(json_file, facts, allow_nan=False)
    if output is not None:
        with console.status("fusing ..."):
            fusion.save(output)
        console.print(f"fused: {output}", markup=False, soft_wrap=True)


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise S2FTError(f"weights={text!r} is not a list of numbers such as 0.5,0.5") from error


def table(rows: list[Overlap]) -> Table:
    """A row for each module and pair of adapters that change it."""
    columns = ("adapters", "channels", "shared", "share", "cosine", "sign conflict", "interference")
    return layer_table(columns, (), map(_cells, rows))


def _cells(row: Overlap) -> tuple[str, ...]:
    return (
        *("" if row.layer is None else str(row.layer), row.module, row.side),
        *(f"{row.first}, {row.second}", f"{row.first_channels}, {row.second_channels}", str(row.shared)),
        *(f"{row.share:.0%}", _shown(row.cosine, ".2f"), _shown(row.sign_conflict, ".0%")),
        f"{_shown(row.interference_on_first, '.2f')}, {_shown(row.interference_on_second, '.2f')}",
    )


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
