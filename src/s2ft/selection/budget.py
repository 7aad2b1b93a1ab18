"""How many units each layer trains.

    ratio r of a projection   →  round(r · all its units), shared by its layers
    budget b of the model     →  r = b · parameters reached / number of targets / parameters of the projection,
                                 but at least a head of attention in every block, if a tenth is left for the rest

Parameters that no slice can be taken from do not count (`selection/coverage.py`). A target that only some blocks have (one
attention in eight blocks of a hybrid) counts by as many as have it. Stacked experts and the rest of the model each have a
budget of their own, the same share of each: where nearly all parameters are the experts', 1% of the whole would be most of
the attention. Each expert is a layer here: it trains as many channels as any other.

The paper gives every layer the same share. A share of 1.66 heads a layer is kept by rounding its running total (2, 1,
2, 2, 1, ...), which spends the budget exactly and leaves no layer out as one draw over the model would.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from decimal import ROUND_CEILING, Decimal
from functools import partial

import numpy as np
from torch import nn

from s2ft.common.errors import S2FTError, raise_together
from s2ft.format.config import S2FTConfig
from s2ft.format.terms import DEFAULT_BUDGET
from s2ft.layer.linears import features, layer_stack
from s2ft.layer.stacked import linear_at
from s2ft.selection.coverage import Coverage
from s2ft.selection.targets import by_projection
from s2ft.selection.units import EXPERTS, Projection, Target

RatiosOf = Callable[[S2FTConfig], Mapping[str, float]]  # projection → ratio
_ROUNDING = 1e-6  # units; what was a whole number before it was a share of parameters
REST = 0.1  # the least share of a budget that is left for what has a head in every block without help


def count_units(
    targets: Sequence[Target], config: S2FTConfig, model: nn.Module, covered: Coverage
) -> dict[str, list[int]]:
    """Projection → how many units each of its layers trains, in the order of `targets`.

    Args:
        covered: Of the model: a budget is a share of what is reached.
    """
    shares: dict[tuple[str, bool], list[int]] = {}
    problems = []
    for among, reached in ((False, covered.beside_experts), (True, covered.experts)):
        by_name = by_projection([target for target in targets if is_expert(target) == among])
        ratios_of = partial(_ratios, by_name, model=model, reached=reached)
        ratios = ratios_of(config)
        for name, group in by_name.items():
            units = [p.units for _, p in group]
            with_one = config.ratios is None and group[0][0].kind == "attention"
            shares[name, among] = spread(shared(ratios[name] * sum(units), units, with_one))
            if not sum(shares[name, among]):
                problems.append(_rounds_to_zero(name, ratios[name], sum(units), config, ratios_of))
    raise_together(problems)
    rest = {key: iter(counts) for key, counts in shares.items()}
    return {
        name: [next(rest[name, is_expert(target)]) for target in group]
        for name, group in by_projection(targets).items()
    }


def is_expert(target: Target) -> bool:
    """Whether a target is a projection of a stacked expert."""
    return target[0].kind == EXPERTS


def shared(total: float, units: Sequence[int], with_one: bool) -> list[float]:
    """Each layer's share of `total` units: as large as its own are of all.

    Args:
        total: Units to train, at most the sum of `units`.
        units: That each layer has.
        with_one: Where the total suffices, no share is below one: layers with few heads lose none to those with many.

    Example:
        >>> shared(11.0, [2, 20], with_one=True), shared(3.0, [2, 20], with_one=True)
        ([1.0, 10.0], [1.05, 1.95])
    """
    ratio, layers = total / sum(units), len(units)
    if not with_one or total < layers - _ROUNDING or ratio * min(units) >= 1:
        return [ratio * own for own in units]
    return [1 + (total - layers) * (own - 1) / (sum(units) - layers) for own in units]


def spread(shares: Sequence[float]) -> list[int]:
    """Whole numbers next to `shares` whose running total never strays from that of `shares` by more than a half.

    Example:
        >>> spread([1.6, 1.6, 1.6, 1.6, 1.6])
        [2, 1, 2, 1, 2]
    """
    totals = np.floor(np.cumsum(shares) + 0.5 + 1e-9).astype(int)  # the small term: 0.1 + 0.2 must not lose to 0.3
    return [int(count) for count in np.diff(totals, prepend=0)]


def trained_in_words(targets: Sequence[Target], counts: Mapping[str, Sequence[int]]) -> str:
    """Which share of which projections is trained.

    Example:
        >>> from s2ft.selection.units import Projection, Structure
        >>> down = Projection("down_proj", "layers.0.mlp.down_proj", "in", 200, 1)
        >>> trained_in_words([(Structure("mlp", "layers.0.mlp", 0, 200, (down,)), down)], {"down_proj": [5]})
        'down_proj: 5 of 200 channels (2.5%) of 1 layer'
    """
    parts = []
    for name, group in by_projection(targets).items():
        counted = list(zip(group, counts[name], strict=True))
        for among in (False, True):
            some = [(target, count) for target, count in counted if is_expert(target) == among]
            if some:
                parts.append(_part_in_words(name, *zip(*some, strict=True)))
    return "; ".join(parts)


def _part_in_words(name: str, group: Sequence[Target], counts: Sequence[int]) -> str:
    chosen, units = sum(counts), sum(p.units for _, p in group)
    structure, projection = group[0]
    is_head = structure.kind == "attention"
    unit = "channels" if not is_head else "heads" if projection.units == structure.units else "groups"
    layers = _several(len({p.module for _, p in group}), "layer")
    place = f"{_several(len(group), 'expert')} in {layers}" if is_expert(group[0]) else layers
    return f"{name}: {chosen:,} of {units:,} {unit} ({100 * chosen / units:.3g}%) of {place}"


def _several(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' if count > 1 else ''}"


def _ratios(
    by_name: Mapping[str, list[Target]], config: S2FTConfig, *, model: nn.Module, reached: int
) -> dict[str, float]:
    if isinstance(config.ratios, dict):
        return {name: config.ratios[name] for name in by_name}
    if config.ratios is not None:
        return dict.fromkeys(by_name, config.ratios)
    budget = DEFAULT_BUDGET if config.budget is None else config.budget
    blocks = {name: len({layer_stack(p.module) or p.module for _, p in group}) for name, group in by_name.items()}
    shares = {name: budget * reached * count / sum(blocks.values()) for name, count in blocks.items()}
    modules = {p.module: p for group in by_name.values() for _, p in group}
    across = {path: _across(model, p) for path, p in modules.items()}
    sizes = {name: sum(p.units * p.width * across[p.module] for _, p in group) for name, group in by_name.items()}
    over = [name for name, size in sizes.items() if shares[name] > size]
    raise_together(
        f"budget={budget!r} gives {name} {shares[name]:.0f} parameters to train, but it has {sizes[name]}; "
        f"lower the budget or target more projections"
        for name in over
    )
    heads = {
        name: sum(p.width * across[p.module] for _, p in group)
        for name, group in by_name.items()
        if group[0][0].kind == "attention"
    }
    return {name: share / sizes[name] for name, share in _with_a_head(shares, heads).items()}


def _with_a_head(shares: dict[str, float], heads: Mapping[str, float]) -> dict[str, float]:
    """Shares of a budget that leave no block without a head: a small model has few and large ones (docs/choosing.md).

    Args:
        shares: Projection → parameters.
        heads: Projection of attention → parameters of one head in each of its layers.

    Example:
        >>> _with_a_head({"o_proj": 50.0, "down_proj": 50.0}, {"o_proj": 80.0})
        {'o_proj': 80.0, 'down_proj': 20.0}
        >>> _with_a_head({"o_proj": 50.0, "down_proj": 50.0}, {"o_proj": 95.0})
        {'o_proj': 50.0, 'down_proj': 50.0}
    """
    raised = {name: max(share, heads.get(name, 0.0)) for name, share in shares.items()}
    rest = [name for name, share in shares.items() if raised[name] == share]
    left = sum(shares.values()) - sum(raised[name] for name in shares if name not in rest)
    if left < REST * sum(shares.values()):
        return shares
    given = sum(shares[name] for name in rest)
    found = {name: share * left / given if name in rest else raised[name] for name, share in shares.items()}
    return found if found == shares else _with_a_head(found, heads)


def _across(model: nn.Module, projection: Projection) -> int:
    """The features of the other side of a projection's layer."""
    layer = linear_at(model, projection.module)
    assert layer is not None
    return features(layer)[1 if projection.side == "in" else 0]


