"""`TrainOptions`: every option of a training run, once. Command line, YAML file and run card read them from here.

Defaults follow the paper's recipe (table 6): AdamW with betas 0.9 and 0.95, no weight decay, gradients clipped to 1, a linear
schedule after 100 steps of warm-up, 3 epochs, sequences up to 2,048 tokens, seed 0. Its 64 examples a step and its rates are
for large data sets: here `finetune/recipe.py` settles both for the run at hand, unless `recipe` is "paper".
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, Field, ValidationError

from s2ft.common.errors import S2FTError, raise_together
from s2ft.finetune.methods import METHODS, MethodOptions, S2FTOptions, find_method, foreign_options
from s2ft.finetune.objectives import OBJECTIVES, ObjectiveOptions, foreign_to_objective, objective_problems
from s2ft.finetune.peft_methods import PREFIX
from s2ft.finetune.trackers import NONE, TRACKERS, known_trackers
from s2ft.finetune.values import (
    AUTO_RATE,
    Columns,
    CommaNames,
    Name,
    Names,
    Options,
    Positive,
    PositiveFloat,
    Rate,
    Seed,
    Weights,
)
from s2ft.format.choice import choice_problems, order_problems
from s2ft.format.terms import PURE, QUANTISATIONS
from s2ft.format.unknown import hint

ADAM_BETAS = (0.9, 0.95)
LONGEST = 2048  # tokens, unless the model has fewer positions
WARMUP = 100  # steps, or a tenth of a shorter run
PAPER = "paper"  # of the recipes
PAPER_STEP = 64  # examples a step
AT_ONCE = 4  # the default of batch_size, at most


def _known_method(value: str) -> str:
    find_method(value)
    return value


def _known_objective(value: str) -> str:
    if value not in OBJECTIVES:
        raise ValueError(f"unknown; choose from {', '.join(OBJECTIVES)}")
    return value


def _rates() -> str:
    """The other methods' learning rates, by size: "5e-5 (lora, dora), 1e-5 (full, galore, lisa)"."""
    rates = {
        name: f"{method.learning_rate:g}".replace("e-0", "e-") for name, method in METHODS.items() if not method.ours
    }
    return ", ".join(
        f"{rate} ({', '.join(name for name in rates if rates[name] == rate)})" for rate in dict.fromkeys(rates.values())
    )


def _known_quantisation(value: str) -> str:
    if value not in QUANTISATIONS:
        raise ValueError(f"unknown; choose from {', '.join(QUANTISATIONS)}")
    return value


def _known_optimizer(value: str) -> str:
    from transformers.training_args import OptimizerNames

    known = [str(name.value) for name in OptimizerNames]
    if value not in known:
        raise ValueError(f"unknown; choose from {', '.join(known)}")
    return value


class DataOptions(Options):
    """Which data, for which model: what `s2ft data preview` takes, too."""

    model: Name = Field(description="Base model: a folder or a name on the Hub")
    data: Names = Field(
        description="Data: a .json, .jsonl, .csv, .tsv or .parquet file, also compressed (.gz, .bz2, .zst, .lz4), a folder of "
        "them, or org/name:config:split on the Hub; repeat to join several"
    )
    map: Columns = Field(None, description="Columns under the names that are known: instruction=question,output=reply")
    objective: Annotated[str, AfterValidator(_known_objective)] = Field(
        "sft",
        description="What is learned: " + ", ".join(f"{name} ({row.title})" for name, row in OBJECTIVES.items()),
    )
    limit: Positive | None = Field(None, description="Use only the first N examples")
    max_length: Positive | None = Field(
        None, description=f"Tokens of an example that are used; {LONGEST} unless the model has fewer positions"
    )


