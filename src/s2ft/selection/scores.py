"""How important a head or an FFN channel is: the scores that selection ranks (S²FT paper, appendix D). Add yours here.

    random      R   a hash of (seed, structure, unit), uniform in [0, 1)
    weight      W   ‖the unit's weights in all projections of its structure‖
    activation  A   ‖what the unit feeds into o or down‖, root mean square over tokens
    product     S   W · A
    gradient    G   ‖∂loss/∂(the unit's weights)‖, squared and summed over the batches
    lift            ‖the unit's part of the best rank-r approximation of each weight‖
    saliency        |Σ h · ∂loss/∂h|, over the tokens, of what the unit feeds into o or down

`lift` is LIFT's score of entries (arXiv 2506.00772), taken to channels: what a weight is mostly made of, without data.
`saliency` is what the loss would change by, to first order, if the unit were silent; no gradient of a weight is needed.

A scorer is called with structures, model and batches, and returns one score for each unit. What `select(..., scores=)` takes is
the same, so that a score of your own that proves itself becomes one of these by an entry in `SCORES` and one in
`STRATEGIES` (`format/terms.py`: the command line knows the names without loading torch).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from s2ft.common.errors import S2FTError, raise_together
from s2ft.layer.dequantise import keep_trainable
from s2ft.layer.linears import weight_of, why_not_plain
from s2ft.layer.sharding import is_sharded
from s2ft.selection.data_scores import by_activation, by_gradient, by_product, by_saliency
from s2ft.selection.units import Structure
from s2ft.selection.weight_scores import Batch, Scores, by_hash, by_lift, by_weight, linear_of, why_unreadable

Scorer = Callable[[list[Structure], nn.Module, Iterable[Batch]], Mapping[str, Any]]
"""`(structures, model, batches)` → `structure.key` → the units' scores: a tensor, array or list, [structure.units].

