"""Co-permutation: an order of heads or channels in which the chosen ones are contiguous.

    order[position] = unit          chosen {5, 7} of 8:   5 7 2 3 4 0 6 1

Both sides of a coupled structure get the same order, so the output stays the same (S²FT paper, §3.1). Only units that are in
the way change places: at most as many as are chosen, whatever the size of the layer. Under grouped-query attention a query
head cannot leave its group: groups change places as a whole, and heads within their group. The chosen heads can then be
contiguous if at most two groups are chosen in part.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import permutations

import numpy as np

from s2ft.format.slices import Indices, Slice
from s2ft.selection.units import Projection, Structure

UnitSets = list[set[int]]  # for each projection: its chosen units
_MOST_CLASSES = 5  # up to so many, all their orders are tried: 120


def copermutation(
    structure: Structure,
    slices: Mapping[str, Slice],  # module path → trained slice
) -> Indices:  # [units]: position → head or channel
    """The order that makes the most chosen channels of the structure contiguous; the identity if nothing is chosen.

    Example:
        >>> from s2ft.selection.units import Projection
        >>> mlp = Structure("mlp", "mlp", 0, 8, (Projection("down_proj", "mlp.down", "in", 8, 1),))
        >>> copermutation(mlp, {"mlp.down": Slice("in", np.array([5, 7]))}).tolist()
        [5, 7, 2, 3, 4, 0, 6, 1]
    """
    shared = structure.groups < structure.units
    whole = [units for p in structure.projections if (units := chosen_units(p, slices)) and p.units == structure.units]
    by_group = [
        units for p in structure.projections if (units := chosen_units(p, slices)) and p.units != structure.units
    ]
    candidates = (
        _grouped_orders(structure.units, structure.groups, whole, by_group)
        if shared
        else _orders(structure.units, whole)
    )
    per = structure.units // structure.groups
    return max(candidates, key=lambda order: _side_by_side(order, whole) + _side_by_side(order[::per] // per, by_group))


def chosen_units(projection: Projection, slices: Mapping[str, Slice]) -> set[int]:
    """The projection's heads or channels that are in the slice of its module."""
    trained = slices.get(projection.module)
    if trained is None or trained.side != projection.side:
        return set()
    return set(projection.units_of(trained.indices).tolist())


def channel_order(
    projection: Projection,
    order: Indices,  # [units of the structure]
) -> Indices:  # [units * width]: position in the projection's grid → the channel of its module that goes there
    """The order of the projection's channels, given that of its structure's units."""
    per = len(order) // projection.units
    units = order if per == 1 else order[::per] // per
    return projection.channels_of(units)


def _orders(count: int, unit_sets: UnitSets) -> Iterator[Indices]:
    """Candidates: units that the same projections chose stay together, as a class; the classes come in every order."""
    classes: dict[tuple[bool, ...], list[int]] = {}
    for unit in sorted(set().union(*unit_sets)):
        classes.setdefault(tuple(unit in units for units in unit_sets), []).append(unit)
    by_use = sorted(classes.values(), key=lambda units: -sum(units[0] in other for other in unit_sets))
    tried = permutations(by_use) if len(by_use) <= _MOST_CLASSES else [by_use]
    for arrangement in tried:
        yield _to_front(count, [unit for units in arrangement for unit in units])


def _grouped_orders(count: int, groups: int, heads: UnitSets, by_group: UnitSets) -> Iterator[Indices]:
    """Candidates, one for each projection: its heads come first."""
    per = count // groups
    for leading in heads or [set()]:
        held = {group: sorted(head % per for head in leading if head // per == group) for group in range(groups)}
        partial = [group for group in held if 0 < len(held[group]) < per]
        full = [group for group in held if len(held[group]) == per]
        first = [*partial[:1], *full, *partial[1:]]
        others = sorted(set().union(*by_group) - set(first), key=lambda g: -sum(g in units for units in by_group))
        group_order = _to_front(groups, [*first, *others])
        inside = [_to_front(per, held[g], at_end=len(first) > 1 and g == first[0]) for g in group_order]
        yield np.concatenate([g * per + order for g, order in zip(group_order, inside, strict=True)])


def _to_front(count: int, wanted: Sequence[int], at_end: bool = False) -> Indices:
    """The order in which `wanted` come first (or last), and only units in their way have moved."""
    order = np.arange(count)
    start = count - len(wanted) if at_end else 0
    places = range(start, start + len(wanted))
    kept = set(wanted)
    displaced = [place for place in places if place not in kept]
    vacated = [unit for unit in sorted(kept) if unit not in places]
    order[vacated] = displaced
    order[start : start + len(wanted)] = wanted
    return order


def _side_by_side(order: Indices, unit_sets: UnitSets) -> int:
    """How many chosen units are in projections whose chosen units are all contiguous."""
    position = np.argsort(order)
    spread = [position[list(units)] for units in unit_sets]
    return sum(len(places) for places in spread if places.max() - places.min() + 1 == len(places))
