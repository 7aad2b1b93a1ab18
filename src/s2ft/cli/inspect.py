"""`s2ft inspect`: what an adapter changes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from s2ft.cli.tables import print_table
from s2ft.common.files import replaced_file, write_json
from s2ft.common.outputs import check_writable
from s2ft.format.folder import check_folder

if TYPE_CHECKING:
    from rich.table import Table
    from torch import nn

    from s2ft.adapters.file import Adapter

_WHICH = 12  # characters of the list of channels that a row shows; JSON has them all


def inspect(
    adapter: Annotated[Path, typer.Argument(help="Folder of the adapter", show_default=False)],
    png: Annotated[
        Path | None, typer.Option(help="Draw which channels change in which layers", show_default=False)
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(help="Base model: also print how the in-place layout holds each slice", show_default=False),
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the rows here", show_default=False)] = None,
) -> None:
    """Print what an adapter changes, per layer, with counts and norms. Needs no base model; of --base, reads the configuration.

    Example: s2ft inspect runs/quickstart --png channels.png
    """
    check_writable(png, "png", suffix=".png")
    check_writable(json_file)
    check_folder(adapter)
    from rich.console import Console

    from s2ft.adapters.file import read_adapter
    from s2ft.adapters.inspection import draw, summary

    read = read_adapter(adapter)
    model = None
    if base is not None:
        from s2ft.runtime.models import empty_model

        model = empty_model(base)
    facts = summary(read, model)
    console = Console()
    print_table(table(read, model))
    console.print(
        f"\n{facts['weights']:,} weights in {facts['modules']} modules change, ‖Δ‖ = {facts['norm']:.4g}; "
        f"{facts['file_bytes'] / 1e6:.2f} MB on disk\n"
        f"base: {facts['base_model']}   strategy: {facts['strategy']} ({facts['subset']})   seed: {facts['seed']}",
        highlight=False,
        markup=False,  # names come from the adapter's files, and may hold brackets
    )
    if facts["kept_whole"]:
        console.print(f"kept whole beside the slices: {', '.join(facts['kept_whole'])}", markup=False)
    if png is not None:
        with replaced_file(png) as aside:
            draw(read, aside)
        console.print(f"drawn: {png}", markup=False, soft_wrap=True)
    if json_file is not None:
        write_json(json_file, facts, allow_nan=False)


def table(adapter: Adapter, base: nn.Module | None = None) -> Table:
    """The rows for people; a blank layer repeats the one above."""
    from rich.markup import escape
    from rich.table import Table

    from s2ft.adapters.inspection import changes

    result = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("layer", "module", "side"):
        result.add_column(name, no_wrap=True)
    for name in ("channels", "weights", "‖Δ‖", "max |Δ|"):
        result.add_column(name, justify="right", no_wrap=True)
    result.add_column("which")
    if base is not None:
        result.add_column("in place", no_wrap=True)
    above: int | None = None
    for row in changes(adapter, base):
        layer = "" if row.layer is None or row.layer == above else str(row.layer)
        above = row.layer
        name = ".".join(row.module.split(".")[-2:])
        numbers = (str(row.channels), f"{row.weights:,}", f"{row.norm:.4g}", f"{row.largest:.3g}")
        which = row.slice.partition(" ")[2]
        which = which if len(which) <= _WHICH else which[: _WHICH - 1] + "…"
        result.add_row(layer, escape(name), row.side, *numbers, which, *([row.in_place] if base is not None else []))
    return result
