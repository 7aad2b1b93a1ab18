"""Combining deltas: against dense float64 sums and PEFT's own functions, on files' slices and on live models."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from peft.utils.merge_utils import dare_linear, ties
from torch import Tensor, nn

import s2ft
from families import build, tokens
from live import layers
from s2ft import S2FTConfig, S2FTError
from s2ft.adapters.combination import blend
from s2ft.format.slices import Slice
from s2ft.layer.linear import S2FTLinear


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


RATIOS = {"o_proj": 0.5, "v_proj": 0.5, "down_proj": 0.3}


@pytest.fixture
def two(tmp_path: Path) -> tuple[nn.Module, Path]:
    """Two adapters that overlap, on files, and their base."""
    base = build("llama", torch.float32)
    for seed, name in enumerate("ab"):
        config = S2FTConfig(ratios=RATIOS if seed else {"o_proj": 0.5, "down_proj": 0.4}, init_weights=False, seed=seed)
        get_peft_model(copy.deepcopy(base), config).save_pretrained(tmp_path / name)
    return base, tmp_path


def live(base: nn.Module, folder: Path) -> PeftModel:
    model = PeftModel.from_pretrained(copy.deepcopy(base), folder / "a", adapter_name="a")
    model.load_adapter(str(folder / "b"), adapter_name="b")
    return model


def blocks(model: nn.Module, name: str) -> dict[str, nn.Module]:
    return {
        path: layer.s2ft_block[name]
        for path, layer in model.named_modules()
        if isinstance(layer, S2FTLinear) and name in layer.s2ft_block
    }


@pytest.mark.parametrize("method", ["sum", "ties", "dare"])
def test_a_live_model_and_files_give_the_same_bits(two: tuple[nn.Module, Path], method: str) -> None:
    base, folder = two
    model = live(base, folder)
    model.add_weighted_adapter(["a", "b"], [0.3, -1.7], "ab", combination_type=method, density=0.4, seed=3)
    s2ft.fuse([folder / "a", folder / "b"], [0.3, -1.7], method, 0.4, 3, output=folder / "ab")
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), folder / "ab")
    ours, theirs = blocks(model, "ab"), blocks(loaded, "default")
    assert ours.keys() == theirs.keys()
    for path, block in ours.items():
        assert torch.equal(block.weight, theirs[path].weight), path
        assert torch.equal(block.indices, theirs[path].indices), path
    x = tokens(2, 5)
    model.set_adapter("ab")
    assert torch.equal(model(x).logits, loaded(x).logits)


def test_a_new_adapter_is_usable_savable_and_mergeable(two: tuple[nn.Module, Path]) -> None:
    base, folder = two
    model, x = live(base, folder), tokens(2, 6)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    alone = model(x).logits
    model.add_weighted_adapter(["a", "b"], [1.0, 0.5], "ab")
    assert model.active_adapters == ["a"]
    assert torch.equal(model(x).logits, alone)
    after = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert {name: after[name] for name in before} == before
    assert not any(after[name] for name in after.keys() - before.keys())
    model.set_adapter("ab")
    fused = model(x).logits
    rows = model(x, adapter_names=["ab", "a"]).logits
    torch.testing.assert_close(rows, torch.stack([fused[0], alone[1]]))
    model.save_pretrained(folder / "saved", selected_adapters=["ab"])
    again = PeftModel.from_pretrained(copy.deepcopy(base), folder / "saved" / "ab")
    assert torch.equal(again(x).logits, fused)
    torch.testing.assert_close(model.merge_and_unload()(x).logits, fused, rtol=1e-4, atol=1e-5)


def test_a_sum_changes_the_weights_by_the_sum(two: tuple[nn.Module, Path]) -> None:
    base, folder = two
    model = live(base, folder)
    model.add_weighted_adapter(["a", "b"], [0.25, 2.0], "ab")
    for layer in layers(model):
        expected = sum(
            weight * layer.get_delta_weight(name).double()
            for name, weight in (("a", 0.25), ("b", 2.0))
            if name in layer.s2ft_block
        )
        torch.testing.assert_close(layer.get_delta_weight("ab").double(), expected, rtol=1e-6, atol=1e-8)


def test_whole_modules_that_agree_are_kept() -> None:
    model = get_peft_model(
        build("llama", torch.float32), S2FTConfig(ratios=0.3, modules_to_save=["lm_head"], init_weights=False)
    )
    model.add_adapter("b", S2FTConfig(ratios=0.3, modules_to_save=["lm_head"], init_weights=False, seed=1))
    with torch.no_grad():
        for name in ("default", "b"):
            model.base_model.model.lm_head.modules_to_save[name].weight.fill_(0.5)
    model.add_weighted_adapter(["default", "b"], [1.0, 1.0], "ab")
    assert bool((model.base_model.model.lm_head.modules_to_save["ab"].weight == 0.5).all())
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["b"].weight[3, 4] = 0.25
    with pytest.raises(S2FTError, match=r"lm_head.*is kept whole by default and b, and differs"):
        model.add_weighted_adapter(["default", "b"], [1.0, 1.0], "other")


def nan(model: PeftModel) -> None:
    next(iter(blocks(model, "b").values())).weight.data.view(-1)[0] = torch.nan


BAD_CALLS = {
    r"adapter 'c' is not loaded; loaded are 'a', 'b'": {"adapters": ["a", "c"]},
    r"adapter_name='b' is taken": {"adapter_name": "b"},
    r"adapter_name='../x' is no name": {"adapter_name": "../x"},
    r"adapter_name='x.y' is no name": {"adapter_name": "x.y"},
    r"adapters='ab' is one name": {"adapters": "ab"},
    r"no adapters are given": {"adapters": [], "weights": None},
    r"3 weights \(1, 2, 3\) are given for 2 adapters": {"weights": [1, 2, 3]},
    r"weight inf is not a finite number": {"weights": [1.0, float("inf")]},
    r"method='linear' is unknown; choose from sum, ties, dare": {"combination_type": "linear"},
    r"density=1.5 is outside \(0, 1\]": {"density": 1.5},
    r"seed=-1 is not an integer": {"seed": -1},
    r"adapter 'b': the delta of .* not finite": {"before": nan},
    r"too large for torch.float32": {"weights": [1.0, 1e300]},
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_bad_calls_leave_the_model_alone(two: tuple[nn.Module, Path], message: str) -> None:
    model = live(*two)
    call = {"adapters": ["a", "b"], "weights": [1.0, 1.0], "adapter_name": "ab", **BAD_CALLS[message]}
    call.pop("before", lambda _: None)(model)
    names = [name for name, _ in model.named_parameters()]
    with pytest.raises(S2FTError, match=message):
        model.add_weighted_adapter(**call)
    assert [name for name, _ in model.named_parameters()] == names
    assert list(model.peft_config) == ["a", "b"]


def test_a_failure_while_adding_takes_the_config_back(
    two: tuple[nn.Module, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = live(*two)
    monkeypatch.setattr(S2FTLinear, "update_layer", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("no memory")))
    with pytest.raises(RuntimeError, match="no memory"):
        model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "ab")
    assert list(model.peft_config) == ["a", "b"]
