"""Does an adapter fit a model: are its layers there, of its sizes, and the base weights those that it was made for?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from s2ft.common.errors import raise_together
from s2ft.format.config import S2FTConfig
from s2ft.format.digest import check_base, digest_parts, join_digests, slice_digest
from s2ft.format.saved import SavedConfig
from s2ft.format.slices import Runs, Slice
from s2ft.layer.dequantise import dequantised, grid
from s2ft.layer.linears import features
from s2ft.layer.sharding import read_matrix, why_not_readable
from s2ft.layer.stacked import StackedLinear, linear_at
from s2ft.selection.select import select

HEADED = {
    "SEQ_CLS": ("AutoModelForSequenceClassification", ("classifier", "score")),
    "TOKEN_CLS": ("AutoModelForTokenClassification", ("classifier", "score")),
    "QUESTION_ANS": ("AutoModelForQuestionAnswering", ("qa_outputs",)),
}
"""Tasks with a head → the class that loads a model with one, and how PEFT knows it: by the end of its name."""


def check_fits(model: nn.Module, config: SavedConfig, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises `S2FTError` unless an adapter's slices are of layers of this model, and of the base they were made for.

    Args:
        shapes: Module → shape of its delta: both dimensions must be the layer's.
    """
    _check_modules(model, config, shapes)
    check_base(config.base_digest or {}, _digests(model, config), config.base_model_name_or_path)


def resolved(model: nn.Module, config: S2FTConfig) -> S2FTConfig:
    """A copy of `config` with its channels chosen, its base checked and digested.

    Raises:
        S2FTError: if the config cannot be met on this model, or was made for another base.
    """
    if not config.is_resolved:
        raise_together(filter(None, [_head_problem(model, config)]))
    config = select(model, config).config
    _check_modules(model, config)
    check_base(config.base_digest or {}, digests := _digests(model, config), config.base_model_name_or_path)
    return config if config.base_digest is not None else replace(config, base_digest=_known(digests))


def _head_problem(model: nn.Module, config: S2FTConfig) -> str | None:
    """Why the task's head, which PEFT trains and saves whole by its name, is not there; None where it is, or none is wanted."""
    if config.task_type not in HEADED:
        return None
    loader, names = HEADED[config.task_type]
    known = {*names, *(config.modules_to_save or ())}
    if any(path.endswith(name) for path, _ in model.named_modules() for name in known):
        return None
    return (
        f"task_type={str(config.task_type)!r} trains a head, and {type(model).__name__} has none that is called "
        f"{' or '.join(names)}: load the model with {loader}, or name its head in modules_to_save"
    )


def digest_anew(model: nn.Module, config: S2FTConfig) -> None:
    """The digests of a config follow its channels, unless they came with it."""
    if config.left_open("base_digest"):
        config.base_digest = _known(_digests(model, replace(config, base_digest=None)))


def _known(digests: dict[str, str | None]) -> dict[str, str] | None:
    return {path: digest for path, digest in digests.items() if digest is not None} or None


def _check_modules(model: nn.Module, config: SavedConfig, shapes: Mapping[str, tuple[int, ...]] | None = None) -> None:
    """Every module that a slice names is there, is linear, and has the slice's channels and the delta's width."""
    raise_together(
        problem
        for path, text in (config.slices or {}).items()
        if (problem := _slice_problem(linear_at(model, path), path, Runs.parse(text), (shapes or {}).get(path)))
    )


def _slice_problem(linear: nn.Module | None, path: str, runs: Runs, shape: tuple[int, ...] | None) -> str | None:
    if linear is None:
        return f"the adapter changes {path}, which is no linear layer of this model"
    inputs, outputs = features(linear)
    size, across = (inputs, outputs) if runs.side == "in" else (outputs, inputs)
    if runs.last >= size:
        return f"the adapter changes {_named(linear, runs.last, size)} of {path}, whose {runs.side}put side has {size} channels"
    expected = (across, runs.count) if runs.side == "in" else (runs.count, across)
    if shape is not None and tuple(shape) != expected:
        return f"the adapter's delta of {path} has shape {list(shape)}; for this model it is {list(expected)}"
    return None


def _named(linear: nn.Module, channel: int, size: int) -> str:
    """A channel that is not there, and of stacked experts the expert that is not there either."""
    if not isinstance(linear, StackedLinear):
        return f"channel {channel}"
    count = linear.experts.count
    return f"channel {channel} (expert {channel // (size // count)}; there are experts 0 to {count - 1})"


def _digests(model: nn.Module, config: SavedConfig) -> dict[str, str | None]:
    """Module → digest of the base slice that the config's slice changes; None where it has no plain values."""
    digests: dict[str, str | None] = {}
    for path, text in (config.slices or {}).items():
        linear = linear_at(model, path)
        assert linear is not None
        whole = Slice.parse(text)
        parts = digest_parts((config.base_digest or {}).get(path, ""), whole)
        digests[path] = join_digests({part: _digest(linear, Slice.parse(part)) for part in parts}, whole)
    return digests


def _digest(linear: nn.Module, trained: Slice) -> str | None:
    plain = why_not_readable(linear) is None
    weight = read_matrix(linear, "a digest") if plain else dequantised(linear)
    if weight is None or weight.is_meta:
        return None
    return slice_digest(trained.of(weight), None if plain else grid(linear))
