"""A live model on a quantised base, by each library that is installed, against its dequantised twin."""

from collections.abc import Callable

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import s2ft
from families import VOCABULARY, tokens
from live import layers, logits
from quantised import QUANTISED
from s2ft import S2FTConfig, S2FTError
from s2ft.format.terms import PROJECTIONS
from s2ft.layer.dequantise import quantised_layers, values_of
from s2ft.layer.linears import is_plain

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
ALL = {name: 0.3 for name in PROJECTIONS if name != "out_proj"}


def plain() -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, num_hidden_layers=2, **SIZES))


def twins(kind: str) -> tuple[nn.Module, nn.Module]:
    """A quantised model, and a plain one with the values that it stands for."""
    quantised, twin = plain(), plain()
    twin.load_state_dict(quantised.state_dict())
    QUANTISED[kind](quantised)
    for path, layer in quantised_layers(quantised).items():
        twin.get_submodule(path).weight.data = values_of(layer).float()
    return quantised.train(), twin.train()


def adapted(base: nn.Module, **options: object) -> PeftModel:
    torch.manual_seed(5)
    return get_peft_model(base, S2FTConfig(**{"ratios": ALL, "seed": 0, "init_weights": False, **options}))


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    ids = tokens(2, 7)
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("kind", QUANTISED)
def test_every_slice_has_the_gradient_of_the_dequantised_model(kind: str) -> None:
    base, twin = twins(kind)
    found, expected = gradients(adapted(base)), gradients(adapted(twin))
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(
            found[name], gradient, rtol=1e-4, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("kind", QUANTISED)
def test_switching_and_merging_add_beside_the_weight_and_are_undone_exactly(kind: str) -> None:
    made, ids = adapted(twins(kind)[0]).eval(), tokens(2, 7)
    made.add_adapter("b", S2FTConfig(ratios={"down_proj": 0.5}, seed=1, init_weights=False))
    outputs = {}
    for name in ("default", "b"):
        made.set_adapter(name)
        outputs[name] = logits(made, ids)
    with made.disable_adapter():
        own = logits(made, ids)
    for name in ("b", "default", None):
        s2ft.switch(made, name)
        assert torch.equal(logits(made, ids), own if name is None else outputs[name])
    made.set_adapter("b")
    made.merge_adapter(["default"], safe_merge=True)
    assert torch.equal(logits(made, ids), outputs["default"])
    with made.disable_adapter():
        assert torch.equal(logits(made, ids), own)
    made.merge_adapter(["b"])
    both = logits(made, ids)
    made.unmerge_adapter()
    assert torch.equal(logits(made, ids), outputs["b"])
    made.base_model.set_adapter(["default", "b"])
    torch.testing.assert_close(logits(made, ids), both)
    assert layers(made)[0].get_delta_weight("default").shape == (64, 64)


@pytest.mark.parametrize("kind", QUANTISED)
def test_merging_for_good_leaves_a_plain_model_of_the_dequantised_values(kind: str) -> None:
    base, twin = twins(kind)
    base.config.quantization_config, base.is_loaded_in_4bit = {"quant_method": "some"}, True
    ids = tokens(2, 7)
    merged, expected = adapted(base).eval().merge_and_unload(), adapted(twin).eval().merge_and_unload()
    assert not hasattr(merged.config, "quantization_config")
    assert not hasattr(merged, "is_loaded_in_4bit")
    assert all(is_plain(m) for m in merged.modules() if isinstance(m, nn.Linear))
    for (name, value), other in zip(merged.state_dict().items(), expected.state_dict().values(), strict=True):
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, other, rtol=1e-6, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}")
    torch.testing.assert_close(logits(merged, ids), logits(expected, ids), rtol=1e-5, atol=1e-5)


def lone(made: PeftModel) -> dict[str, object]:
    made.add_adapter("b", S2FTConfig(ratios=ALL, seed=0, init_weights=False))
    return {"adapter_names": "b"}


def broken(made: PeftModel) -> dict[str, object]:
    layers(made)[-1].block("default").weight.data[0, 0] = torch.nan
    return {"safe_merge": True}


def too_large_together(made: PeftModel) -> dict[str, object]:
    made.add_adapter("b", S2FTConfig(ratios=ALL, seed=0, init_weights=False))
    for name in ("default", "b"):
        layers(made)[-1].block(name).weight.data[0, 0] = 3e38
    return {"safe_merge": True, "adapter_names": ["default", "b"]}


def unreadable(made: PeftModel) -> dict[str, object]:
    layers(made)[-1].get_base_layer().weight = nn.Parameter(torch.zeros(3, dtype=torch.uint8), requires_grad=False)
    return {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lone, "adapter_names='b' is one name; give a list of names"),
        (broken, "NaNs detected"),
        (too_large_together, "NaNs detected"),
        (unreadable, r"down_proj.*base_layer: the weight .*, and cannot be read"),
    ],
)
def test_a_merge_for_good_that_is_refused_leaves_the_model_quantised(
    change: Callable[[PeftModel], dict[str, object]], message: str
) -> None:
    made = adapted(twins("stand-in")[0]).eval()
    options = change(made)
    before = [id(module) for module in made.modules()]
    with pytest.raises(S2FTError, match=message):
        made.merge_and_unload(**options)
    assert [id(module) for module in made.modules()] == before
    assert not any(layer.merged_adapters for layer in layers(made))


@pytest.mark.parametrize("strategy", ["weight", "lift", "product", "gradient"])
@pytest.mark.parametrize("kind", QUANTISED)
def test_scores_are_those_of_the_dequantised_model(kind: str, strategy: str) -> None:
    base, twin = twins(kind)
    config = S2FTConfig(ratios=0.3, strategy=strategy)
    batches = [{"input_ids": tokens(2, 7)}]
    found, expected = s2ft.select(base, config, batches).config.slices, s2ft.select(twin, config, batches).config.slices
    if kind == "int8" and strategy in ("gradient", "product"):  # which quantises activations too, on its way forward
        assert found.keys() == expected.keys()
    else:
        assert found == expected
    assert not any(hook for module in base.modules() for hook in module._forward_hooks)


def test_a_delta_that_is_not_finite_is_refused_beside_a_quantised_weight() -> None:
    made, ids = adapted(twins("stand-in")[0]).eval(), tokens(2, 7)
    expected = logits(made, ids)
    delta = layers(made)[0].block("default").weight.data
    kept = delta.clone()
    delta[0, 0] = torch.nan
    with pytest.raises(S2FTError, match="NaNs detected"):
        made.merge_adapter(safe_merge=True)
    with pytest.raises(S2FTError, match="holds values that are not finite"):
        s2ft.switch(made, "default")
    delta.copy_(kept)
    assert torch.equal(logits(made, ids), expected)
