"""One run for each of several methods, on the same data and, where a method leaves the choice, of the same size.

    methods, budget, options ─→ the options of each run ─→ `s2ft train` in a process of its own, one after the other

A process of its own, so that one run's memory is not counted for the next. What is finished is kept, and what was interrupted
goes on from its checkpoint, so the same command continues a comparison.
"""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from s2ft.common.errors import S2FTError, raise_together
from s2ft.data.examples import data_digest
from s2ft.finetune.card import Card, read_card
from s2ft.finetune.checkpoints import whole_checkpoints
from s2ft.finetune.methods import find_method, foreign_options, method_problem
from s2ft.finetune.options import TrainOptions, parse_options
from s2ft.finetune.prepare import read_examples
from s2ft.finetune.results import command_words
from s2ft.finetune.resume import ASKING, FINISHED, FREE, SETTLED
from s2ft.finetune.reward_functions import rewards_digest
from s2ft.finetune.values import AUTO_RATE
from s2ft.runtime.models import empty_model
from s2ft.runtime.processes import process_count

_OPEN = (None, "auto")  # values of options that a run settles
_LEFT_OPEN = (*SETTLED, "layout")
_GROWING = ("budget", "peft_config")  # a budget is given, and keys of a config are added to those given
_ENTRY = "import s2ft_command; s2ft_command.main()"

log = logging.getLogger("s2ft")


def plan(methods: Sequence[str], values: Mapping[str, Any]) -> list[TrainOptions]:
    """The options of each run: those of `values` that its method takes, in a folder of its own inside `output`.

    With a `budget`, each method gets the size that trains about that fraction of the model's parameters, where it leaves a
    choice. Where no rate is given, short runs look for one, except where a method trains the whole model.

    Raises:
        S2FTError: for everything that is wrong with an option, and for options that none of the methods takes.
    """
    if process_count() > 1:
        raise S2FTError(f"compare trains in one process at a time; here are {process_count()}")
    if twice := sorted({name for name in methods if methods.count(name) > 1}):
        raise S2FTError(f"methods names {', '.join(twice)} more than once")
    raise_together(f"methods names {name!r}: {problem}" for name in methods if (problem := method_problem(name)))
    first = [parse_options(_of_method(name, values)) for name in methods]
    if values.get("budget") is not None:
        parse_options({name: values.get(name) for name in ("model", "data", "output", "budget")})  # is it one?
    if values.get("push_to_hub") is not None:
        raise S2FTError(
            f"push_to_hub={values['push_to_hub']!r}: each run would be uploaded over the one before; upload the one you choose"
        )
    idle = [name for name in values if all(name in foreign_options(method) for method in methods) and name != "budget"]
    raise_together(f"{name}={values[name]!r} is an option of none of {', '.join(methods)}" for name in idle)
    return first if "budget" not in values else _sized(first, values)


def _of_method(method: str, values: Mapping[str, Any]) -> dict[str, Any]:
    foreign = foreign_options(method)
    taken = {name: value for name, value in values.items() if name not in foreign}
    rate = {} if find_method(method).leaves_model else {"learning_rate": AUTO_RATE}
    place = {"output": str(Path(values["output"]) / method.replace(":", "-"))} if values.get("output") else {}
    return {**rate, **taken, "method": method, **place}


def _sized(runs: Sequence[TrainOptions], values: Mapping[str, Any]) -> list[TrainOptions]:
    """The runs, each with the size that its method has for the budget."""
    model = empty_model(runs[0].model)
    parameters = round(float(values["budget"]) * model.num_parameters())
    found = []
    for options in runs:
        size = find_method(options.method).of_size(model, parameters, options)
        raise_together(
            f"{name}={getattr(options, name)!r}: with budget={values['budget']}, {options.method} gets {name}={value!r}; leave "
            "one of them out"
            for name, value in size.items()
            if name in values and name not in _GROWING and getattr(options, name) != value
        )
        log.info("%s: %s", options.method, size or "leaves no choice of its size")
        found.append(parse_options({**_of_method(options.method, values), **size}))
    return found


def standing(options: TrainOptions) -> str:
    """How far a run has come: "finished", "paused" or "new".

    Raises:
        S2FTError: if what lies in its folder was made with other options.
    """
    folder = Path(options.output)
    if not (folder / "run.json").is_file():
        return "paused" if whole_checkpoints(folder) else "new"
    card, now = read_card(folder), options.model_dump(mode="json")
    before = card.get("options", {})
    raise_together(
        f"{name}={value!r}, but {folder} was trained with {name}={before.get(name)!r}; name another output"
        for name, value in now.items()
        if name not in FREE and not (name in _LEFT_OPEN and value in _OPEN) and before.get(name) != value
    )
    raise_together(
        f"{name}={now[name]!r}, but {folder} was trained with {name}={before.get(name)!r}; name another output"
        for name in card.get("given", [])
        if now[name] in _OPEN
    )
    if card.get("status") != FINISHED:
        return "paused"
    if _has_changed(options, card):
        raise S2FTError(f"data={options.data!r} has changed since {folder} was trained; name another output")
    if "rewards" in card and card["rewards"] != rewards_digest(options.reward_function):
        raise S2FTError(
            f"reward_function={options.reward_function!r} has changed since {folder} was trained; name another output"
        )
    if options.evaluate is not None or options.samples:
        raise_together(
            f"{name}={now[name]!r}, but {folder} was asked with {name}={before.get(name)!r}; name another output"
            for name in sorted(ASKING)
            if before.get(name) != now[name]
        )
    return FINISHED


def _has_changed(options: TrainOptions, card: Card) -> bool:
    """Whether the data is other than a finished run's; not where it cannot be read any more."""
    try:
        return bool(card["data"]["digest"] != data_digest(read_examples(options)))
    except S2FTError as error:
        log.warning("whether the data of %s has changed is not known: %s", options.output, error)
        return False


def run(options: TrainOptions, found: str | None = None) -> int:
    """Trains, in a process of its own, what is not finished yet; its exit code.

    Args:
        found: From `standing`, if that was asked already.
    """
    found = found or standing(options)
    if found == FINISHED:
        return 0
    resumed = options.model_copy(update={"resume": found == "paused"})
    return exit_code([sys.executable, "-c", _ENTRY, *command_words(resumed)[1:]])


def exit_code(words: list[str]) -> int:
    """Of a command, waited for through Ctrl-C, too: a terminal sends that to both, and the run still saves its checkpoint."""
    with subprocess.Popen(words) as process:
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:  # `subprocess.run` would kill it after a quarter of a second
                log.info("waiting for the run to end")
