"""`s2ft bench`: how long things take, beside their floor."""

from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from s2ft.cli.tables import print_table
from s2ft.common.files import replaced_file, write_json
from s2ft.common.outputs import check_writable

app = typer.Typer(help="Measure, beside the floor of what is measured.", no_args_is_help=True)

JsonFile = Annotated[Path | None, typer.Option("--json", help="Write the rows here", show_default=False)]
PngFile = Annotated[Path | None, typer.Option("--png", help="Draw the result here", show_default=False)]
Row = dict[str, Any]


@app.command()
def selection(json_file: JsonFile = None) -> None:
    """Time the choice of channels at the shape of LLaMA2-7B.

    Example: s2ft bench selection --json selection.json
    """
    check_writable(json_file)
    from s2ft.lab.bench.selection import bench_selection

    _measure(lambda tell: bench_selection(), dict, json_file)


class TrainingPreset(StrEnum):
    """Which machine `bench training` is for."""

    cpu = "cpu"
    llama = "7b"


@app.command()
def training(
    preset: Annotated[
        TrainingPreset, typer.Option(help="cpu: a small Llama; 7b: LLaMA2-7B and LLaMA3-8B, on a GPU")
    ] = (TrainingPreset.cpu),
    liger: Annotated[bool, typer.Option("--liger", help="Give every method Liger's kernels (GPU)")] = False,
    json_file: JsonFile = None,
    png: PngFile = None,
) -> None:
    """Time a training step of S²FT and other methods, beside the frozen model, and count what they keep for backward.

    Example: s2ft bench training --preset cpu --json training.json --png training.png
    """
    _check(json_file, png)
    from s2ft.lab.bench.training import PRESETS, bench_training
    from s2ft.lab.bench.training_plot import draw_training

    chosen = PRESETS[preset.value]
    report = _measure(
        lambda tell: bench_training(chosen, liger, tell=tell), training_line, json_file, draw_training, png
    )
    for method, reason in report.settings["left_out"].items():
        typer.echo(f"{method} is left out: {reason}")


def training_line(row: Row) -> dict[str, str]:
    """A row of the table, in units for people."""

    def shown(key: str, form: str, scale: float = 1) -> str:
        return "–" if row[key] is None else format(row[key] / scale, form)

    spread = f"{shown('step_ms_p20', '.0f')}–{shown('step_ms_p80', '.0f')}"
    return {
        "method": " ".join(filter(None, (row["method"], row.get("variant")))),
        "batch": f"{row['batch_size']} × {row['seq_len']}",
        "trainable": shown("trainable", ",.0f"),
        "ms": "no memory" if row.get("out_of_memory") else f"{row['step_ms']:.0f} ({spread})",
        "/ floor": shown("floor_ratio", ".3f"),
        "saved MB": shown("saved_bytes", ".1f", 1e6),
        "peak GB": shown("peak_bytes", ".1f", 1e9),
    }


@app.command()
def switch(json_file: JsonFile = None, png: PngFile = None) -> None:
    """Time how long a weight of dimension 1k to 32k takes to take an adapter in: S²FT, LoRA, and one copy of the slice.

    Example: s2ft bench switch --json switch.json --png switch.png
    """
    _check(json_file, png)
    from s2ft.lab.bench.switch import bench_switch, draw_switch, switch_line

    _measure(lambda tell: bench_switch(tell=tell), switch_line, json_file, draw_switch, png)


@app.command()
def parallel(json_file: JsonFile = None, png: PngFile = None) -> None:
    """Time a batch of 1 to 1,000 adapters, a row each: S²FT, LoRA with equal parameters, and PEFT's mixed batch.

    Example: s2ft bench parallel --json parallel.json --png parallel.png
    """
    _check(json_file, png)
    from s2ft.lab.bench.parallel import bench_parallel, draw_parallel, parallel_line

    _measure(lambda tell: bench_parallel(tell=tell), parallel_line, json_file, draw_parallel, png)


@app.command()
def fusion(json_file: JsonFile = None) -> None:
    """Time the fusion of two adapters at LLaMA3-8B's shape, on files, beside writing as many bytes.

    Example: s2ft bench fusion --json fusion.json
    """
    check_writable(json_file)
    from s2ft.lab.bench.fusion import bench_fusion

    _measure(lambda tell: bench_fusion(tell=tell), dict, json_file)


@app.command()
def evaluation(
    data: Annotated[
        str | None,
        typer.Option(help="Folder with dataset/gsm8k/test.json [default: made from a seed]", show_default=False),
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Time the answers to 200 GSM8K questions by `s2ft eval`'s engine, beside transformers' `generate`, with the embedded base.

    Example: s2ft bench evaluation --data llm-adapters --json evaluation.json
    """
    check_writable(json_file)
    from s2ft.demo import base_path
    from s2ft.lab.bench.evaluation import bench_evaluation, evaluation_line

    _measure(lambda tell: bench_evaluation(str(base_path()), data, tell=tell), evaluation_line, json_file)


def _check(json_file: Path | None, png: Path | None) -> None:
    check_writable(json_file)
    check_writable(png, "png", ".png")


def _measure(
    bench: Callable[[Callable[[float], None]], Any],  # is given what to tell its progress to
    line: Callable[[Row], dict[str, Any]],
    json_file: Path | None,
    draw: Callable[[list[Row], Path], None] | None = None,
    png: Path | None = None,
) -> Any:
    """Runs a benchmark under a progress bar; prints, writes and draws its rows; returns its report."""
    from rich.console import Console
    from rich.progress import Progress

    from s2ft.cli.quiet import quiet

    with quiet(), Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("measuring", total=1.0)
        report = bench(lambda done: bar.update(task, completed=done))
    for heading, rows in _by_model(report.rows).items():
        show([line(row) for row in rows], Console(), heading)
    if json_file is not None:
        write_json(json_file, report.as_dict())
    if draw is not None and png is not None:
        with replaced_file(png) as aside:
            draw(report.rows, aside)
    return report


def _by_model(rows: list[Row]) -> dict[str | None, list[Row]]:
    groups: dict[str | None, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.get("model"), []).append(row)
    return groups


def show(rows: list[Row], console: Any, title: str | None = None) -> None:
    """Rows with the same keys, as a table; the first column, which names the row, is shown whole."""
    from rich.table import Table

    table = Table(*rows[0], title=title)
    table.columns[0].min_width = max(len(str(next(iter(row.values())))) for row in rows)
    for row in rows:
        table.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()))
    print_table(table, console)
