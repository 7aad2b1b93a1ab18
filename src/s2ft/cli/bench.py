"""`s2ft bench`: how long things take, beside a rival and a lower bound. A command for each row of `BENCHMARKS`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import typer

from s2ft.cli.importing import importing
from s2ft.cli.options import entry_options, with_options
from s2ft.cli.tables import show
from s2ft.common.files import replaced_file, write_json
from s2ft.common.outputs import check_writable
from s2ft.lab.registry import BENCHMARKS, Entry

app = typer.Typer(help="Measure, beside a lower bound of what is measured.", no_args_is_help=True)


def _add(name: str, entry: Entry) -> None:
    command = with_options(partial(_bench, name), entry_options(entry), returns=None)
    app.command(name, help=entry.described("bench", name))(command)


def _bench(name: str, json_file: Path | None, png: Path | None = None, **options: Any) -> None:
    """Runs a benchmark under a progress bar; prints, writes and draws its rows."""
    check_writable(json_file)
    check_writable(png, "png", ".png")
    with importing():
        from s2ft.cli.progress import bar, quiet

        module = import_module(f"s2ft.lab.bench.{name}")
    with quiet(), bar("measuring") as tell:
        report = getattr(module, f"bench_{name}")(tell=tell, **options)
    _print(report.rows, getattr(module, f"{name}_line", dict))
    for what, reason in report.settings.get("left_out", {}).items():
        typer.echo(f"{what} is left out: {reason}")
    if json_file is not None:
        write_json(json_file, report.as_dict())
    if png is not None:
        with replaced_file(png) as aside:
            getattr(module, f"draw_{name}")(report.rows, aside)


def _print(rows: list[dict[str, Any]], line: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """A table for each model that was measured; one for all where rows name none."""
    for model in dict.fromkeys(row.get("model") for row in rows):
        show([line(row) for row in rows if row.get("model") == model], title=model)


for _name, _entry in BENCHMARKS.items():
    _add(_name, _entry)
