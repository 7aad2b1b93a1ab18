"""Whether a run can start: its inputs, its output, and what several processes support; checked before torch is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from s2ft.common.errors import S2FTError, gathered, raise_together
from s2ft.common.outputs import check_place
from s2ft.finetune.hub import check_push
from s2ft.finetune.inputs import input_problems
from s2ft.finetune.methods import find_method
from s2ft.finetune.options import TrainOptions
from s2ft.finetune.trackers import check_trackers
from s2ft.finetune.values import AUTO_RATE
from s2ft.format.terms import PURE
from s2ft.runtime.processes import ZERO, accelerate_uses, engine, is_divided, is_managed, process_count
from s2ft.runtime.quantisation import check_optimizer, check_quantisation, own_quantisation

UNKNOWN = {  # accelerate's name → what it does
    "MEGATRON_LM": "Megatron-LM keeps parts of layers, or some layers, in each process",
    "PARALLELISM_CONFIG": "a parallelism config (tensor, context, sequence) splits layers or sequences over processes",
}


def check_run(options: TrainOptions) -> None:
    """Raises `S2FTError` with all that is wrong as far as can be said without loading anything."""
    problems = gathered(
        find_method(options.method).check,
        partial(check_processes, options),
        partial(check_base, options),
        partial(check_optimizer, options.optim),
        partial(check_place, options.output),
        partial(check_push, options.push_to_hub),
        partial(check_trackers, options.report_to or []),
    )
    problems += input_problems(options.model_dump())
    if problems and (options.resume or Path(options.output).exists()):
        from s2ft.finetune.resume import check_output  # asked in any case, once no other run writes there

        problems += gathered(partial(check_output, options))
    raise_together(problems)


def check_base(options: TrainOptions) -> None:
    """Raises `S2FTError` for a quantisation that cannot be run here, or that the method would have to train."""
    how = options.quantize or own_quantisation(options.model)
    if how is not None and find_method(options.method).leaves_model:
        raise S2FTError(
            f"method={options.method!r} trains the weights, which are quantised ({how}); take s2ft, or lora (QLoRA)"
        )
    if how is not None and is_divided():
        raise S2FTError(
            f"the base is quantised ({how}), and {engine()} divides its weights; launch with DDP, ZeRO-1 or ZeRO-2"
        )
    check_quantisation(options.quantize, options.model)


def check_processes(options: TrainOptions) -> None:
    """Raises `S2FTError` for engines that are not known or not there, and for options that do not go with several processes."""
    count = process_count()
    raise_together(
        f"{why}; s2ft train knows DDP, FSDP2 and DeepSpeed ZeRO: launch with one of examples/distributed"
        for name, why in UNKNOWN.items()
        if accelerate_uses(name)
    )
    raise_together(_engine_problems(options) if is_managed() else ())
    if count > 1 and options.evaluate is not None:
        raise S2FTError(
            f"evaluate={options.evaluate!r} needs one process, here are {count}; use `s2ft eval` afterwards"
        )
    if count > 1 and options.precision == PURE:
        raise S2FTError(
            f"precision={PURE!r} rounds by chance, so the weights of {count} processes would part; take auto, bf16 or fp32"
        )


def _engine_problems(options: TrainOptions) -> Iterator[str]:
    """What FSDP and DeepSpeed need, and what does not go with them."""
    name = engine()
    if name.startswith("fsdp1"):
        yield "FSDP's first version puts trained and frozen weights into one flat parameter: set fsdp_version: 2"
    if name.startswith("zero") and name not in ZERO:
        yield f"DeepSpeed's zero_stage={name.removeprefix('zero')} divides nothing; take 1, 2 or 3, or launch with --multi_gpu"
    if name in ZERO and find_spec("deepspeed") is None:
        yield "the launcher asks for DeepSpeed, which is not installed: pip install deepspeed"
    if find_method(options.method).leaves_model:
        yield f"method={options.method!r} trains the model's own weights, which s2ft train does not gather from {name}"
    if options.precision == PURE:
        yield f"precision={PURE!r} does not go with {name}, which keeps its own copies of what it trains"
    if options.learning_rate == AUTO_RATE:
        yield f"learning_rate={AUTO_RATE!r} trains several times, and {name} divides a model once; give a rate"
    if is_divided():
        yield from _division_problems(options, name)


def _division_problems(options: TrainOptions, name: str) -> Iterator[str]:
    """What needs whole weights."""
    given = {
        "layout": options.layout == "in-place",
        "samples": options.samples,
        "objective": options.objective != "sft",
        "quantize": options.quantize is not None,
    }
    for option in (option for option, is_given in given.items() if is_given):
        value, default = getattr(options, option), TrainOptions.model_fields[option].default
        yield f"{option}={value!r} needs whole weights, and {name} leaves each process a part; take {default!r}"
