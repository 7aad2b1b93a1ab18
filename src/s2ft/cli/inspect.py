"""`s2ft inspect`: what an adapter changes."""

from pathlib import Path
from typing import Annotated

import typer

from s2ft.cli.tables import print_table
from s2ft.common.files import replaced_file, write_json
from s2ft.common.outputs import check_writable


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
    from rich.console import Console

    from s2ft.adapters.file import read_adapter
    from s2ft.adapters.inspection import draw, summary, table

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