class TrainOptions(ObjectiveOptions, MethodOptions, DataOptions):
    """All options of `s2ft train`. Make one with `parse_options`, which reports every problem at once."""

    data_weights: Weights = Field(
        None,
        description="How often the examples of each --data are taken: 1,0.5,3 takes all, a random half, all three times",
    )
    output: Name = Field(description="Folder for the adapter, its run card and checkpoints; must not exist or be empty")
    method: Annotated[str, AfterValidator(_known_method)] = Field(
        "s2ft",
        description=f"What trains: {', '.join(METHODS)}, or peft:NAME for another of PEFT's methods; all but s2ft are there "
        "to compare with",
    )
    packing: bool = Field(False, description="Put several short examples in one row; they do not attend to each other")
    epochs: PositiveFloat = Field(3.0, description="Passes over the data")
    max_steps: Positive | None = Field(None, description="Stop after N optimizer steps, whatever the epochs")
    recipe: Literal["auto", "paper"] = Field(
        "auto",
        description="Where batch and rate are open: auto fits them to data and slices, paper takes the paper's",
    )
    batch_size: Positive | None = Field(
        None, description=f"Examples that go through the model at once; at most {AT_ONCE} unless given"
    )
    gradient_accumulation: Positive | None = Field(
        None,
        description=f"Batches per optimizer step; unless given, chosen for about 100 steps of at most {PAPER_STEP} examples",
    )
    learning_rate: Rate = Field(
        None,
        description="Peak learning rate, or auto, which tries a few in short runs; unless given, for s2ft by steps and size "
        f"of slices, for the others {_rates()} "
        "(s2ft in the paper: 2e-4 commonsense, 1e-3 arithmetic, 2e-5 instructions)",
    )
    schedule: Literal["linear", "cosine", "constant", "constant_with_warmup"] = Field(
        "linear", description="How the learning rate falls"
    )
    warmup_steps: Annotated[int, Field(ge=0)] | None = Field(
        None, description=f"{WARMUP} unless given, at most a tenth of the run"
    )
    optim: Annotated[str, AfterValidator(_known_optimizer)] = Field(
        "adamw_torch_fused", description="Optimizer, by its name in transformers, such as adamw_torch_8bit"
    )
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.0, description="Of the trained deltas; nothing frozen decays")
    clip: PositiveFloat = Field(1.0, description="Largest norm of the gradient")
    precision: Literal["auto", "bf16", "fp32", "pure-bf16"] = Field(
        "auto",
        description="Of the computation: auto, bf16, fp32; what is trained is fp32, but with pure-bf16 (s2ft only), "
        "where steps are rounded stochastically",
    )
    quantize: Annotated[str, AfterValidator(_known_quantisation)] | None = Field(
        None, description=f"Quantise the frozen base while it is loaded: {', '.join(QUANTISATIONS)}"
    )
    layout: Literal["auto", "in-place", "indexed"] = Field(
        "auto", description="Where the slices live while they train: auto tries and takes the faster"
    )
    gradient_checkpointing: bool = Field(False, description="Recompute activations in backward: less memory, more time")
    calibration: Annotated[float, Field(gt=0, le=1)] = Field(
        0.01, description="Fraction of the examples that is read by strategies that score heads and channels on data"
    )
    train_seed: Seed = Field(0, description="Seed of the order of the examples")
    log_every: Positive = Field(5, description="Steps between two points of the loss curve")
    report_to: Annotated[CommaNames, AfterValidator(known_trackers)] | None = Field(
        None, description=f"Trackers that get the run's figures too: {', '.join(TRACKERS)}; {NONE} unless given"
    )
    save_every: Positive = Field(
        500, description="Steps between two checkpoints, validate_every where that measures; the newest two are kept"
    )
    holdout: Positive | None = Field(
        None, description="Examples held out of training; the result is the weights with the lowest loss on them"
    )
    validate_every: Positive = Field(
        80, description="Steps between two measurements of the held-out loss, in the second half of the run"
    )
    evaluate: CommaNames | None = Field(
        None, description="Tasks or suites (as in s2ft eval) that base and result are scored on, for the run card"
    )
    eval_data: Name | None = Field(
        None, description="Where the questions of evaluate lie: a folder or a name on the Hub"
    )
    eval_limit: Positive | None = Field(None, description="Use only the first N questions of each task")
    push_to_hub: Name | None = Field(
        None, description="Upload the result to the Hub under this name, such as me/math-adapter"
    )
    samples: Annotated[int, Field(ge=0)] = Field(
        0, description="Prompts of the data, held-out ones first, that base and result answer for the report"
    )
    resume: bool = Field(False, description="Continue from the newest checkpoint in the output folder")


def parse_options(values: Mapping[str, Any]) -> TrainOptions:
    """The options from raw values, which may all be text.

    Raises:
        S2FTError: with all problems at once, each as `option=value: what is allowed`; then with inputs that are not there, too.

    Example:
        >>> parse_options({"model": "m", "data": "d", "output": "o", "epochs": "0", "layers": "x"})
        Traceback (most recent call last):
            ...
        s2ft.common.errors.S2FTError: 2 problems:
          - epochs='0': input should be greater than 0
          - layers='x' is not an index, a list of them, 'A-B', 'first:N', 'last:N' or 'last:P%'
    """
    problems = _option_problems(values)
    if problems:
        from s2ft.finetune.inputs import input_problems  # else they are looked for when the run begins

        raise_together([*problems, *input_problems(values)])
    return TrainOptions.model_validate(dict(values))


def _option_problems(values: Mapping[str, Any]) -> list[str]:
    try:
        options = TrainOptions.model_validate(dict(values))
    except ValidationError as error:
        wrong = {str(item["loc"][0]) for item in error.errors()}
        problems = [*_method_problems(values, wrong), *_foreign_to_objective(values, wrong)]
        return [*_problems(error, values.get("method") or "s2ft"), *problems]
    return [
        *_method_problems(values, set()),
        *_foreign_to_objective(values, set()),
        *objective_problems(options.model_dump(), find_method(options.method).leaves_model),
        *_weight_problems(options),
        *_evaluation_problems(options),
    ]


