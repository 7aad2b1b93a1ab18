"""`TrainOptions`: every option of a training run, once. Command line, YAML file and run card read them from here.

Defaults follow the paper's recipe (table 6): AdamW with betas 0.9 and 0.95, no weight decay, gradients clipped to 1, a linear
schedule after 100 steps of warm-up, 3 epochs, sequences up to 2,048 tokens, seed 0. Its 64 examples a step and its rates are
for large data sets: here `finetune/recipe.py` settles both for the run at hand, unless `recipe` is "paper".
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from s2ft.common.errors import S2FTError, raise_together
from s2ft.format.terms import ALLOCATIONS, PROJECTIONS, PURE, STRATEGIES, SUBSETS
from s2ft.format.unknown import hint

if TYPE_CHECKING:
    from s2ft.format.config import S2FTConfig

ADAM_BETAS = (0.9, 0.95)
LONGEST = 2048  # tokens, unless the model has fewer positions
WARMUP = 100  # steps, or a tenth of a shorter run
PAPER = "paper"  # of the recipes
PAPER_STEP = 64  # examples a step
AT_ONCE = 4  # examples that go through the model at once, where nobody says
LEARNING_RATES = {"s2ft": 2e-4, "full": 1e-5, "lora": 5e-5, "dora": 5e-5, "galore": 1e-5, "lisa": 1e-5}  # commonsense


def _words(value: Any) -> Any:
    """ "a, b" → ["a", "b"]."""
    return [word.strip() for word in value.split(",") if word.strip()] if isinstance(value, str) else value


def _one_or_many(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _word_or_words(value: Any) -> Any:
    return _words(value) if isinstance(value, str) and "," in value else value


def _ratios(value: Any) -> Any:
    """ "o_proj=0.05,down_proj=0.02" → a mapping; a number stays what it is."""
    if not isinstance(value, str):
        return value
    if "=" not in value:
        return _number(value)
    pairs = [word.partition("=") for word in _words(value)]
    names = [name.strip() for name, _, _ in pairs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"names {', '.join(twice)} more than once; give each projection one ratio")
    return {name: ratio.strip() for name, (_, _, ratio) in zip(names, pairs, strict=True)}


def _number(value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise ValueError("must be a fraction such as 0.05, or one per projection: o_proj=0.05,down_proj=0.02") from None


def _layers(value: Any) -> Any:
    """ "3" → 3 and "1,2" → [1, 2]; ranges such as "8-15" and "last:50%" stay text."""
    if not isinstance(value, str):
        return value
    numbers = [int(word) for word in _words(value) if word.lstrip("-").isdigit()]
    if not numbers or len(numbers) != len(_words(value)):
        return value
    return numbers if "," in value else numbers[0]


def _named(value: Any) -> Any:
    """Refuses empty names, which a path would read as the current folder, and NUL, which no path can hold."""
    names = [value] if isinstance(value, str) else value
    if names is not None and (not names or not all(name.strip() for name in names)):
        raise ValueError("must not be empty")
    return _without_nul(value)


def _without_nul(value: Any) -> Any:
    if value is not None and any("\0" in name for name in value):
        raise ValueError("must not hold the character NUL")
    return value


def _holds_boolean(value: Any) -> bool:
    members = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
    return any(isinstance(member, bool) for member in members)


def _known_optimizer(value: str) -> str:
    from transformers.training_args import OptimizerNames

    known = [str(name.value) for name in OptimizerNames]
    if value not in known:
        raise ValueError(f"unknown; choose from {', '.join(known)}")
    return value


Positive = Annotated[int, Field(gt=0)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]


class MethodOptions(BaseModel):
    """What is trained: the options that go into an `S2FTConfig`, whose words these are."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    ratios: Annotated[float | dict[str, float] | None, BeforeValidator(_ratios)] = Field(
        None,
        description=f"Fraction of heads or channels to train: a number, or one for each of {', '.join(PROJECTIONS)}",
    )
    budget: float | None = Field(
        None, description="Instead of ratios: fraction of the model's parameters; 0.01 if neither"
    )
    strategy: str = Field("random", description=f"How they are chosen: {', '.join(STRATEGIES)}")
    subset: str = Field("largest", description=f"Which scores are trained: {', '.join(SUBSETS)}")
    seed: int | None = Field(None, description="Seed of the random strategy; from the data's digest unless given")
    allocation: str = Field("uniform", description=f"How the layers share: {', '.join(ALLOCATIONS)}")
    layers: Annotated[int | list[int] | str | None, BeforeValidator(_layers)] = Field(
        None, description="Blocks to train: 3, 1,2,5, 8-15, first:4 or last:50%; all unless given"
    )
    avoid: Annotated[list[str] | None, BeforeValidator(_words), AfterValidator(_without_nul)] = Field(
        None, description="Adapters whose channels are not to be chosen: folders or Hub names"
    )
    target_modules: Annotated[str | list[str] | None, BeforeValidator(_word_or_words), AfterValidator(_named)] = Field(
        None,
        description="Modules to train a slice of, as in PEFT; by default what ratios names, else o_proj and down_proj",
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_boolean(cls, value: Any, info: ValidationInfo) -> Any:
        """Or `true` in a YAML file would be read as 1."""
        annotation = cls.model_fields[str(info.field_name)].annotation
        if annotation is not bool and _holds_boolean(value):
            wanted = "a number" if any(kind in str(annotation) for kind in ("int", "float")) else "text"
            raise ValueError(f"{wanted} is wanted, not true/false")
        return value

    def s2ft_config(self, seed: int | None = None) -> S2FTConfig:
        """The method's configuration, with `seed` where none was given.

        Raises:
            S2FTError: with everything that the method does not allow.
        """
        from s2ft.format.config import S2FTConfig  # brings torch and PEFT, which `--help` does without

        values = {name: getattr(self, name) for name in MethodOptions.model_fields}
        if self.seed is None and self.strategy == "random":
            values["seed"] = seed
        return S2FTConfig(**values, task_type="CAUSAL_LM")


class TrainOptions(MethodOptions):
    """All options of `s2ft train`. Make one with `parse_options`, which reports every problem at once."""

    model: Annotated[str, AfterValidator(_named)] = Field(description="Base model: a folder or a name on the Hub")
    data: Annotated[list[str], BeforeValidator(_one_or_many), AfterValidator(_named)] = Field(
        description="Data: a .json, .jsonl or .parquet file, a folder of them, or a name on the Hub; repeat to join several"
    )
    output: Annotated[str, AfterValidator(_named)] = Field(
        description="Folder for the adapter, its run card and checkpoints; must not exist or be empty"
    )
    method: Literal["s2ft", "full", "lora", "dora", "galore", "lisa"] = Field(
        "s2ft", description="What trains: s2ft, or one to compare with: full, lora, dora, galore, lisa"
    )
    lora_rank: Positive = Field(32, description="Rank of lora and dora")
    lora_alpha: Positive = Field(64, description="Scale of lora and dora, divided by the rank")
    galore_rank: Positive = Field(128, description="Rank that galore projects gradients to")
    lisa_layers: Positive = Field(2, description="Blocks that lisa trains at a time")
    lisa_interval: Positive = Field(20, description="Steps before lisa draws other blocks")
    limit: Positive | None = Field(None, description="Train on the first so many examples")
    max_length: Positive | None = Field(
        None, description=f"Tokens of an example that are used; {LONGEST} unless the model has fewer positions"
    )
    packing: bool = Field(False, description="Put several short examples in one row; they do not see each other")
    epochs: Annotated[float, Field(gt=0)] = Field(3.0, description="Passes over the data")
    max_steps: Positive | None = Field(None, description="Stop after so many optimizer steps, whatever the epochs")
    recipe: Literal["auto", "paper"] = Field(
        "auto",
        description="Where batch and rate are open: auto fits them to data and slices, paper takes the paper's",
    )
    batch_size: Positive | None = Field(
        None, description=f"Examples that go through the model at once; at most {AT_ONCE} unless given"
    )
    gradient_accumulation: Positive | None = Field(
        None,
        description="Batches per optimizer step; unless given, so many that there are about 100 steps "
        f"and at most {PAPER_STEP} examples in each",
    )
    learning_rate: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="Peak learning rate; unless given, for s2ft by steps and size of slices, for lora and dora 5e-5, for the "
        "others 1e-5 (s2ft in the paper: 2e-4 commonsense, 1e-3 arithmetic, 2e-5 instructions)",
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
    clip: Annotated[float, Field(gt=0)] = Field(1.0, description="Largest norm of the gradient")
    precision: Literal["auto", "bf16", "fp32", "pure-bf16"] = Field(
        "auto",
        description="Of the computation: auto, bf16, fp32; what is trained is fp32, but with pure-bf16 (s2ft only), "
        "where steps are rounded stochastically",
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
    save_every: Positive = Field(
        500, description="Steps between two checkpoints, validate_every where that measures; the newest two are kept"
    )
    holdout: Positive | None = Field(
        None, description="Examples held out of training; the result is the weights with the lowest loss on them"
    )
    validate_every: Positive = Field(
        80, description="Steps between two measurements of the held-out loss, in the second half of the run"
    )
    evaluate: Annotated[list[str] | None, BeforeValidator(_words), AfterValidator(_named)] = Field(
        None, description="Tasks or suites (as in s2ft eval) that base and result are scored on, for the run card"
    )
    eval_data: Annotated[str | None, AfterValidator(_named)] = Field(
        None, description="Where the questions of evaluate lie: a folder or a name on the Hub"
    )
    eval_limit: Positive | None = Field(None, description="Ask the first so many questions of each task")
    resume: bool = Field(False, description="Continue from the newest checkpoint in the output folder")


# The options that not every method takes; all others are everybody's
OPTIONS_OF: dict[str, frozenset[str]] = {
    "s2ft": frozenset({*MethodOptions.model_fields, "calibration", "layout", "optim", "weight_decay"}),
    "full": frozenset({"optim", "weight_decay"}),
    "lora": frozenset({"lora_rank", "lora_alpha", "target_modules", "optim", "weight_decay"}),
    "dora": frozenset({"lora_rank", "lora_alpha", "target_modules", "optim", "weight_decay"}),
    "galore": frozenset({"galore_rank"}),  # it is an optimizer, and transformers gives it no weight decay
    "lisa": frozenset({"lisa_layers", "lisa_interval", "optim", "weight_decay"}),
}


def foreign_options(method: str) -> set[str]:
    """The options that other methods take and this one does not.

    Example:
        >>> sorted(foreign_options("s2ft"))
        ['galore_rank', 'lisa_interval', 'lisa_layers', 'lora_alpha', 'lora_rank']
    """
    return set().union(*OPTIONS_OF.values()) - OPTIONS_OF[method]


def parse_options(values: Mapping[str, Any]) -> TrainOptions:
    """The options from raw values, which may all be text.

    Raises:
        S2FTError: with all problems at once, each as `option=value: what is allowed`; then with inputs that are not there, too.

    Example:
        >>> parse_options({"model": "m", "data": "d", "output": "o", "epochs": "0", "strategy": "best"})
        Traceback (most recent call last):
            ...
        s2ft.common.errors.S2FTError: 2 problems:
          - epochs='0': input should be greater than 0
          - strategy='best' is unknown; choose from random, weight, activation, product, gradient, lift, saliency
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
        return [*_problems(error, values.get("method") or "s2ft"), *_method_problems(values, wrong)]
    return [*_method_problems(values, set()), *_evaluation_problems(options)]


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
    left_out = {"resume", *foreign_options(options.method)}
    return yaml.safe_dump(options.model_dump(exclude_none=True, exclude=left_out), sort_keys=False, allow_unicode=True)


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
    return foreign + (_config_problems(values, wrong) if method == "s2ft" else [])


def _evaluation_problems(options: TrainOptions) -> list[str]:
    if options.evaluate is not None and options.eval_data is None:
        return [f"evaluate={options.evaluate!r} needs eval_data: {TrainOptions.model_fields['eval_data'].description}"]
    alone = [
        name for name in ("eval_data", "eval_limit") if options.evaluate is None and getattr(options, name) is not None
    ]
    return [f"{name}={getattr(options, name)!r} is of no use without evaluate" for name in alone]


def _foreign(name: str, value: Any, method: str) -> str:
    takers = [other for other, options in OPTIONS_OF.items() if name in options]
    return f"{name}={value!r} is no option of method={method}; it belongs to {', '.join(takers)}"


def _config_problems(values: Mapping[str, Any], wrong: set[str]) -> list[str]:
    """What an `S2FTConfig` made from these values would be refused for."""
    readable = {
        name: value for name, value in values.items() if name in MethodOptions.model_fields and name not in wrong
    }
    try:
        MethodOptions.model_validate(readable).s2ft_config()
    except S2FTError as error:
        return error.problems
    return []
