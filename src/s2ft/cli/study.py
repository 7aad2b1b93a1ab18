"""`s2ft study`: the paper's claims, tested on the embedded model and on a real one. A command for each row of `STUDIES`.

Runs are kept, so that an interrupted study goes on.
"""

from __future__ import annotations

from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import typer

from s2ft.cli.importing import importing
from s2ft.cli.options import entry_options, parameter, with_options
from s2ft.cli.tables import show
from s2ft.common.errors import S2FTError
from s2ft.common.files import replaced_file, sole_writer, write_json
from s2ft.common.outputs import check_place, check_writable
from s2ft.lab.registry import STUDIES, Entry

app = typer.Typer(
    help="Test the paper's claims on the embedded model and a real one, with several seeds.", no_args_is_help=True
)


def _add(name: str, entry: Entry) -> None:
    own = [
        parameter("seeds", int, "Runs of each setting; an interval needs two", 5, min=1),
        parameter("runs", Path | None, "Folder that keeps the runs", show_default=f"runs/study-{name}"),
    ]
    command = with_options(partial(_study, name), [*own, *entry_options(entry)], returns=None)
    app.command(name, help=entry.described("study", name))(command)


def _study(name: str, seeds: int, runs: Path | None, json_file: Path | None, png: Path | None, **options: Any) -> None:
    folder = runs or Path("runs", f"study-{name}")
    check_writable(json_file)
    check_writable(png, "png", ".png")
    check_place(folder, "runs")
    from s2ft.lab.study.bars import draw

    report = _run(name, folder, seeds, options)
    if not report.rows:
        raise S2FTError(f"runs={str(folder)!r} holds no run of this model and data to report, so nothing is written")
    show(report.table())
    if json_file is not None:
        write_json(json_file, report.as_dict(), indent=1, ensure_ascii=False)
    if png is not None:
        with replaced_file(png) as aside:
            draw(report, aside)


def _run(name: str, folder: Path, seeds: int, options: dict[str, Any]) -> Any:
    """Runs the study under a progress bar; its folder is locked meanwhile."""
    import transformers
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from s2ft.cli.progress import quiet

    transformers.logging.disable_progress_bar()  # a bar for each base that is loaded would tear ours
    with importing():
        module = import_module(f"s2ft.lab.study.{name}")
    settings = getattr(module, f"{name.capitalize()}Settings")(seeds=seeds)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f}%"))
    console = Console(stderr=True)
    with (
        sole_writer(folder),
        quiet(),
        Progress(*columns, TimeRemainingColumn(), console=console, speed_estimate_period=600) as bar,
    ):
        task = bar.add_task(f"runs, kept in {folder}", total=1.0)
        study = getattr(module, f"study_{name}")
        return study(folder, settings, lambda done: bar.update(task, completed=done), **options)


for _name, _entry in STUDIES.items():
    _add(_name, _entry)
