"""`s2ft merge`: a checkpoint of its own out of a base and an adapter."""

from pathlib import Path
from typing import Annotated

import typer

from s2ft.cli.importing import importing
from s2ft.cli.options import AdapterFolder, Base, JsonFile
from s2ft.common.files import write_json
from s2ft.common.outputs import check_writable
from s2ft.format.folder import check_folder
from s2ft.format.terms import QUANTISATIONS


def merge(
    adapter: AdapterFolder,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="A new folder for the merged model", show_default=False)
    ],
    base: Base = None,
    quantize: Annotated[
        str | None,
        typer.Option(help=f"Merge into the base as it was quantised for training: {', '.join(QUANTISATIONS)}"),
    ] = None,
    requantize: Annotated[
        bool, typer.Option("--requantize", help="Quantise the merged model again, by quantize")
    ] = False,
    json_file: JsonFile = None,
) -> None:
    """Merge an adapter into its base, shard by shard; dtypes stay, tokenizer and chat template are copied.

    A quantised base is dequantised: the result is a plain model.

    Example: s2ft merge runs/quickstart/adapter --base src/s2ft/demo/base --output runs/merged
    """
    check_writable(json_file)
    check_folder(adapter)
    from rich.console import Console
    from rich.progress import track

    with importing():
        from s2ft.adapters.merge import merge as write
        from s2ft.common.outputs import bytes_of
        from s2ft.runtime.merging import has_quantised_base, merge_quantised

    console, lost = Console(), dict[str, float]()
    if quantize is not None or requantize or has_quantised_base(adapter, base):
        lost = merge_quantised(adapter, output, base, quantize, requantize)
    else:
        write(adapter, output, base, lambda steps: track(steps, "merging", transient=True, console=console))
    size = bytes_of(output)
    console.print(f"merged: {output} ({size / 1e6:.2f} MB)", highlight=False, markup=False, soft_wrap=True)
    if lost:
        worst = max(lost, key=lambda module: lost[module])
        console.print(
            f"lost by rounding: {sum(lost.values()) / len(lost):.1%} of a slice, at most {lost[worst]:.1%} ({worst})"
        )
    if json_file is not None:
        write_json(json_file, {"output": str(output), "bytes": size, **({"lost": lost} if lost else {})})
