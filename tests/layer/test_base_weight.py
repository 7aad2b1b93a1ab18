"""The one sum and the one stash of base weights: how they round, and that every way of writing is the same."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from s2ft.format.slices import Slice
from s2ft.layer import base_weight
from s2ft.layer.base_weight import BaseWeight
from s2ft.layer.columns import add_delta
from s2ft.layer.linear import S2FTLinear

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("base_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("delta_dtype", DTYPES, ids=str)
def test_sums_are_computed_in_float32_at_least_and_rounded_once(
    base_dtype: torch.dtype, delta_dtype: torch.dtype
) -> None:
    base, delta = torch.randn(10_000).to(base_dtype), (0.01 * torch.randn(10_000)).to(delta_dtype)
    exact = torch.float64 if torch.float64 in (base_dtype, delta_dtype) else torch.float32
    assert torch.equal(add_delta(base, delta), (base.to(exact) + delta.to(exact)).to(base_dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("part", [1, 70, 10_000], ids=["row by row", "in parts", "at once"])  # bytes
@pytest.mark.parametrize(
    ("channels", "start"),
    [([2, 3, 4, 5], 2), ([4, 2, 5, 3], 2), ([7, 1, 4, 0], None)],
    ids=["side by side", "in another order", "apart"],
)
def test_a_stash_writes_the_same_wherever_its_channels_lie(
    dtype: torch.dtype, dim: int, channels: list[int], start: int | None, part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("s2ft.layer.base_weight._PART", part)
    linear = nn.Linear(8, 9, bias=False, dtype=dtype).requires_grad_(False)
    own, at = linear.weight.clone(), torch.tensor(channels)
    delta = torch.randn_like(own.index_select(dim, at), dtype=torch.float32)
    held = BaseWeight()
    stash = held.set_aside(linear.weight.data, dim, at)
    stash.find_start()
    assert stash.start == start
    for scale in (1, -3):  # anew, not on top
        stash.write(linear.weight.data, scale * delta)
        expected = own.index_copy(dim, at, add_delta(own.index_select(dim, at), scale * delta))
        assert torch.equal(linear.weight, expected)
    activations = torch.randn(2, 3, own.shape[dim])
    for copy in (False, True):
        picked = stash.pick(activations, copy)
        assert torch.equal(picked, activations[..., at])
    assert picked.untyped_storage().nbytes() == 2 * 3 * 4 * 4
    held.restore(linear)
    assert torch.equal(linear.weight, own)
    assert held.is_own


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("entries", [1, 8, 1 << 15], ids=["row by row", "in parts", "at once"])
def test_a_slice_is_added_in_parts_as_at_once(
    dtype: torch.dtype, entries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("s2ft.layer.base_weight._ENTRIES", entries)
    linear = nn.Linear(8, 9, bias=False, dtype=dtype).requires_grad_(False)
    own, at = linear.weight.clone(), torch.tensor([1, 4, 6])
    layer = S2FTLinear(linear, "a", Slice("in", at.numpy()), init_weights=False)
    block = layer.block("a")
    layer.base_weight.put(linear, block)
    expected = own.index_copy(1, at, add_delta(own.index_select(1, at), block.weight))
    assert torch.equal(linear.weight, expected)
    layer.base_weight.put(linear, block)  # on top
    layer.base_weight.restore(linear)
    assert torch.equal(linear.weight, own)


@pytest.mark.parametrize("calls", [0, 1, 3])
@pytest.mark.parametrize("name", ["take_columns", "add_delta", "put_slice"])
def test_what_fails_among_the_parts_leaves_the_base(calls: int, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("s2ft.layer.base_weight._ENTRIES", 3)
    linear = nn.Linear(8, 9, bias=False).requires_grad_(False)
    own = linear.weight.clone()
    layer = S2FTLinear(linear, "a", Slice("in", np.array([1, 4, 6])), init_weights=False)
    real, left = getattr(base_weight, name), [calls]

    def fail_later(*given: Any) -> Any:
        if left[0] == 0:
            monkeypatch.setattr(base_weight, name, real)  # restoring works
            raise MemoryError
        left[0] -= 1
        return real(*given)

    monkeypatch.setattr(base_weight, name, fail_later)
    with pytest.raises(MemoryError):
        layer.base_weight.hold(linear, {"a": layer.block("a")})
    assert torch.equal(linear.weight, own)
    assert layer.base_weight.is_own
