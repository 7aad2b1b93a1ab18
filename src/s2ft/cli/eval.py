"""`s2ft eval`: how well a model and its adapters do on tasks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from s2ft.cli.codes import INTERRUPTED
from s2ft.cli.tables import print_table
from s2ft.common.errors import S2FTError
from s2ft.common.files import write_json
from s2ft.common.outputs import check_writable

HARNESS = "lm-eval"


def evaluate(
    model: Annotated[str, typer.Option(help="Base model: a folder or a name on the Hub", show_default=False)],
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            help="Adapter: a folder or a Hub name; repeat to evaluate several, each by itself", show_default=False
        ),
    ] = None,
    suite: Annotated[
        list[str] | None,
        typer.Option(help="commonsense, arithmetic or instruction; may be repeated", show_default=False),
    ] = None,
    task: Annotated[list[str] | None, typer.Option(help="One task; may be repeated", show_default=False)] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Folder with dataset/NAME/test.json (MT-Bench: question.jsonl); or Hub name", show_default=False
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder for the answers; what it holds is not asked again", show_default=False)
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="The first so many questions of each task", show_default=False)
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Prompts that go through the model at once")] = 8,
    beams: Annotated[
        int | None, typer.Option(help="1 is greedy [default: 4; instruction: 1]", show_default=False)
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            help="Of an answer [default: commonsense 32, arithmetic 256, instruction 1024]", show_default=False
        ),
    ] = None,
    prompt: Annotated[
        str, typer.Option(help="alpaca, chat (the model's chat template), or auto: as the adapter was trained")
    ] = "auto",
    precision: Annotated[str, typer.Option(help="Of the weights: auto, bf16, fp32")] = "auto",
    engine: Annotated[str, typer.Option(help="transformers, or vllm where it is installed")] = "transformers",
    harness: Annotated[
        str | None,
        typer.Option(help="lm-eval: its tasks by its own prompts and scoring; name them by --task", show_default=False),
    ] = None,
    judge_url: Annotated[
        str | None,
        typer.Option(help="Judge of MT-Bench, such as https://host/v1 [default: $S2FT_JUDGE_URL]", show_default=False),
    ] = None,
    judge_model: Annotated[
        str | None,
        typer.Option(help="Its model [default: $S2FT_JUDGE_MODEL]; its key is $S2FT_JUDGE_KEY", show_default=False),
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the rows here", show_default=False)] = None,
) -> int:
    """Evaluate a base model, or adapters on it; every answer is kept, and the same command goes on after an interruption.

    Example: s2ft eval --model Qwen/Qwen3-0.6B --adapter math-adapter --suite arithmetic --data llm-adapters --output scores
    """
    check_writable(json_file)
    names = [*(suite or []), *(task or [])]
    if harness is not None:
        if output is not None or suite:
            raise S2FTError(
                "harness: lm-eval takes its tasks by --task and keeps no answers; leave out --suite and --output"
            )
        report = _by_harness(harness, model, names, adapter or [], data, limit, batch_size, precision)
        _write(report, json_file)
        return 0
    if data is None or output is None:
        lacking = " and ".join(flag for flag, value in (("--data", data), ("--output", output)) if value is None)
        raise S2FTError(f"{lacking}: missing; name a folder")
    from s2ft.cli.quiet import quiet
    from s2ft.evaluate import run as work
    from s2ft.evaluate.judge import find_judge

    judge = find_judge(judge_url, judge_model) if work.needs_judge(names) else None
    options = work.EvalOptions(
        model,
        names,
        data,
        output,
        adapter or [],
        limit,
        batch_size,
        beams,
        max_new_tokens,
        prompt,
        precision,
        engine,
        judge,
    )
    try:
        with quiet(), progress() as tell:
            found = work.evaluate(options, tell)
    except KeyboardInterrupt:
        typer.echo("interrupted; what was answered is kept, and the same command goes on from there")
        return INTERRUPTED
    _show(found, options)
    _write(found.as_dict(), json_file)
    return 0


def _by_harness(
    harness: str,
    model: str,
    tasks: list[str],
    adapters: list[str],
    data: str | None,
    limit: int | None,
    batch_size: int,
    precision: str,
) -> dict[str, Any]:
    if harness != HARNESS:
        raise S2FTError(f"harness={harness!r} is unknown; there is {HARNESS}")
    if not tasks:
        raise S2FTError("task: name at least one task of lm-eval")
    from s2ft.cli.quiet import quiet
    from s2ft.evaluate.harness import known_folder, run_harness

    with quiet():
        report = run_harness(model, tasks, adapters, known_folder(data), limit, batch_size, precision)
    _table("lm-evaluation-harness", report["rows"])
    return report


@contextmanager
def progress() -> Iterator[Any]:
    """A bar for each task of each model, with the time that is left."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    bars: dict[str, Any] = {}
    display = Progress(*columns, "left", TimeRemainingColumn(), console=Console(stderr=True), transient=True)

    def tell(title: str, done: int, total: int) -> None:
        display.start()  # not before: another bar may be there until then
        if title not in bars:
            bars[title] = display.add_task(title, total=total)
        display.update(bars[title], completed=done, total=total)

    try:
        yield tell
    finally:
        display.stop()


