"""`s2ft config-schema`: what editors need to know of the file of `s2ft train --config`."""

from pathlib import Path
from typing import Annotated

import typer

from s2ft.common.files import write_json
from s2ft.common.outputs import check_writable


def config_schema(
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write it here instead of printing it", show_default=False)
    ] = None,
) -> None:
    """Print the JSON schema of the YAML file that `s2ft train --config` reads, for editors.

    Example: s2ft config-schema --output s2ft-train.json, and `# yaml-language-server: $schema=s2ft-train.json` in the file
    """
    check_writable(output, "output", suffix=".json")
    import json

    from s2ft.finetune.schema import config_schema as schema

    if output is None:
        typer.echo(json.dumps(schema(), indent=2, ensure_ascii=False))
    else:
        write_json(output, schema(), ensure_ascii=False)