def read_config(path: str) -> dict[str, Any]:
    """The values of a YAML file whose keys are options.

    Raises:
        S2FTError: with file and line, if it is missing, malformed, or no mapping.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise S2FTError(f"config={path!r} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}:{mark.line + 1}" if mark else path
        raise S2FTError(f"{place}: malformed YAML: {getattr(error, 'problem', None) or error}") from None
    if not isinstance(values, dict):
        raise S2FTError(f"{path}:1: expected options, each as `name: value`; found {repr(values)[:60]}")
    return values


def to_yaml(options: TrainOptions) -> str:
    """The options as a file that `--config` reads; those that were left open (None) are left out."""
    left_out = {"resume", *unasked(options)}
    return yaml.safe_dump(options.model_dump(exclude_none=True, exclude=left_out), sort_keys=False, allow_unicode=True)


def unasked(options: TrainOptions) -> set[str]:
    """The options that its method or objective does not take, and refuses where they are given."""
    return foreign_options(options.method) | foreign_to_objective(options.objective)


def _problems(error: ValidationError, method: Any) -> list[str]:
    """One line for each option; of a union's alternatives, pydantic reports each."""
    lines: dict[str, str] = {}
    for item in error.errors():
        name = str(item["loc"][0])
        lines.setdefault(name, _problem(name, item["type"], item["msg"], item["input"], method))
    return list(lines.values())


def _problem(name: str, kind: str, message: str, value: Any, method: Any) -> str:
    if kind == "missing":
        return f"{name} is missing: {TrainOptions.model_fields[name].description}"
    if kind == "extra_forbidden":
        return f"{name}={value!r}: {hint(name, TrainOptions.model_fields, is_s2ft=method == 's2ft')}"
    message = message.removeprefix("Value error, ")
    return f"{name}={value!r}: {message[0].lower()}{message[1:]}"


def _method_problems(values: Mapping[str, Any], wrong: set[str]) -> list[str]:
    """What the chosen method has to say about those options that could be read."""
    method = values.get("method") or "s2ft"
    if "method" in wrong:
        return []
    foreign = [
        _foreign(name, values[name], method)
        for name in TrainOptions.model_fields
        if name in foreign_options(method) and values.get(name) is not None
    ]
    if method != "s2ft" and values.get("precision") == PURE:
        foreign.append(f"precision={PURE!r} belongs to method=s2ft; take auto, bf16 or fp32 with method={method}")
    if find_method(method).leaves_model and values.get("learning_rate") == AUTO_RATE:
        foreign.append(
            f"learning_rate={AUTO_RATE!r} tries rates one after the other, and with method={method} each would change the "
            "model's own weights; give a rate, or take a method that trains an adapter"
        )
    readable = {name: value for name, value in values.items() if name not in wrong}
    return foreign + (_config_problems(values, wrong) if method == "s2ft" else find_method(method).problems(readable))


def _weight_problems(options: TrainOptions) -> list[str]:
    count, weights = len(options.data), options.data_weights
    if weights is None or len(weights) == count:
        return []
    return [f"data_weights={weights} are {len(weights)} for {count} sources of data; give one for each"]


def _evaluation_problems(options: TrainOptions) -> list[str]:
    if options.evaluate is not None and options.eval_data is None:
        return [f"evaluate={options.evaluate!r} needs eval_data: {TrainOptions.model_fields['eval_data'].description}"]
    alone = [
        name for name in ("eval_data", "eval_limit") if options.evaluate is None and getattr(options, name) is not None
    ]
    return [f"{name}={getattr(options, name)!r} is of no use without evaluate" for name in alone]


def _foreign(name: str, value: Any, method: str) -> str:
    takers = [other for other, taker in METHODS.items() if name in taker.options] or [f"{PREFIX}NAME"]
    return f"{name}={value!r} is no option of method={method}; it belongs to {', '.join(takers)}"


def _foreign_to_objective(values: Mapping[str, Any], wrong: set[str]) -> list[str]:
    """The options that are given and belong to other objectives alone."""
    objective = values.get("objective") or "sft"
    if "objective" in wrong:
        return []
    return [
        f"{name}={values[name]!r} is no option of objective={objective}; it belongs to "
        f"{', '.join(other for other, taker in OBJECTIVES.items() if name in taker.options)}"
        for name in TrainOptions.model_fields
        if name in foreign_to_objective(objective) and values.get(name) not in (None, False)
    ]


def _config_problems(values: Mapping[str, Any], wrong: set[str]) -> list[str]:
    """What an `S2FTConfig` made from these values would be refused for."""
    readable = {name: value for name, value in values.items() if name in S2FTOptions.model_fields and name not in wrong}
    options = S2FTOptions.model_validate(readable)
    return [*choice_problems(options), *order_problems(options)]
