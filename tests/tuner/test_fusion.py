"""Fusion on a live model: the same bits as in files, and a new adapter like any other."""

import copy
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

import s2ft
from families import build, tokens
from live import layers
from s2ft import S2FTConfig, S2FTError
from s2ft.layer.linear import S2FTLinear

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
