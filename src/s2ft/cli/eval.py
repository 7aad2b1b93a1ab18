"""`s2ft eval`: how well a model and its adapters do on tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from s2ft.cli.importing import importing
from s2ft.cli.leaving import INTERRUPTED
from s2ft.cli.options import model_options, parameter, with_options
from s2ft.cli.tables import show
from s2ft.common.errors import S2FTError
from s2ft.common.files import write_json
from s2ft.common.outputs import check_writable
from s2ft.evaluate.options import EvalOptions, HarnessOptions

HARNESS = "lm-eval"
HELP = """Evaluate a base model, or adapters on it; every answer is kept, and the same command goes on after an interruption.

Example: s2ft eval --model Qwen/Qwen3-0.6B --adapter math-adapter --suite arithmetic --data llm-adapters --output scores
"""


def evaluate(harness: str | None, json_file: Path | None, **values: Any) -> int:
    """Runs `s2ft eval`; the signature that typer reads is made below."""
    check_writable(json_file)
    typed = {name: value for name, value in values.items() if value not in (None, [])}
    return _by_tasks(typed, json_file) if harness is None else _by_harness(harness, typed, json_file)


with_options(
    evaluate,
    [
        *model_options(EvalOptions),
        parameter("harness", str | None, "lm-eval: its tasks by its own prompts and scoring; name them by --task"),
        parameter("json_file", Path | None, "Write the rows here", None, "--json"),
    ],
)


def _by_tasks(values: dict[str, Any], json_file: Path | None) -> int:
    options = EvalOptions.parse(values)
    with importing():
        from s2ft.cli.progress import bars, quiet
        from s2ft.evaluate import run

    try:
        with quiet(), bars() as tell:
            found = run.evaluate(options, tell)
    except KeyboardInterrupt:
        typer.echo("interrupted; the answers so far are kept: the same command continues from there")
        return INTERRUPTED
    _show(found, options)
    if json_file is not None:
        write_json(json_file, found.as_dict(), ensure_ascii=False)
    return 0


def _by_harness(harness: str, values: dict[str, Any], json_file: Path | None) -> int:
    if {"output", "suite"} & values.keys():
        raise S2FTError(
            "harness: lm-eval takes its tasks by --task and keeps no answers; leave out --suite and --output"
        )
    if harness != HARNESS:
        raise S2FTError(f"harness={harness!r} is unknown; there is {HARNESS}")
    options = HarnessOptions.parse(values)
    with importing():
        from s2ft.cli.progress import quiet
        from s2ft.evaluate.harness import run_harness

    with quiet():
        report = run_harness(options)
    show(report["rows"], "lm-evaluation-harness", wraps_first=True)
    if json_file is not None:
        write_json(json_file, report, ensure_ascii=False)
    return 0


def _show(report: Any, options: EvalOptions) -> None:
    from rich.console import Console

    show([_accuracy(row) for row in report.rows], "Accuracy", wraps_first=True)
    show([_mean(row) for row in report.means], "Mean of the tasks", wraps_first=True)
    show([_rating(row) for row in report.ratings], "MT-Bench, 1 to 10", wraps_first=True)
    console = Console(highlight=False, markup=False)
    console.print(f"answers: {options.output}", soft_wrap=True)
    if report.errors:
        console.print(f"{report.errors} answers or ratings failed; the same command tries only those again")
    if report.ratings and report.settings["judge"] is None:
        console.print(
            "not rated yet: run the same command with S2FT_JUDGE_URL, S2FT_JUDGE_MODEL and S2FT_JUDGE_KEY set"
        )


def _accuracy(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "model": row["model"],
        "task": row["task"],
        "right": f"{row['correct']} of {row['answered']}",
        "accuracy": _share(row["accuracy"]),
        "95%": f"{100 * row['low']:.1f}–{row['high']:.1%}" if row["answered"] else None,
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
