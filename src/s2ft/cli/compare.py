"""`s2ft compare`: runs beside each other, those that are there or one for each method on the same data."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from s2ft.cli.importing import importing
from s2ft.cli.leaving import BAD_INPUT, INTERRUPTED
from s2ft.cli.options import model_options, parameter, with_options
from s2ft.cli.tables import show
from s2ft.common.errors import S2FTError
from s2ft.common.files import replaced_file, write_json
from s2ft.common.outputs import check_place, check_writable
from s2ft.finetune.options import TrainOptions, read_config
from s2ft.runtime.lookup import check_hub

HELP = """Compare runs of `s2ft train`: a table, and a page with pictures of quality against parameters, time and memory.

Example: `s2ft compare math-s2ft math-lora --html comparison.html`

With --methods, one run for each is trained first, with every option of `s2ft train` that its method takes; --budget finds the
size of each:

`s2ft compare --methods s2ft,lora,dora,peft:miss --budget 0.01 --model Qwen/Qwen3-0.6B --data math.json --output methods`
"""


def command(
    runs: list[Path] | None,
    methods: str | None,
    config: str | None,
    html: Path | None,
    json_file: Path | None,
    **values: Any,
) -> int:
    """Runs `s2ft compare`; the signature that typer reads is made below."""
    check_writable(html, "html", suffix=".html")
    check_writable(json_file)
    typed = {name: value for name, value in values.items() if value not in (None, [])}
    options = {**(read_config(config) if config else {}), **typed}
    if methods is None:
        return _compare(_given(runs or [], options), html, json_file)
    if runs:
        raise S2FTError(f"methods={methods!r} trains runs of its own; compare them with {str(runs[0])!r} afterwards")
    return _train([name.strip() for name in methods.split(",") if name.strip()], options, html, json_file)


def _given(runs: list[Path], options: dict[str, Any]) -> list[Path]:
    if options:
        raise S2FTError(f"{next(iter(options))}: without methods, runs are compared as they are, and take no options")
    if len(runs) < 2:
        raise S2FTError("runs: name at least two folders, or methods to train")
    return runs


def _train(methods: list[str], values: dict[str, Any], html: Path | None, json_file: Path | None) -> int:
    """Trains what is not trained yet, then compares; what fails is said by its own run, and left out."""
    with importing():
        from s2ft.cli.progress import quiet
        from s2ft.finetune.contest import plan, run, standing

    check_place(values.get("output", "."))
    check_hub(str(values.get("model", ".")))
    with quiet():
        planned = plan(methods, values)
        found = [standing(options) for options in planned]  # before hours of training: may each lie where it is to lie?
    failed = []
    for options, so_far in zip(planned, found, strict=True):
        typer.echo(f"{options.method}: {options.output}", err=True)
        code = run(options, so_far)
        if code == INTERRUPTED:
            typer.echo("the same command goes on from here")
            return INTERRUPTED
        failed += [options.method] if code else []
    done = [Path(options.output) for options in planned if options.method not in failed]
    if failed:
        typer.echo(f"not trained, as said above: {', '.join(failed)}", err=True)
    if done:
        _compare(done, html or done[0].parent / "comparison.html", json_file)
    return BAD_INPUT if failed else 0


def _compare(runs: Sequence[Path], html: Path | None, json_file: Path | None) -> int:
    from s2ft.report.runs import differences, read_runs, rows, runs_page, shown

    cards = read_runs(runs)
    found = rows(cards)
    show([shown(row) for row in found], wraps_first=True)
    for difference in differences(cards):
        typer.echo(f"not alike: {difference}")
    if html is not None:
        with replaced_file(html) as aside:
            aside.write_text(runs_page(cards), encoding="utf-8")
        typer.echo(f"page: {html}")
    if json_file is not None:
        write_json(json_file, found)
    return 0


_RUNS = Annotated[list[Path] | None, typer.Argument(help="Folders of runs", show_default=False)]
with_options(
    command,
    [
        inspect.Parameter("runs", inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None, annotation=_RUNS),
        parameter("methods", str | None, "Train a run by each of these methods of s2ft train, joined by commas"),
        *model_options(TrainOptions, without=("method", "resume"), required="required with methods"),
        parameter("config", str | None, "YAML file whose keys are these options; flags win over it", metavar="FILE"),
        parameter("html", Path | None, "Write the page here; with methods, to comparison.html in output unless given"),
        parameter("json_file", Path | None, "Write the rows here", None, "--json"),
    ],
)
