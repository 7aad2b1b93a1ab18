"""A recipe, run: train, evaluate, and put the result beside the paper's figure.

    OUTPUT/training              what `s2ft train` leaves: adapter or model, run card, checkpoints
    OUTPUT/answers               what `s2ft eval` leaves: every answer
    OUTPUT/reproduction.json     {"environment", "settings", "rows", "result": {"paper", "score", "low", "high", ...}}

After an interruption the same call continues. Everything that makes a run smaller than the recipe's is listed with its result.
"""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from s2ft.common.errors import S2FTError, gathered, raise_together
from s2ft.common.files import staged
from s2ft.data.examples import data_digest, load_examples
from s2ft.data.folder import find_file, places
from s2ft.evaluate.engines import check_vllm
from s2ft.evaluate.judge import Judge
from s2ft.evaluate.options import EvalOptions
from s2ft.evaluate.run import EvalReport, Tell, evaluate
from s2ft.finetune.card import read_card
from s2ft.finetune.checkpoints import whole_checkpoints
from s2ft.finetune.methods import METHODS
from s2ft.finetune.options import TrainOptions, parse_options
from s2ft.finetune.resume import FREE, settled_options
from s2ft.finetune.train import train
from s2ft.lab.reproduce.options import ReproduceOptions
from s2ft.lab.reproduce.recipes import GLOBAL_BATCH, MODELS, Recipe, find_recipe
from s2ft.runtime.environment import environment
from s2ft.runtime.processes import leads, process_count

RESULT = "reproduction.json"
# Options that may change between two calls: they change how a step is computed, not what it learns; data are compared by digest
SAME_RUN = {"layout", "batch_size", "gradient_accumulation", "gradient_checkpointing", "data"}
HELD_OUT = 5  # of a smaller data set, at most one example in five is held out


@dataclass(frozen=True)
class Reproduction:
    """The result, and the evaluation behind it."""

    result: dict[str, Any]
    report: EvalReport


def reproduce(
    options: ReproduceOptions, tell: Tell = lambda *_: None, judge: Judge | None = None
) -> Reproduction | None:
    """Trains, evaluates and compares; what is there already is not done again.

    Args:
        options: See `ReproduceOptions`.
        tell: Called with a title, how many questions are done, and of how many.
        judge: For MT-Bench; that of the options or the environment unless given. Without one its answers are only written.

    Returns:
        None if training was interrupted (the same call goes on), and in all processes but the leading one.

    Raises:
        S2FTError: for anything wrong with the options, data or folders, before anything is trained.
    """
    recipe = find_recipe(options.recipe)
    training, evaluation = plan(recipe, options)
    if training is not None and not is_trained(training):
        goes_on = bool(whole_checkpoints(Path(training.output)))
        if train(training.model_copy(update={"resume": goes_on})).interrupted:
            return None
    if not _alone():
        return None
    report = evaluate(evaluation, tell, judge)
    result = compare(recipe, report, options)
    _write(options, training, report, result)
    return Reproduction(result, report)


def plan(recipe: Recipe, options: ReproduceOptions) -> tuple[TrainOptions | None, EvalOptions]:
    """How to train, unless nothing is trained, and how to evaluate.

    Raises:
        S2FTError: with everything that is wrong with either.
    """
    evaluation, training = eval_options(recipe, options), list[TrainOptions]()
    checks: list[Callable[[], object]] = [lambda: raise_together(evaluation.task_problems())]
    if recipe.is_trained:
        checks.append(lambda: training.append(train_options(recipe, options)))
    if options.engine == "vllm":
        checks.append(check_vllm)
    raise_together(gathered(*checks))
    return training[0] if training else None, evaluation


def deviations(recipe: Recipe, options: ReproduceOptions) -> dict[str, Any]:
    """The options that make a run another one than the recipe's."""
    of_training = ("training_data", "limit", "max_steps") if recipe.is_trained else ()
    names = ("model", *of_training, "eval_limit", "max_new_tokens")
    return {name: value for name in names if (value := getattr(options, name)) is not None}


def train_options(recipe: Recipe, options: ReproduceOptions) -> TrainOptions:
    """The recipe as options of `s2ft train`.

    Raises:
        S2FTError: if the global batch cannot be divided, or an option is wrong.
    """
    at_once = options.batch_size * process_count()
    if GLOBAL_BATCH % at_once:
        raise S2FTError(
            f"batch_size={options.batch_size} times {process_count()} processes does not divide the {GLOBAL_BATCH} examples "
            "of a step; take a power of two"
        )
    values: dict[str, Any] = {
        "learning_rate": METHODS[recipe.method].learning_rate,
        **recipe.options,
        **_smaller(recipe, options),
        "model": options.model or MODELS[recipe.model].hub,
        "data": _training_data(recipe, options),
        "output": str(options.output / "training"),
        "batch_size": options.batch_size,
        "gradient_accumulation": GLOBAL_BATCH // at_once,
        "gradient_checkpointing": options.gradient_checkpointing,
    }
    return parse_options(values)


