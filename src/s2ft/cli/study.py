"""`s2ft study`: the paper's claims, asked of the embedded model. Runs are kept, so that an interrupted study goes on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from s2ft.cli.bench import show
from s2ft.common.files import replaced_file, sole_writer, write_json
from s2ft.common.outputs import check_place, check_writable

app = typer.Typer(help="Ask the paper's claims of the embedded model, with several seeds.", no_args_is_help=True)

Seeds = Annotated[int, typer.Option(min=1, help="Runs of each setting; an interval needs two")]
Kept = Annotated[Path | None, typer.Option("--runs", help="Folder that keeps the runs", show_default="runs/study-NAME")]
Json = Annotated[Path | None, typer.Option("--json", help="Write rows and summary here", show_default=False)]
Png = Annotated[Path | None, typer.Option("--png", help="Draw the means and intervals here", show_default=False)]


@app.command()
def selection(seeds: Seeds = 5, runs: Kept = None, json_file: Json = None, png: Png = None) -> None:
    """Compare the ways to choose channels, and no fine-tuning, at one budget.

    Example: s2ft study selection --seeds 5 --json selection.json --png selection.png
    """

    def study(folder: Path, tell: Callable[[float], None]) -> Any:
        from s2ft.lab.study.selection import SelectionSettings, study_selection

        return study_selection(folder, SelectionSettings(seeds=seeds), tell)

    _run("selection", study, runs, json_file, png)


@app.command()
def generalization(seeds: Seeds = 5, runs: Kept = None, json_file: Json = None, png: Png = None) -> None:
    """Compare full tuning, LoRA, DoRA, SHiRA and S²FT: what is learned, what carries over, what is forgotten.

    Example: s2ft study generalization --seeds 5 --json generalization.json --png generalization.png
    """

    def study(folder: Path, tell: Callable[[float], None]) -> Any:
        from s2ft.lab.study.generalization import GeneralizationSettings, study_generalization

        return study_generalization(folder, GeneralizationSettings(seeds=seeds), tell)

    _run("generalization", study, runs, json_file, png)


@app.command()
def fusion(seeds: Seeds = 5, runs: Kept = None, json_file: Json = None, png: Png = None) -> None:
    """Add up adapters of two skills: LoRA, and S²FT on the same and on disjoint channels.

    Example: s2ft study fusion --seeds 5 --json fusion.json --png fusion.png
    """

    def study(folder: Path, tell: Callable[[float], None]) -> Any:
        from s2ft.lab.study.fusion import FusionSettings, study_fusion

        return study_fusion(folder, FusionSettings(seeds=seeds), tell)

    _run("fusion", study, runs, json_file, png)


@app.command()
def commonsense(
    data: Annotated[str, typer.Option(help="Folder with dataset/NAME/train.json and test.json", show_default=False)],
    seeds: Seeds = 5,
    runs: Kept = None,
    json_file: Json = None,
    png: Png = None,
) -> None:
    """Train on real text, four commonsense tasks of LLM-Adapters, and ask these and two others.

    Example: s2ft study commonsense --data llm-adapters --json commonsense.json --png commonsense.png
    """

    def study(folder: Path, tell: Callable[[float], None]) -> Any:
        from s2ft.lab.study.commonsense import CommonsenseSettings, study_commonsense

        return study_commonsense(folder, data, CommonsenseSettings(seeds=seeds), tell)

    _run("commonsense", study, runs, json_file, png)


def _run(name: str, study: Callable[..., Any], folder: Path | None, json_file: Path | None, png: Path | None) -> None:
    folder = folder or Path("runs", f"study-{name}")
    check_writable(json_file)
    check_writable(png, "png", ".png")
    check_place(folder, "runs")
    import transformers
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from s2ft.cli.quiet import quiet
    from s2ft.lab.study.report import draw

    transformers.logging.disable_progress_bar()  # a bar for each base that is loaded would tear ours
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:.0f}%"),
        TimeRemainingColumn(),
    )
    with (
        sole_writer(folder),
        quiet(),
        Progress(*columns, console=Console(stderr=True), speed_estimate_period=600) as bar,
    ):
        task = bar.add_task(f"runs, kept in {folder}", total=1.0)
        report = study(folder, lambda done: bar.update(task, completed=done))
    show(report.table(), Console())
    if json_file is not None:
        write_json(json_file, report.as_dict(), indent=1, ensure_ascii=False)
    if png is not None:
        with replaced_file(png) as aside:
            draw(report, aside)
