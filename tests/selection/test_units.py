"""Where the channels of units lie in a layer, against plain loops over its rows."""

import numpy as np
import pytest
import torch

from s2ft.selection.units import Projection


def interleaved(groups: int, per: int, width: int) -> dict[str, Projection]:
    """q, k and v of a layer that holds each group's query heads, its key and its value together."""
    pitch = (per + 2) * width
    q = Projection("q_proj", "qkv", "out", groups * per, width, 0, ((groups, pitch), (per, width), (width, 1)))
    k = Projection("k_proj", "qkv", "out", groups, width, per * width, ((groups, pitch), (1, width), (width, 1)))
    v = Projection("v_proj", "qkv", "out", groups, width, (per + 1) * width, ((groups, pitch), (1, width), (width, 1)))
    return {"q": q, "k": k, "v": v}


@pytest.mark.parametrize(("groups", "per", "width"), [(3, 2, 5), (1, 4, 3), (4, 1, 2)])
def test_rows_that_lie_together_by_group(groups: int, per: int, width: int) -> None:
    rows = [
        (g, part) for g in range(groups) for part in [*(f"q{i}" for i in range(per)), "k", "v"] for _ in range(width)
    ]
    parts = interleaved(groups, per, width)
    for group in range(groups):
        for name in "kv":
            assert parts[name].grid[group].tolist() == [i for i, row in enumerate(rows) if row == (group, name)]
        for head in range(per):
            own = [i for i, row in enumerate(rows) if row == (group, f"q{head}")]
            assert parts["q"].grid[group * per + head].tolist() == own
    assert sorted(np.concatenate([p.grid.ravel() for p in parts.values()])) == list(range(len(rows)))


def test_pairs_of_heads_have_two_pieces() -> None:
    pairs = Projection("q_proj", "q", "out", units=3, width=4, axes=((3, 2), (2, 6), (2, 1)))
    assert pairs.grid.tolist() == [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11]]


@pytest.mark.parametrize("name", ["q", "k", "v", "plain"])
def test_channels_and_units_lead_to_each_other(name: str) -> None:
    projection = {**interleaved(3, 2, 5), "plain": Projection("up_proj", "up", "out", 7, 3, offset=4)}[name]
    units = np.flatnonzero(np.random.default_rng(int(torch.randint(99, ()))).random(projection.units) < 0.5)
    channels = projection.channels_of(units)
    assert projection.units_of(channels).tolist() == units.tolist()
    for unit in units:
        assert unit in projection.units_of(projection.grid[unit][:1])
    weight = torch.randn(90, 2)
    assert torch.equal(weight[projection.channels], weight[torch.from_numpy(projection.grid.ravel())])
    outside = np.setdiff1d(np.arange(90), projection.grid)
    assert not len(projection.units_of(outside))
