"""`s2ft reproduce`: a row of the S²FT paper's tables, from data to a score beside the paper's."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from s2ft.cli.codes import INTERRUPTED
from s2ft.cli.eval import progress
from s2ft.cli.tables import show
from s2ft.common.errors import raise_together
from s2ft.common.files import write_json
from s2ft.common.outputs import check_writable

WANTED = {
    "RECIPE": "`s2ft reproduce --list` shows them all",
    "--data": "name a folder laid out like LLM-Adapters, or MT-Bench's",
    "--output": "name a folder",
}
Json = Annotated[Path | None, typer.Option("--json", help="Write the result, or the list, here", show_default=False)]


def reproduce(
    recipe: Annotated[
        str | None, typer.Argument(help="SUITE/MODEL/METHOD, such as arithmetic/llama2-7b/s2ft", show_default=False)
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="Folder laid out like LLM-Adapters; MT-Bench's for instruction", show_default=False),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder for adapter, answers and result; goes on there", show_default=False)
    ] = None,
    listed: Annotated[bool, typer.Option("--list", help="Show the recipes, and what each needs")] = False,
    training_data: Annotated[
        str | None, typer.Option(help="A file or Hub name, instead of the recipe's", show_default=False)
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Folder or Hub name, instead of the recipe's base", show_default=False)
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Examples that a GPU takes at once; a step has 64 in all")] = 4,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, more time")
    ] = False,
    limit: Annotated[int | None, typer.Option(help="Train on the first so many examples", show_default=False)] = None,
    max_steps: Annotated[int | None, typer.Option(help="Train so many steps at most", show_default=False)] = None,
    eval_limit: Annotated[
        int | None, typer.Option(help="Ask the first so many questions of each task", show_default=False)
    ] = None,
    eval_batch_size: Annotated[int, typer.Option(help="Prompts that go through the model at once")] = 8,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Of an answer, instead of the suite's", show_default=False)
    ] = None,
    engine: Annotated[str, typer.Option(help="What writes the answers: transformers, or vllm")] = "transformers",
    judge_url: Annotated[
        str | None, typer.Option(help="Judge of MT-Bench [default: $S2FT_JUDGE_URL]", show_default=False)
    ] = None,
    judge_model: Annotated[
        str | None,
        typer.Option(help="Its model [default: $S2FT_JUDGE_MODEL]; its key is $S2FT_JUDGE_KEY", show_default=False),
    ] = None,
    json_file: Json = None,
) -> int:
    """Train and evaluate as a row of the paper's tables says, and put the result beside the paper's figure.

    Example: s2ft reproduce arithmetic/llama2-7b/s2ft --data llm-adapters --output runs/arithmetic
    """
    check_writable(json_file)
    if listed:
        _list(json_file)
        return 0
    named = {"RECIPE": recipe, "--data": data, "--output": output}
    raise_together(f"{name}: missing; {WANTED[name]}" for name, value in named.items() if value is None)
    from s2ft.cli.quiet import quiet
    from s2ft.evaluate.judge import find_judge
    from s2ft.lab.reproduce import run as work
    from s2ft.lab.reproduce.recipes import find_recipe

    assert recipe is not None
    assert data is not None
    assert output is not None
    judged = find_recipe(recipe).suite == "instruction"
    options = work.ReproduceOptions(
        recipe=recipe,
        data=data,
        output=output,
        training_data=training_data,
        model=model,
        batch_size=batch_size,
        gradient_checkpointing=gradient_checkpointing,
        limit=limit,
        max_steps=max_steps,
        eval_limit=eval_limit,
        eval_batch_size=eval_batch_size,
        max_new_tokens=max_new_tokens,
        engine=engine,
        judge=find_judge(judge_url, judge_model) if judged else None,
    )
    try:
        with quiet(), progress() as tell:
            found = work.reproduce(options, tell)
    except KeyboardInterrupt:
        found = None
    if found is None:
        return _interrupted()
    _report(found.result, output)
    if json_file is not None:
        write_json(json_file, found.result, ensure_ascii=False)
    return 0


def _interrupted() -> int:
    from s2ft.runtime.processes import leads

    if not leads():
        return 0  # the leading process evaluates
    typer.echo("interrupted; what is done is kept, and the same command goes on from there")
    return INTERRUPTED


def _list(json_file: Path | None) -> None:
    from rich.console import Console
    from rich.progress import Progress

    from s2ft.cli.quiet import quiet
    from s2ft.lab.reproduce.table import recipe_line, recipe_rows

    with quiet(), Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("computing memory", total=1.0)
        rows = recipe_rows(lambda done: bar.update(task, completed=done))
    show([recipe_line(row) for row in rows])
    if json_file is not None:
        write_json(json_file, rows, indent=1)


def _report(result: dict[str, Any], output: Path) -> None:
    from rich.console import Console

    console = Console(highlight=False, markup=False)
    show([result_line(result)])
    if result["deviations"]:
        smaller = ", ".join(f"{name}={value}" for name, value in result["deviations"].items())
        console.print(f"not the paper's run: {smaller}")
    if result["errors"]:
        console.print(f"{result['errors']} answers could not be had; the same command tries those again")
    console.print(f"result: {output}/reproduction.json", soft_wrap=True)


def result_line(result: dict[str, Any]) -> dict[str, str]:
    """The table's row: the paper's figure and ours."""
    score = result["score"]
    return {
        "recipe": result["recipe"],
        "paper": f"{result['paper']:g}",
        "here": "not rated" if score is None else f"{score:.2f}",
        "95%": "–" if result["low"] is None else f"{result['low']:.2f}–{result['high']:.2f}",
        "difference": "–" if score is None else f"{result['difference']:+.2f}",
    }
