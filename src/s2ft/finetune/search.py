"""`learning_rate=auto`: a few short runs from one start; the rate with the lowest loss on examples that they do not train on.

    the rule's rate ─→ × 2, × 4, ... while the loss falls;  if × 2 did not help, × 1/2, × 1/4, ...

A run of n steps moves as far as the whole one of N if its rate is √(N/n) times as high (`training/rate.py`), so it gets
that, and the whole run's schedule in n steps. All of them take at most a quarter of the run's time. Afterwards the model is
as before, and the run trains on all examples, as if the rate had been given.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from s2ft.common.errors import S2FTError
from s2ft.finetune.arguments import warmup_steps
from s2ft.finetune.layout import brief_layout
from s2ft.finetune.live import LiveView
from s2ft.finetune.options import TrainOptions
from s2ft.finetune.recipe import examples_a_step
from s2ft.finetune.trainer import RunTrainer
from s2ft.runtime.processes import as_leader

TRIES = 5
SHARE = 1 / 4  # of the run's time, for all tries
FEWEST_STEPS, MOST_STEPS = 4, 100  # of a try
FEWEST_HELD_OUT, MOST_HELD_OUT = 8, 64  # examples, for all tries; at most a quarter
MEASURING = 1 / 2  # time for an example's loss, of that for training on it

log = logging.getLogger("s2ft")


@dataclass(frozen=True)
class Short:
    """The size of a try."""

    steps: int
    whole: int  # steps of the run that it is to tell about
    held_out: int  # examples that its loss is measured on

    def options(self, options: TrainOptions, rate: float) -> TrainOptions:
        """Those of the try that tells about the run at this rate."""
        short = {
            "learning_rate": rate * math.sqrt(self.whole / self.steps),
            "max_steps": self.steps,
            "warmup_steps": warmup_steps(options, self.whole) * self.steps // self.whole,
            "holdout": None,
        }
        return options.model_copy(update=short)


@dataclass(frozen=True)
class Search:
    """What was found."""

    short: Short
    losses: dict[float, float]  # rate → held-out loss, in the order of the tries
    seconds: float

    @property
    def rate(self) -> float:
        """The one with the lowest loss."""
        return min(self.losses, key=lambda rate: self.losses[rate])

    @property
    def reason(self) -> str:
        """In words."""
        return f"the best of {len(self.losses)} tried in runs of {self.short.steps} steps"

    @property
    def card(self) -> dict[str, Any]:
        """For the run card; a loss that is no number is None."""
        losses = {f"{rate:g}": round(loss, 5) if math.isfinite(loss) else None for rate, loss in self.losses.items()}
        size = {"steps": self.short.steps, "held_out": self.short.held_out}
        return {"reason": self.reason, **size, "losses": losses, "seconds": round(self.seconds, 3)}


def plan_tries(options: TrainOptions, examples: int, steps: int) -> Short:
    """How long a try may be.

    Args:
        options: With the batch settled.
        examples: To train on.
        steps: Of the run.

    Raises:
        S2FTError: if the run is too short or has too few examples, with how many it needs.
    """
    step = examples_a_step(options)
    room = steps * step * SHARE / TRIES  # examples trained on in the time of a try
    wanted = max(FEWEST_HELD_OUT, min(MOST_HELD_OUT, int(room / 4)))
    held_out = min(wanted, examples // 4, int((room - FEWEST_STEPS * step) / MEASURING))
    if held_out < FEWEST_HELD_OUT:
        raise _too_few(options, examples, steps, step)
    return Short(min(MOST_STEPS, int((room - held_out * MEASURING) / step)), steps, held_out)


def _too_few(options: TrainOptions, examples: int, steps: int, step: int) -> S2FTError:
    least = math.ceil((FEWEST_STEPS + FEWEST_HELD_OUT * MEASURING / step) * TRIES / SHARE)  # steps
    enough = max(4 * FEWEST_HELD_OUT, math.ceil(least * step / options.epochs))
    wanted = f"at least {4 * FEWEST_HELD_OUT} examples" if steps >= least else f"at least {least} steps"
    here = f"{examples} examples in {steps} steps of {step}"
    hint = "" if options.max_steps else f" ({enough} examples in {options.epochs:g} epochs)"
    return S2FTError(
        f"learning_rate='auto' tries rates in short runs, and needs {wanted}{hint}; here are {here}: give more, or a rate, or "
        "leave learning_rate out, which takes the rule's"
    )


def search(options: TrainOptions, short: Short, trainer_of: Callable[[TrainOptions], RunTrainer]) -> Search:
    """Tries rates around the options' own.

    Args:
        options: With a learning rate, where the search begins.
        short: From `plan_tries`.
        trainer_of: Makes the trainer for a try's options, with an adapter on the model, each time in the same state.

    Raises:
        S2FTError: if no try ends with a loss that is a number.
    """
    assert isinstance(options.learning_rate, float)
    started = time.perf_counter()

    def loss_at(rate: float) -> float:
        brief = short.options(options, rate)
        trainer = trainer_of(brief)
        trainer.args.warmup_steps = warmup_steps(brief, short.steps)
        loss = _try(trainer, options.layout)
        log.info("learning rate %g: held-out loss %.4g after a run of %d steps", rate, loss, short.steps)
        return loss

    losses = climb(loss_at, options.learning_rate)
    if not any(map(math.isfinite, losses.values())):
        raise S2FTError(f"learning_rate='auto': the loss is no number at {', '.join(f'{rate:g}' for rate in losses)}")
    return Search(short, losses, time.perf_counter() - started)


def climb(loss_at: Callable[[float], float], start: float) -> dict[float, float]:
    """Rate → loss: doubles while that helps; if it does not help at all, halves.

    Example:
        >>> climb(lambda rate: abs(rate - 4.5), start=1.0)
        {1.0: 3.5, 2.0: 2.5, 4.0: 0.5, 8.0: 3.5}
    """
    losses = {start: loss_at(start)}
    for factor in (2.0, 0.5):
        rate = start * factor
        while len(losses) < TRIES:
            losses[rate], before = loss_at(rate), losses[rate / factor]
            still_diverges = factor < 1 and math.isinf(before)
            if losses[rate] >= before and not still_diverges:
                break
            rate *= factor
        if len(losses) > 2:  # doubling helped
            break
    return losses


def _try(trainer: RunTrainer, layout: str) -> float:
    """The held-out loss after a short run; infinite if it is no number. The adapter is taken off again."""
    trainer.remove_callback(LiveView)
    before = {name: parameter.detach().clone() for name, parameter in _trained(trainer.model)}
    with brief_layout(trainer.model, layout):
        trainer.train()
        loss = as_leader(trainer.evaluate()["eval_loss"])
    with torch.no_grad():  # what the adapter trains of the model itself, a head or biases, stays there
        for name, parameter in _trained(trainer.model):
            parameter.copy_(before[name])
    trainer.model.unload()
    trainer.accelerator.free_memory()
    return loss if math.isfinite(loss) else math.inf


def _trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)
