"""`s2ft train`: one flag for each field of `TrainOptions`, made from the fields themselves.

Values reach `parse_options` as the text that was typed, so that all that is wrong with them is said at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from s2ft.cli.importing import importing
from s2ft.cli.leaving import INTERRUPTED
from s2ft.cli.options import model_options, parameter, with_options
from s2ft.common.files import write_json
from s2ft.common.outputs import check_writable
from s2ft.finetune.launch import check_run
from s2ft.finetune.options import TrainOptions, parse_options, read_config
from s2ft.runtime.lookup import check_hub

HELP = """Fine-tune a model and write a small adapter, with a run card beside it; or compare, by --method, with other methods.

Example: `s2ft train --model Qwen/Qwen3-0.6B --data math.json --output math-adapter --ratios o_proj=0.05,down_proj=0.02`

Ctrl-C finishes the step and saves a checkpoint; `--resume` goes on from it, to the same weights as without the pause.
"""


def command(**values: Any) -> int:
    """Runs `s2ft train`; the signature that typer reads is made below."""
    config, json_file = values.pop("config"), values.pop("json_file")
    typed = {name: value for name, value in values.items() if value not in (None, [])}
    options = parse_options({**(read_config(config) if config else {}), **typed})
    check_writable(json_file)
    check_run(options)  # also asked by `train`, for others; here it is said before torch is loaded
    check_hub(options.model)
    return _run(options, json_file)


def _run(options: TrainOptions, json_file: str | None) -> int:
    with importing():
        from s2ft.cli.progress import quiet
        from s2ft.finetune.results import command as command_line
        from s2ft.finetune.train import train
        from s2ft.runtime.processes import leads

    with quiet():
        result = train(options)
    if leads():
        _report(result.card, result.output, json_file)
    if result.interrupted and leads():
        steps = result.card["training"]["steps"]
        typer.echo(f"interrupted at step {steps}; go on with:\n  {command_line(options, resume=True)}")
    return INTERRUPTED if result.interrupted else 0


def _report(card: dict[str, Any], output: Path, json_file: str | None) -> None:
    from rich.console import Console
    from rich.table import Table

    if json_file is not None:
        write_json(Path(json_file), card, ensure_ascii=False)
    training = card["training"]
    kind = "adapter" if "adapter" in card else "model"
    loss = training["final_loss"]
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_row(kind, str(output))
    table.add_row("loss", "none logged" if loss is None else f"{card['loss_curve'][0][1]:.3f} → {loss:.3f}")
    for name, text in _measured(card):
        table.add_row(name, text)
    table.add_row("size", f"{card[kind]['bytes'] / 1e6:.2f} MB, {card[kind]['share']:.2%} of the model's parameters")
    table.add_row("speed", f"{training['tokens_per_second']:,.0f} tokens/s")
    table.add_row("time", f"{training['steps']} steps, {training['seconds']:.0f} s")
    table.add_row("precision", training["precision"])
    if "layout" in training:
        table.add_row("layout", training["layout"])
    table.add_row("run card", str(output / "run.md"))
    Console(markup=False).print(table)  # a path may hold brackets


def _measured(card: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What was asked for besides the training loss, and the memory."""
    from s2ft.evaluate.tally import percent

    training = card["training"]
    if "held_out" in training:
        best, step = training["best_loss"], training["best_step"]
        at = "not measured" if best is None else f"{best:.3f} at step {step}, whose weights were kept"
        yield "held-out loss", f"{at} ({training['held_out']} examples)"
    for task, score in card.get("scores", {}).items():
        yield task, f"{percent(score['base'])} → {percent(score['tuned'])} of {score['questions']} questions"
    if "peak_memory_bytes" in training:
        yield "memory", f"{training['peak_memory_bytes'] / 1e9:.2f} GB at most, of the {training['peak_memory_of']}"


with_options(
    command,
    [
        *model_options(TrainOptions),
        parameter("config", str | None, "YAML file whose keys are these options; flags win over it", metavar="FILE"),
        parameter("json_file", str | None, "Write the run card to this file too", None, "--json", metavar="FILE"),
    ],
)
