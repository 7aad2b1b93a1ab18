"""`s2ft merge`: a checkpoint of its own out of a base and an adapter."""

from pathlib import Path
from typing import Annotated

import typer

from s2ft.cli.options import AdapterFolder, Base, JsonFile
from s2ft.common.files import write_json
from s2ft.common.outputs import check_writable
from s2ft.format.folder import check_folder


def merge(
    adapter: AdapterFolder,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="A new folder for the merged model", show_default=False)
    ],
    base: Base = None,
    json_file: JsonFile = None,
) -> None:
    """Merge an adapter into its base, shard by shard; dtypes stay, tokenizer and chat template are copied.

    Example: s2ft merge runs/quickstart --base src/s2ft/demo/base --output runs/merged
    """
    check_writable(json_file)
    check_folder(adapter)
    from rich.console import Console
    from rich.progress import track

    from s2ft.adapters.merge import merge as write
    from s2ft.common.outputs import bytes_of

    console = Console()
    merged = write(adapter, output, base, lambda steps: track(steps, "merging", transient=True, console=console))
    size = bytes_of(merged)
    console.print(f"merged: {merged} ({size / 1e6:.2f} MB)", highlight=False, markup=False, soft_wrap=True)
    if json_file is not None:
        write_json(json_file, {"output": str(merged), "bytes": size})