The model is in evaluation mode, and no parameter wants a gradient; both are put back afterwards. `batches` are those that
`select` was given, or none. Scores are compared in float32; the larger, the more important.
"""


@dataclass(frozen=True)
class Score:
    """A way to score, and what it reads."""

    scorer: Scorer
    needs: tuple[str, ...] = ()  # of "weights" (whole ones; quantised ones are dequantised), "activations", "gradients"

    @property
    def needs_data(self) -> bool:
        """Whether the model has to be run."""
        return "activations" in self.needs or "gradients" in self.needs


SCORES: dict[str, Score] = {  # by the names of `STRATEGIES`
    "random": Score(by_hash),
    "weight": Score(by_weight, ("weights",)),
    "activation": Score(by_activation, ("activations",)),
    "product": Score(by_product, ("weights", "activations")),
    "gradient": Score(by_gradient, ("weights", "gradients")),
    "lift": Score(by_lift, ("weights",)),
    "saliency": Score(by_saliency, ("activations", "gradients")),
}


def score_units(
    strategy: str, structures: list[Structure], model: nn.Module, batches: Iterable[Batch] | None = None, seed: int = 0
) -> Scores:
    """Scores every unit of every structure by one of `SCORES`; a structure is looked up by its key.

    Args:
        batches: What the model is called with (`model(**batch)`); read once. `labels` default to the input without
            padding.
        seed: Of the random strategy.

    Raises:
        S2FTError: if the strategy needs data and there is none, or it needs weights that are not whole.
    """
    score = SCORES[strategy]
    if score.needs_data and batches is None:
        raise S2FTError(
            f"strategy={strategy!r} needs data: call s2ft.select(model, config, batches) and use the config it returns"
        )
    if "weights" in score.needs:  # before any data is read
        _check_weights(structures, model)
    if score.needs_data:
        _check_whole(strategy, structures, model)
    scorer = partial(by_hash, seed=seed) if strategy == "random" else score.scorer
    return run_scorer(scorer, structures, model, batches, f"strategy={strategy!r}")


def run_scorer(
    scorer: Scorer,
    structures: list[Structure],
    model: nn.Module,
    batches: Iterable[Batch] | None,
    name: str,  # what the user gave, for error messages
) -> Scores:
    """What a scorer gives to every unit of every structure, checked, in float32.

    Raises:
        S2FTError: if it leaves a structure out, or gives it other than one finite number for each unit.
    """
    with _evaluating(model):
        given = scorer(structures, model, () if batches is None else batches)
    if not isinstance(given, Mapping):
        raise S2FTError(f"{name} returned a {type(given).__name__}; a mapping from structure.key to scores is wanted")
    known = {structure.key for structure in structures}
    strange = [f"{name} scored {key!r}, which is the key of no structure" for key in given if key not in known]
    arrays: Scores = {}
    problems = [_problem(structure, given, arrays) for structure in structures]
    raise_together([*strange, *(f"{name} {problem}" for problem in problems if problem)])
    return arrays


def _problem(structure: Structure, given: Mapping[str, Any], arrays: Scores) -> str | None:
    """What is wrong with the scores of a structure; where nothing is, they are added to `arrays`."""
    if structure.key not in given:
        return f"gave no scores for {structure.key}, which has {structure.units} units"
    scores = _array(given[structure.key])
    if scores is None or scores.shape != (structure.units,):
        shape = "something else" if scores is None else f"the shape {list(scores.shape)}"
        return f"gave {shape} for {structure.key}; one number for each of its {structure.units} units is wanted"
    if not np.isfinite(scores).all():
        return f"gave {structure.key} scores that are not finite: do weights, activations or gradients overflow or hold NaN?"
    arrays[structure.key] = scores
    return None


def _array(values: Any) -> NDArray[np.float32] | None:
    """Numbers as float32; None for what is none. What float32 cannot hold becomes infinite."""
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        values = values.float() if values.dtype == torch.bfloat16 else values  # which NumPy does not have
    try:
        array = np.asarray(values)
    except (TypeError, ValueError):
        return None
    with np.errstate(over="ignore"):
        return array.astype(np.float32) if array.dtype.kind in "biuf" else None


def _check_weights(structures: list[Structure], model: nn.Module) -> None:
    reason = _unreadable(structures, model)
    if reason is None:
        return
    reading = [name for name, score in SCORES.items() if "weights" in score.needs]
    others = [repr(name) for name, score in SCORES.items() if "weights" not in score.needs]
    raise S2FTError(
        f"{reason}; the strategies {', '.join(reading)} read whole weights. Choose strategy={' or '.join(others)}"
    )


def _check_whole(strategy: str, structures: list[Structure], model: nn.Module) -> None:
    """Shards are gathered for scores of weights, one layer after the other; the model cannot run on them before training."""
    for projection in (projection for structure in structures for projection in structure.projections):
        layer = linear_of(projection, model)
        if is_sharded(weight_of(layer)):
            others = [repr(name) for name, score in SCORES.items() if not score.needs_data]
            raise S2FTError(
                f"strategy={strategy!r} runs the model, but the weight of {projection.module} {why_not_plain(layer)}: choose "
                f"channels before the model is sharded, or take {', '.join(others)}"
            )


def _unreadable(structures: list[Structure], model: nn.Module) -> str | None:
    """Why the weights of a projection cannot be read; None if all can."""
    projections = (projection for structure in structures for projection in structure.projections)
    return next(filter(None, (why_unreadable(projection, model) for projection in projections)), None)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no parameter that wants a gradient; both, and any gradients held, are put back afterwards."""
    keep_trainable(model)
    modes = [(module, module.training) for module in model.modules()]
    wanted = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    model.eval()
    for parameter, _, _ in wanted:
        parameter.requires_grad_(False)
        parameter.grad = None
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, requires_grad, gradient in wanted:
            parameter.requires_grad_(requires_grad)
            parameter.grad = gradient
