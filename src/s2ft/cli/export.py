"""`s2ft export`: an adapter in the form that another engine takes."""

from pathlib import Path
from typing import Annotated

import typer

from s2ft.cli.importing import importing
from s2ft.cli.options import AdapterFolder, Base, JsonFile
from s2ft.common.files import write_json
from s2ft.common.outputs import check_writable
from s2ft.exports.targets import TARGETS
from s2ft.format.folder import check_folder

_FORMS = "; ".join(f"{name}, for {target.taker}" for name, target in TARGETS.items())
_FILES = ", ".join(f"a new {target.suffix} file for {name}" for name, target in TARGETS.items() if target.suffix)


def export(
    adapter: AdapterFolder,
    to: Annotated[str, typer.Option(help=_FORMS, show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help=f"A new folder; {_FILES}", show_default=False)],
    base: Base = None,
    json_file: JsonFile = None,
) -> None:
    """Write an adapter in the form that another engine takes (vLLM, SGLang, llama.cpp, ...). Lossless.

    Example: s2ft export runs/quickstart/adapter --to vllm --output runs/for-vllm
    """
    check_writable(json_file)
    check_folder(adapter)
    from rich.console import Console
    from rich.progress import track

    with importing():
        from s2ft.exports.export import export as write

    console = Console()
    done = write(adapter, to, output, base, lambda modules: track(modules, "writing", transient=True, console=console))
    console.print(
        f"written: {done.output}\n{done.modules} modules, at most {done.most_channels} channels in one; "
        f"{done.exported_bytes / 1e6:.2f} MB, native {done.native_bytes / 1e6:.2f} MB",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    if done.max_lora_rank is not None:
        console.print(f"vLLM serves it with --enable-lora --max-lora-rank {done.max_lora_rank}", highlight=False)
    if json_file is not None:
        write_json(json_file, done.facts(), allow_nan=False)
