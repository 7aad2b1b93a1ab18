"""Which heads and channels an `S2FTConfig` asks for, as its fields say it; no library is needed to check that.

The command line does so before PEFT is loaded.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from s2ft.common.errors import S2FTError, first_line
from s2ft.format.terms import ALLOCATIONS, OWN, PROJECTIONS, STRATEGIES, SUBSETS, TOWERS

_LAYERS_PATTERN = re.compile(r"(?P<end>first|last):(?P<count>\d+(?:\.\d+)?)(?P<percent>%?)|(?P<lo>\d+)-(?P<hi>\d+)")


def choice_problems(config: Any) -> Iterator[str]:
    """What is wrong with the choice.

    Args:
        config: An `S2FTConfig`, or options with its fields from `ratios` to `target_modules`.
    """
    yield from _ratio_problems(config.ratios)
    if config.budget is not None and not _is_fraction(config.budget):
        yield f"budget={config.budget!r} is outside (0, 1]"
    if config.ratios is not None and config.budget is not None:
        yield f"ratios={config.ratios!r} and budget={config.budget!r} are both given; give one"
    yield from _strategy_problems(config)
    if config.seed is not None and not (_is_integer(config.seed) and 0 <= config.seed < 2**63):
        yield f"seed={config.seed!r} is not an integer from 0 to 2**63 - 1"
    if config.layers is not None and not _is_layers(config.layers):
        yield f"layers={config.layers!r} is not an index, a list of them, 'A-B', 'first:N', 'last:N' or 'last:P%'"
    if not _is_list_of_text(config.avoid):
        yield f"avoid={config.avoid!r} is not a list of adapters: names on the model, folders, or Hub names"
    targets = getattr(config, "targets", None)  # which options for text alone do not have
    if targets is not None and targets not in TOWERS:
        yield f"targets={targets!r} is unknown; choose from {', '.join(TOWERS)}"
    yield from pattern_problems("target_modules", config.target_modules)


def order_problems(config: Any) -> Iterator[str]:
    """What goes by scores where none are named: heads and channels are drawn then, and have no order.

    Args:
        config: As for `choice_problems`.
    """
    for name, value in (("subset", "smallest"), ("allocation", "global")):
        if config.strategy is None and config.seed is None and getattr(config, name) == value:
            yield f"{name}={value!r} goes by scores, and without strategy channels are drawn; give strategy, such as 'weight'"


def pattern_problems(name: str, given: Any) -> Iterator[str]:
    """A text that names modules is a regular expression, as in PEFT."""
    try:
        re.compile(given if isinstance(given, str) else "")
    except re.error as error:
        yield f"{name}={given!r} is no regular expression: {first_line(error)}"


def chosen_layers(layers: int | str | list[int] | None, count: int) -> set[int]:
    """The blocks that `S2FTConfig.layers` names in a model of `count` blocks.

    Example:
        >>> sorted(chosen_layers("last:50%", 6)), sorted(chosen_layers("1-2", 6)), sorted(chosen_layers([-1], 6))
        ([3, 4, 5], [1, 2], [5])
    """
    if layers is None:
        return set(range(count))
    wanted = _layer_indices(layers, count)
    outside = [index for index in wanted if not -count <= index < count]
    if outside:
        raise S2FTError(f"layers={layers!r} names layer {outside[0]}; the model has layers 0 to {count - 1}")
    return {index % count for index in wanted}


def _layer_indices(layers: int | str | list[int], count: int) -> Sequence[int]:
    if isinstance(layers, int):
        return [layers]
    if isinstance(layers, list | tuple):
        return layers
    match = _LAYERS_PATTERN.fullmatch(layers)
    assert match is not None  # checked when the config was made
    if match["lo"]:
        lowest, highest = int(match["lo"]), int(match["hi"])
        return range(lowest, highest + 1) if highest < count else [highest]
    number = float(match["count"])
    size = max(1, round(count * number / 100)) if match["percent"] else int(number)
    if size > count:
        return [size - 1]
    return range(count - size, count) if match["end"] == "last" else range(size)


def _ratio_problems(ratios: Any) -> Iterator[str]:
    if ratios is None:
        return
    if not isinstance(ratios, dict):
        if not _is_fraction(ratios):
            yield f"ratios={ratios!r} is outside (0, 1]"
        return
    if not ratios:
        yield "ratios={} names no projection; choose from " + ", ".join(PROJECTIONS)
    for name, ratio in ratios.items():
        if name not in PROJECTIONS:
            yield f"ratios names the projection {name!r}, which is unknown; choose from {', '.join(PROJECTIONS)}"
        if not _is_fraction(ratio):
            yield f"ratios[{name!r}]={ratio!r} is outside (0, 1]"


def _strategy_problems(config: Any) -> Iterator[str]:
    if config.strategy == OWN and getattr(config, "slices", None) is None:
        yield f"strategy={OWN!r} is filled in by s2ft.select(model, config, batches, scores=...); use the config it returns"
    strategies = (OWN,) if config.strategy == OWN else tuple(STRATEGIES)
    for name, allowed in (("strategy", (None, *strategies)), ("subset", SUBSETS), ("allocation", ALLOCATIONS)):
        if getattr(config, name) not in allowed:
            yield f"{name}={getattr(config, name)!r} is unknown; choose from {', '.join(filter(None, allowed))}"


def _is_layers(value: Any) -> bool:
    if isinstance(value, str):
        match = _LAYERS_PATTERN.fullmatch(value)
        if match is None:
            return False
        if match["lo"]:
            return int(match["lo"]) <= int(match["hi"])
        number = float(match["count"])
        return 0 < number <= 100 if match["percent"] else number >= 1 and number.is_integer()
    if isinstance(value, list | tuple):
        return bool(value) and all(_is_integer(index) for index in value)
    return _is_integer(value)


def _is_fraction(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_list_of_text(value: Any) -> bool:
    return value is None or (isinstance(value, list | tuple | set) and all(isinstance(item, str) for item in value))
