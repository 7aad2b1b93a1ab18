"""Blending deltas: against dense float64 sums and PEFT's own functions."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils.merge_utils import dare_linear, ties
from torch import Tensor

from s2ft.adapters.blending import blend
from s2ft.format.slices import Slice


def random_slice(side: str, size: int) -> Slice:
    count = int(torch.randint(1, size + 1, ()))
    return Slice(side, np.sort(torch.randperm(size)[:count].numpy()))


def random_delta(chosen: Slice, across: int, dtype: torch.dtype = torch.float32) -> Tensor:
    count = len(chosen.indices)
    return torch.randn((across, count) if chosen.side == "in" else (count, across)).to(dtype)


def dense(chosen: Slice, delta: Tensor, size: int) -> Tensor:
    """ΔW laid out whole, channels first."""
    rows = delta.T if chosen.side == "in" else delta
    return torch.zeros(size, rows.shape[1], dtype=torch.float64).index_copy_(
        0, torch.from_numpy(chosen.indices), rows.double()
    )


def union(*slices: Slice) -> Slice:
    return Slice(slices[0].side, np.unique(np.concatenate([chosen.indices for chosen in slices])))


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(["in", "out"]), st.integers(1, 9), st.integers(1, 7), st.integers(1, 4), st.integers(0, 2**31))
def test_a_sum_is_the_sum_of_the_dense_changes(side: str, size: int, across: int, adapters: int, seed: int) -> None:
    torch.manual_seed(seed)
    slices = [random_slice(side, size) for _ in range(adapters)]
    deltas = [random_delta(chosen, across) for chosen in slices]
    weights = torch.randn(adapters).tolist()
    whole = union(*slices)
    result = blend(whole, slices, deltas, weights, "sum", 1.0, "")
    expected = sum(w * dense(c, d, size) for w, c, d in zip(weights, slices, deltas, strict=True))
    torch.testing.assert_close(dense(whole, result, size), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["sum", "ties", "dare"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_channels_of_one_adapter_alone_are_exact_to_the_bit(method: str, dtype: torch.dtype) -> None:
    channels = torch.randperm(23)
    slices = [Slice("in", np.sort(channels[part].numpy())) for part in (slice(0, 9), slice(9, 14))]
    deltas = [random_delta(chosen, 6, dtype) for chosen in slices]
    deltas[0][0, 0] = -0.0
    whole = union(*slices)
    result = blend(whole, slices, deltas, [1.0, 1.0], method, 0.3, "")
    assert result.dtype == dtype
    for chosen, delta in zip(slices, deltas, strict=True):
        found = result[:, np.searchsorted(whole.indices, chosen.indices)]
        assert torch.equal(found.view(torch.uint8), delta.view(torch.uint8))  # -0.0 too


@pytest.mark.parametrize("side", ["in", "out"])
@pytest.mark.parametrize("density", [0.2, 0.7, 1.0])
def test_ties_on_shared_channels_is_pefts(side: str, density: float) -> None:
    a, b = Slice(side, np.array([1, 3, 4, 8])), Slice(side, np.array([0, 3, 4, 8, 9]))
    deltas, weights = [random_delta(a, 50), random_delta(b, 50)], [0.4, 1.3]
    result = blend(union(a, b), [a, b], deltas, weights, "ties", density, "")
    dim = 1 if side == "in" else 0
    shared = [
        deltas[0].index_select(dim, torch.tensor([1, 2, 3])),
        deltas[1].index_select(dim, torch.tensor([1, 2, 3])),
    ]
    expected = ties(shared, torch.tensor(weights), density)
    assert torch.equal(result.index_select(dim, torch.tensor([2, 3, 4])), expected)
    alone = torch.cat([weights[1] * deltas[1].select(dim, 0), weights[0] * deltas[0].select(dim, 0)])
    assert torch.equal(result.index_select(dim, torch.tensor([0, 1])).movedim(dim, 0).flatten(), alone)


def test_ties_settles_conflicts_and_sums_do_not() -> None:
    chosen = Slice("out", np.array([2]))
    deltas = [torch.tensor([[3.0, 1.0]]), torch.tensor([[-1.0, 1.0]]), torch.tensor([[1.0, 2.0]])]
    assert blend(chosen, [chosen] * 3, deltas, [1, 1, 1], "sum", 1.0, "").tolist() == [[3.0, 4.0]]
    assert blend(chosen, [chosen] * 3, deltas, [1, 1, 1], "ties", 1.0, "").tolist() == [[2.0, pytest.approx(4 / 3)]]


def test_a_holder_of_few_shared_channels_is_thinned_on_its_own_entries() -> None:
    slices = [Slice("in", np.array([0, 1])), Slice("in", np.array([0, 1])), Slice("in", np.array([1]))]
    deltas = [torch.zeros(100, 2), torch.zeros(100, 2), torch.randn(100, 1)]
    result = blend(slices[0], slices, deltas, [1, 1, 1], "ties", 0.3, "")
    assert int((result != 0).sum()) == 30


def test_dare_drops_by_its_seed_and_keeps_the_mean() -> None:
    chosen = Slice("in", np.arange(40))
    deltas = [torch.ones(500, 40), torch.ones(500, 40)]
    state = torch.get_rng_state()
    result = blend(chosen, [chosen] * 2, deltas, [0.5, 0.5], "dare", 0.25, "7 a")
    assert torch.equal(torch.get_rng_state(), state)  # the user's own draws are not disturbed
    assert sorted(result.unique().tolist()) == [0.0, 2.0, 4.0]  # none, one, both kept, each divided by the density
    assert float(result.mean()) == pytest.approx(1.0, abs=0.05)  # 7 standard errors
    assert torch.equal(result, blend(chosen, [chosen] * 2, deltas, [0.5, 0.5], "dare", 0.25, "7 a"))
    assert not torch.equal(result, blend(chosen, [chosen] * 2, deltas, [0.5, 0.5], "dare", 0.25, "8 a"))
    whole = blend(chosen, [chosen] * 2, deltas, [0.5, 0.5], "dare", 1.0, "7 a")
    assert torch.equal(whole, dare_linear(deltas, torch.tensor([0.5, 0.5]), 1.0))


def test_dtypes_are_promoted() -> None:
    chosen = Slice("in", np.array([1]))
    pairs = {
        (torch.bfloat16, torch.bfloat16): torch.bfloat16,
        (torch.bfloat16, torch.float16): torch.float32,
        (torch.float16, torch.float32): torch.float32,
        (torch.float32, torch.float64): torch.float64,
    }
    for dtypes, expected in pairs.items():
        deltas = [torch.randn(3, 1).to(dtype) for dtype in dtypes]
        result = blend(chosen, [chosen] * 2, deltas, [0.1, 0.7], "sum", 1.0, "")
        assert result.dtype == expected
        wide = torch.promote_types(expected, torch.float32)
        assert torch.equal(result, (deltas[0].to(wide) * 0.1 + deltas[1].to(wide) * 0.7).to(expected))
