"""`s2ft plan`: what of a run fits on which devices, before anything is loaded."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from s2ft.cli.importing import importing
from s2ft.cli.options import model_options, parameter, with_options
from s2ft.cli.tables import show
from s2ft.common.errors import S2FTError
from s2ft.common.files import write_json
from s2ft.common.outputs import check_writable
from s2ft.finetune.machines import PlanOptions
from s2ft.runtime.lookup import check_hub

if TYPE_CHECKING:
    from s2ft.finetune.fit import Fit

HELP = """Compute, from a model's configuration, the memory that training takes on each device: what fits, and its command.

Example: `s2ft plan --model meta-llama/Llama-3.1-70B --gpus 8x80G`
"""
CONFIGS = "examples/distributed"
_PARTS = ("weights", "deltas", "gradients", "optimizer", "activations", "head")


def command(json_file: Path | None, **values: Any) -> None:
    """Runs `s2ft plan`; the signature that typer reads is made below."""
    check_writable(json_file)
    options = PlanOptions.parse({name: value for name, value in values.items() if value is not None})
    check_hub(options.model)
    with importing():
        import torch

        from s2ft.cli.progress import quiet
        from s2ft.finetune.fit import RESERVED, best, fits, measure
        from s2ft.runtime.models import empty_model

    with quiet():
        sizes = measure(empty_model(options.model, torch.bfloat16), options.config(), options.max_length)
    found = list(fits(sizes, options.machine, options.max_length, options.batch_size))
    title = f"GB on each of {options.gpus}, rows of {options.max_length:,} tokens"
    show([_line(one, fitting) for one, fitting in found], title)
    typer.echo(f"total: with {RESERVED / 1e9:g} GB set aside for libraries, communication and temporaries")
    taken = best(found)
    rows = [{**one.card, "fits": fitting} for one, fitting in found]
    if json_file is not None:
        chosen = None if taken is None else {"engine": taken.engine, "command": _command(taken, options)}
        write_json(json_file, {"settings": options.model_dump(), "sizes": vars(sizes), "rows": rows, "chosen": chosen})
    if taken is None:
        least = min((one for one, _ in found), key=lambda one: one.total)
        raise S2FTError(
            f"gpus={options.gpus!r} is too small: the least is {least.total / 1e9:.1f} GB on each device ({least.name}"
            f"{', checkpointing' if least.checkpointing else ''}, batch {least.batch_size}). Take more or larger devices, or "
            "a smaller max_length, budget or batch_size"
        )
    typer.echo(f"\n{taken.name}, batch {taken.batch_size} on each device:\n  {_command(taken, options)}")
    if options.machine.devices > 1 and not Path(CONFIGS).is_dir():
        typer.echo(f"Its config file comes with the source of s2ft, in {CONFIGS}, not with the installed package.")


def _line(one: Fit, fitting: bool) -> dict[str, Any]:
    parts = {name: f"{getattr(one, name) / 1e9:.1f}" for name in _PARTS}
    return {
        "engine": one.name + (f", {one.quantised}" if one.quantised else ""),
        "checkpointing": "yes" if one.checkpointing else "no",
        "batch": one.batch_size,
        **parts,
        "total": f"{one.total / 1e9:.1f}",
        "fits": "yes" if fitting else "no",
    }


def _command(one: Fit, options: PlanOptions) -> str:
    """What to run; data and output are the user's."""
    devices = options.machine.devices
    launcher = f"accelerate launch --config_file {CONFIGS}/{one.engine}.yaml --num_processes {devices} -m s2ft.cli.app"
    words = ["s2ft"] if devices == 1 else launcher.split()
    words += ["train", "--model", options.model, "--data", "DATA", "--output", "OUTPUT"]
    if isinstance(options.ratios, dict):
        words += ["--ratios", ",".join(f"{name}={ratio:g}" for name, ratio in options.ratios.items())]
    elif options.ratios is not None:
        words += ["--ratios", f"{options.ratios:g}"]
    words += ["--budget", f"{options.budget:g}"] if options.budget is not None else []
    words += ["--max-length", str(options.max_length), "--batch-size", str(one.batch_size)]
    words += ["--gradient-checkpointing"] if one.checkpointing else []
    words += ["--quantize", one.quantised] if one.quantised else []
    return shlex.join(words)


with_options(
    command,
    [
        *model_options(PlanOptions),
        parameter("json_file", Path | None, "Write the plan here", None, "--json"),
    ],
    returns=None,
)
