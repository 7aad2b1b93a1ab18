"""Co-permutation on random structures and choices: permutations, groups kept together, chosen units side by side."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from s2ft.format.slices import Slice
from s2ft.selection.units import Projection, Structure
from s2ft.training.ordering import channel_order, chosen_units, copermutation


def mlp(channels: int) -> Structure:
    projections = (
        Projection("gate_proj", "mlp.gate_proj", "out", channels, 1),
        Projection("up_proj", "mlp.up_proj", "out", channels, 1),
        Projection("down_proj", "mlp.down_proj", "in", channels, 1),
    )
    return Structure("mlp", "mlp", 0, channels, projections)


def attention(groups: int, per: int, width: int) -> Structure:
    heads = groups * per
    sizes = {"q_proj": heads, "k_proj": groups, "v_proj": groups}
    projections = [Projection(name, f"attn.{name}", "out", units, width) for name, units in sizes.items()]
    projections.append(Projection("o_proj", "attn.o_proj", "in", heads, width))
    return Structure("attention", "attn", 0, heads, tuple(projections))


def chosen_slice(projection: Projection, units: set[int]) -> Slice:
    channels = [
        projection.offset + unit * projection.width + i for unit in sorted(units) for i in range(projection.width)
    ]
    return Slice(projection.side, np.array(channels, dtype=np.int64))


def side_by_side(structure: Structure, order: np.ndarray, projection: Projection, slices: dict[str, Slice]) -> bool:
    position = np.argsort(channel_order(projection, order))
    places = position[slices[projection.module].indices]
    return bool(places.max() - places.min() + 1 == len(places))


@given(st.data(), st.integers(1, 24))
def test_nested_choices_of_channels_are_all_side_by_side(data: st.DataObject, channels: int) -> None:
    structure = mlp(channels)
    ranking = data.draw(st.permutations(range(channels)))
    counts = {p.name: data.draw(st.integers(1, channels)) for p in structure.projections}
    slices = {p.module: chosen_slice(p, set(ranking[: counts[p.name]])) for p in structure.projections}
    order = copermutation(structure, slices)
    assert sorted(order) == list(range(channels))
    assert all(side_by_side(structure, order, p, slices) for p in structure.projections)
    assert (order != np.arange(channels)).sum() <= 2 * max(counts.values())


@given(st.data(), st.integers(2, 12))
def test_two_overlapping_choices_are_side_by_side(data: st.DataObject, channels: int) -> None:
    structure = mlp(channels)
    units = st.sets(st.integers(0, channels - 1), min_size=1)
    slices = {
        structure[name].module: chosen_slice(structure[name], data.draw(units)) for name in ("up_proj", "down_proj")
    }
    order = copermutation(structure, slices)
    assert all(side_by_side(structure, order, structure[name], slices) for name in ("up_proj", "down_proj"))


@given(st.data(), st.integers(1, 5), st.integers(2, 4), st.integers(1, 3))
def test_query_heads_stay_in_their_group_and_meet_if_two_groups_at_most_are_partial(
    data: st.DataObject, groups: int, per: int, width: int
) -> None:
    structure = attention(groups, per, width)
    heads = data.draw(st.sets(st.integers(0, groups * per - 1), min_size=1))
    slices = {"attn.o_proj": chosen_slice(structure["o_proj"], heads)}
    order = copermutation(structure, slices)
    assert sorted(order) == list(range(groups * per))
    by_group = order.reshape(groups, per) // per
    assert (by_group == by_group[:, :1]).all()
    counts = [sum(head // per == group for head in heads) for group in range(groups)]
    partial = sum(0 < count < per for count in counts)
    assert side_by_side(structure, order, structure["o_proj"], slices) == (partial <= 2)


@given(st.data(), st.integers(1, 5), st.integers(2, 4))
def test_chosen_groups_lie_side_by_side_with_the_heads_chosen_in_them(
    data: st.DataObject, groups: int, per: int
) -> None:
    structure = attention(groups, per, 2)
    ranking = data.draw(st.permutations(range(groups)))
    count = data.draw(st.integers(1, groups))
    heads = {group * per + head for group in ranking[:count] for head in range(per)}
    slices = {"attn.k_proj": chosen_slice(structure["k_proj"], set(ranking[:count]))}
    slices["attn.q_proj"] = chosen_slice(structure["q_proj"], heads)
    order = copermutation(structure, slices)
    assert side_by_side(structure, order, structure["k_proj"], slices)
    assert side_by_side(structure, order, structure["q_proj"], slices)


def test_a_slice_on_the_other_side_chooses_no_units() -> None:
    structure = mlp(4)
    assert chosen_units(structure["up_proj"], {"mlp.up_proj": Slice("in", np.array([1]))}) == set()
    assert (copermutation(structure, {}) == np.arange(4)).all()