def _smaller(recipe: Recipe, options: ReproduceOptions) -> dict[str, Any]:
    """The options of a smaller run; of fewer examples, fewer are held out."""
    found = {name: value for name in ("limit", "max_steps") if (value := getattr(options, name)) is not None}
    if options.limit is not None and "holdout" in recipe.options:
        found["holdout"] = max(1, min(recipe.options["holdout"], options.limit // HELD_OUT))
    return found


def _training_data(recipe: Recipe, options: ReproduceOptions) -> str:
    """The recipe's file in the data folder, or its data set on the Hub.

    Raises:
        S2FTError: if the folder has no such file.
    """
    if options.training_data is not None:
        return options.training_data
    if not recipe.training_data.endswith(".json"):
        return recipe.training_data
    path = find_file(options.data, places(recipe.training_data))
    if path is None:
        raise S2FTError(
            f"data={options.data!r} has no {recipe.training_data}, which {recipe.name} trains on; name a folder laid out "
            "like LLM-Adapters, or the file itself by training_data"
        )
    return str(path)


def is_trained(options: TrainOptions) -> bool:
    """Whether the folder holds a finished run of these options and data.

    Raises:
        S2FTError: if it holds one of others.
    """
    output = Path(options.output)
    if not (output / "run.json").is_file() or read_card(output).get("status") != "finished":
        return False
    card, now = read_card(output), options.model_dump(mode="json")
    before = settled_options(card["options"])
    different = [name for name in now if name not in FREE | SAME_RUN and before.get(name) != now[name]]
    problems = [
        f"{name}={now[name]!r}, but {options.output} was trained with {name}={before.get(name)!r}" for name in different
    ]
    if (
        not problems
        and data_digest(load_examples(options.data, options.limit, columns=options.map)) != card["data"]["digest"]
    ):
        problems = [f"data={options.data!r} is not what {options.output} was trained on; name another output"]
    raise_together(problems)
    return True


def eval_options(recipe: Recipe, options: ReproduceOptions) -> EvalOptions:
    """The recipe's suite as options of `s2ft eval`, for what was trained."""
    trained, base = str(options.output / "training"), options.model or MODELS[recipe.model].hub
    is_model = recipe.is_trained and METHODS[recipe.method].leaves_model
    values: dict[str, Any] = {
        "model": trained if is_model else base,
        "adapter": [trained] if recipe.is_trained and not is_model else [],
        "suite": [recipe.suite],
        "output": options.output / "answers",
        "limit": options.eval_limit,
        "batch_size": options.eval_batch_size,
    }
    same = ("data", "max_new_tokens", "engine", "judge_url", "judge_model")
    return EvalOptions(**values, **{name: getattr(options, name) for name in same})


def compare(recipe: Recipe, report: EvalReport, options: ReproduceOptions) -> dict[str, Any]:
    """The recipe's figure and ours, with its 95% interval: percent, or a rating."""
    score, low, high = _rating(report) if report.ratings else _accuracy(report)
    difference = None if score is None else score - recipe.paper
    found = {"recipe": recipe.name, "paper": recipe.paper, "score": score, "low": low, "high": high}
    smaller = {**deviations(recipe, options), **_other_sizes(recipe, report, options)}
    return {**found, "difference": difference, "errors": report.errors, "deviations": smaller}


def _other_sizes(recipe: Recipe, report: EvalReport, options: ReproduceOptions) -> dict[str, Any]:
    """Training and test sets of another size than the recipe's."""
    found: dict[str, Any] = {}
    if recipe.is_trained:
        data, training = (read_card(options.output / "training")[section] for section in ("data", "training"))
        dropped = data["without_response"] + data["response_beyond_max_length"]
        count = data["examples"] + dropped + training.get("held_out", 0)
        found = {"examples": count} if count != recipe.examples else {}
    asked = {row["task"]: row["asked"] for row in report.rows if row["asked"] != row["test_set"]}
    return {**found, "questions": asked} if asked else found


def _accuracy(report: EvalReport) -> tuple[float | None, float | None, float | None]:
    """The mean of the tasks' accuracies; the squares of its distances to either end are those of the tasks, added up."""
    rows = [row for row in report.rows if "(strict)" not in row["task"]]
    if any(row["accuracy"] is None for row in rows):
        return None, None, None
    mean = sum(row["accuracy"] for row in rows) / len(rows)
    below, above = (math.hypot(*(row[end] - row["accuracy"] for row in rows)) / len(rows) for end in ("low", "high"))
    return 100 * mean, 100 * (mean - below), 100 * (mean + above)


def _rating(report: EvalReport) -> tuple[float | None, float | None, float | None]:
    row = next(row for row in report.ratings if row["part"] == "all")
    return row["rating"], row["low"], row["high"]


def _write(
    options: ReproduceOptions, training: TrainOptions | None, report: EvalReport, result: dict[str, Any]
) -> None:
    trained = None if training is None else read_card(training.output)["options"]
    settings = {"train": trained, "eval": report.settings}
    rows = [*report.rows, *report.ratings]
    facts = {"environment": environment(), "settings": settings, "rows": rows, "result": result}
    with staged(options.output) as aside:
        (aside / RESULT).write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _alone() -> bool:
    """Ends the process group and frees memory after training; only the leading process continues."""
    gc.collect()  # the trainer and its model hold each other
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return leads()