def _show(report: Any, options: Any) -> None:
    from rich.console import Console

    _table("Accuracy", [_accuracy(row) for row in report.rows])
    _table("Mean of the tasks", [_mean(row) for row in report.means])
    _table("MT-Bench, 1 to 10", [_rating(row) for row in report.ratings])
    console = Console(highlight=False, markup=False)
    console.print(f"answers: {options.output}", soft_wrap=True)
    if report.errors:
        console.print(f"{report.errors} could not be had (errors); the same command tries those again, and no others")
    if report.ratings and options.judge is None:
        console.print(
            "not rated yet: run the same command with S2FT_JUDGE_URL, S2FT_JUDGE_MODEL and S2FT_JUDGE_KEY set"
        )


def _accuracy(row: dict[str, Any]) -> dict[str, Any]:
    interval = f"{100 * row['low']:.1f}–{row['high']:.1%}" if row["answered"] else None
    return {
        "model": row["model"],
        "task": row["task"],
        "right": f"{row['correct']} of {row['answered']}",
        "accuracy": _share(row["accuracy"]),
        "95%": interval,
        "errors": row["errors"],
        "unread": row["unread"],
        "cut off": row["truncated"],
    }


def _mean(row: dict[str, Any]) -> dict[str, Any]:
    tasks = f"{row['tasks']} of {row['suite_tasks']}"
    return {"model": row["model"], "suite": row["suite"], "tasks": tasks, "accuracy": _share(row["accuracy"])}


def _rating(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "model": row["model"],
        "part": row["part"],
        "rated": f"{row['rated']} of {row['asked']}",
        "rating": None if row["rating"] is None else f"{row['rating']:.2f}",
        "95%": None if row["low"] is None else f"{row['low']:.2f}–{row['high']:.2f}",
        "errors": row["errors"],
        "cut off": row["truncated"],
    }


def _share(value: float | None) -> str | None:
    return None if value is None else f"{value:.1%}"


def _table(title: str, rows: list[dict[str, Any]]) -> None:
    """Rows with the same keys, as a table; nothing without rows."""
    from rich.table import Table
    from rich.text import Text

    if not rows:
        return
    table = Table(title=title)
    for name in rows[0]:
        table.add_column(name, no_wrap=name != "model")
    for row in rows:
        values = ("–" if value is None else value for value in row.values())
        table.add_row(*(Text(f"{value:.4g}" if isinstance(value, float) else str(value)) for value in values))
    print_table(table)


def _write(report: dict[str, Any], json_file: Path | None) -> None:
    if json_file is not None:
        write_json(json_file, report, ensure_ascii=False)