def _rounds_to_zero(name: str, ratio: float, units: int, config: S2FTConfig, ratios_of: RatiosOf) -> str:
    """Names what was given, and the least of it that trains one unit: a number that works when it is given."""
    what = f"of the {units} units of {name} rounds to zero"
    least = 0.5 / units  # the ratio at which the running total rounds to one
    if config.ratios is not None:
        return f"ratio {ratio!r} {what}; the smallest ratio that trains one is {round_up(least)!r}"
    budget = DEFAULT_BUDGET if config.budget is None else config.budget
    found = round_up(budget * least / ratio)
    if _gives(found, name, least, config, ratios_of):
        return f"budget={budget!r} {what}; the smallest budget that trains one is {found!r}"
    return f"budget={budget!r} {what}, and {found!r} is not right for all projections; give ratios, or target others"


def _gives(budget: float, name: str, ratio: float, config: S2FTConfig, ratios_of: RatiosOf) -> bool:
    """Whether the budget gives the projection this ratio at least, and none more than it has."""
    try:
        return budget <= 1 and ratios_of(replace(config, budget=budget))[name] >= ratio
    except S2FTError:
        return False


def round_up(value: float) -> float:
    """`value` or slightly more, in three digits.

    Example:
        >>> round_up(0.010460), round_up(1 / 24)
        (0.0105, 0.0417)
    """
    exact = Decimal(value)
    return float(exact.quantize(Decimal(1).scaleb(exact.adjusted() - 2), rounding=ROUND_CEILING))
