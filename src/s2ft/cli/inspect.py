"""`s2ft inspect`: what an adapter changes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from s2ft.cli.importing import importing
from s2ft.cli.options import AdapterFolder, JsonFile
from s2ft.cli.tables import layer_table, print_table
from s2ft.common.files import replaced_file, write_json
from s2ft.common.outputs import check_writable
from s2ft.format.folder import check_folder

if TYPE_CHECKING:
    from rich.table import Table
    from torch import nn

    from s2ft.adapters.file import Adapter
    from s2ft.adapters.inspection import ModuleChange

_WHICH = 12  # characters of the list of channels that a row shows; JSON has them all


def inspect(
    adapter: AdapterFolder,
    png: Annotated[
        Path | None, typer.Option(help="Draw which channels change in which layers", show_default=False)
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(help="Base model: also print how the in-place layout holds each slice", show_default=False),
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Print what an adapter changes, per layer, with counts and norms; needs no base model. Of --base, only the config is read.

    Example: s2ft inspect runs/quickstart/adapter --png channels.png
    """
    check_writable(png, "png", suffix=".png")
    check_writable(json_file)
    check_folder(adapter)
    from rich.console import Console

    with importing():
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
    """A row for each module that the adapter changes."""
    from s2ft.adapters.inspection import changes

    words = ("which",) if base is None else ("which", "in place")
    return layer_table(("channels", "weights", "‖Δ‖", "max |Δ|"), words, map(_cells, changes(adapter, base)))


def _cells(row: ModuleChange) -> tuple[str, ...]:
    which = row.slice.partition(" ")[2]
    return (
        *("" if row.layer is None else str(row.layer), row.module, row.side),
        *(str(row.channels), f"{row.weights:,}", f"{row.norm:.4g}", f"{row.largest:.3g}"),
        which if len(which) <= _WHICH else which[: _WHICH - 1] + "…",
        *([] if row.in_place is None else [row.in_place]),
    )
