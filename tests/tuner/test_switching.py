"""Switching: exact in every dtype, equal to merging, one compiled graph, whole after a failure, and PEFT's own calls."""

import copy
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import s2ft
from families import FAMILIES, build, tokens
from live import layers, same
from s2ft import S2FTConfig, S2FTError
from s2ft.layer import base_weight
from s2ft.layer.adapted import AdaptedLayer
from s2ft.layer.columns import put_slice, take_slice
from s2ft.layer.linear import S2FTLinear
from s2ft.tuner.switching import park

RATIOS = {"o_proj": 0.5, "v_proj": 0.5, "down_proj": 0.4}
ADAPTERS = ("a", "b", "c")


def adapted(family: str = "llama", dtype: torch.dtype = torch.float32, **options: object) -> PeftModel:
    """A model with three overlapping adapters, the last without a slice of v."""
    model = get_peft_model(build(family, dtype), config(0, **options), adapter_name="a")
    model.add_adapter("b", config(1, **options))
    model.add_adapter("c", config(2, **{"ratios": {"o_proj": 0.5, "down_proj": 0.4}, **options}))
    return model.eval()


def config(seed: int, **options: object) -> S2FTConfig:
    return S2FTConfig(**{"ratios": RATIOS, "init_weights": False, "seed": seed, **options})


def base_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if "s2ft_block" not in name}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_thousand_random_switches_leave_the_base_bit_for_bit(dtype: torch.dtype) -> None:
    model = adapted(dtype=dtype)
    before = base_weights(model)
    expected = {}
    for name in ADAPTERS:
        s2ft.switch(model, name)
        expected[name] = base_weights(model)
        assert not same(expected[name], before)
    for _ in range(1000):
        name = random.choice((*ADAPTERS, None))
        s2ft.switch(model, name)
    if name is not None:
        assert same(base_weights(model), expected[name])
    s2ft.switch(model, None)
    assert same(base_weights(model), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_switched_model_is_the_merged_one(family: str) -> None:
    model, x = adapted(family), tokens(2, 6)
    dynamic = {}
    for name in ADAPTERS:
        model.set_adapter(name)
        dynamic[name] = model(x).logits
    with model.disable_adapter():
        base = model(x).logits
    merged = copy.deepcopy(model)
    for name in ADAPTERS:
        s2ft.switch(model, name)
        merged.merge_adapter([name])
        assert torch.equal(model(x).logits, merged(x).logits)
        torch.testing.assert_close(model(x).logits, dynamic[name], rtol=1e-4, atol=1e-4)
        assert not torch.allclose(model(x).logits, base, rtol=1e-3, atol=1e-3)
        merged.unmerge_adapter()
    s2ft.switch(model, None)
    assert torch.equal(model(x).logits, base)
    model.set_adapter("b")
    assert torch.equal(model(x).logits, dynamic["b"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "strided"])
def test_slices_are_taken_and_put_as_by_index_select_and_index_copy(dtype: torch.dtype, dim: int, layout: str) -> None:
    weight = torch.randn(14, 11).to(dtype)
    weight = {"contiguous": weight, "transposed": weight.T, "strided": weight[::2, ::3]}[layout]
    indices = torch.randperm(weight.shape[dim])[:3]
    taken = take_slice(weight, dim, indices)
    assert torch.equal(taken, weight.index_select(dim, indices))
    values = torch.randn_like(taken)
    expected = weight.clone().index_copy_(dim, indices, values)
    put_slice(weight, dim, indices, values)
    assert torch.equal(weight, expected)
    assert not torch.equal(taken, weight.index_select(dim, indices))


def test_no_adapter_code_runs_per_token(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = adapted(), tokens(1, 4)
    monkeypatch.setattr(S2FTLinear, "_with_slices", lambda *_, **__: pytest.fail("a slice was applied"))
    for name in ("b", None):
        s2ft.switch(model, name)
        model(x)


def test_a_compiled_model_is_compiled_once() -> None:
    model, x = adapted(), tokens(1, 5)
    expected = {}
    for name in (*ADAPTERS, None):
        s2ft.switch(model, name)
        expected[name] = model(x).logits
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    s2ft.switch(model, None)
    with torch.no_grad():
        compiled(x)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for name in (*ADAPTERS, None, "b", None, "a"):
                s2ft.switch(compiled, name)
                torch.testing.assert_close(compiled(x).logits, expected[name])


def failing_at(monkeypatch: pytest.MonkeyPatch, call: int, error: type[BaseException], after: bool) -> None:
    """`AdaptedLayer.settle` raises in its `call`-th call, before or after the weight has changed."""
    settle, count = AdaptedLayer.settle, iter(range(10**6))

    def fail(self: AdaptedLayer) -> None:
        number = next(count)
        if number == call and not after:
            raise error("half-way")
        settle(self)
        if number == call:
            raise error("half-way")

    monkeypatch.setattr(AdaptedLayer, "settle", fail)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("start", ["a", None, "ordinary"])
def test_a_failure_half_way_leaves_what_was_there(
    monkeypatch: pytest.MonkeyPatch, start: str | None, after: bool, error: type[BaseException]
) -> None:
    model, x = adapted(), tokens(1, 4)
    base = base_weights(model)
    if start != "ordinary":
        s2ft.switch(model, start)
    before, logits = base_weights(model), model(x).logits
    with monkeypatch.context() as patch:
        failing_at(patch, random.randrange(9), error, after)
        with pytest.raises(error, match="half-way"):
            s2ft.switch(model, "b")
    assert same(base_weights(model), before)
    assert torch.equal(model(x).logits, logits)
    assert {layer.is_switched for layer in layers(model)} == {start != "ordinary"}
    s2ft.switch(model, "c")
    s2ft.switch(model, None)
    assert same(base_weights(model), base)


def test_a_write_that_stops_inside_a_layer_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted()
    before = base_weights(model)
    count = iter(range(10**6))

    def fail(weight: torch.Tensor, dim: int, indices: torch.Tensor, values: torch.Tensor) -> None:
        if next(count) == 4:
            put_slice(weight, dim, indices[:1], values.narrow(dim, 0, 1))
            raise RuntimeError("out of memory")
        put_slice(weight, dim, indices, values)

    with monkeypatch.context() as patch:
        patch.setattr(base_weight, "put_slice", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            s2ft.switch(model, "b")
    assert same(base_weights(model), before)


def test_where_not_even_the_earlier_adapter_can_be_written_the_base_remains(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = adapted(), tokens(1, 4)
    before = base_weights(model)
    s2ft.switch(model, None)
    logits = model(x).logits
    s2ft.switch(model, "a")
    settle = AdaptedLayer.settle
    count = iter(range(10**6))
    with monkeypatch.context() as patch:
        patch.setattr(
            AdaptedLayer,
            "settle",
            lambda self: settle(self) if next(count) < 5 else (_ for _ in ()).throw(OSError("no memory")),
        )
        with pytest.raises(OSError, match="no memory"):
            s2ft.switch(model, "b")
    assert same(base_weights(model), before)
    assert torch.equal(model(x).logits, logits)


def merge(model: PeftModel) -> None:
    model.merge_adapter(["a"])


def partition(model: PeftModel) -> None:
    layers(model)[-1].base_layer.weight.data = layers(model)[-1].base_layer.weight.data.flatten()[:7]


def nan(model: PeftModel) -> None:
    with torch.no_grad():
        layers(model)[-1].s2ft_block["b"].weight.view(-1)[-1] = torch.nan


def offload(model: PeftModel) -> None:
    layers(model)[-1].s2ft_block["b"].to("meta")


@pytest.mark.parametrize(
    ("before", "name", "message"),
    [
        (None, "d", r"adapter 'd' is not loaded; loaded are 'a', 'b', 'c'"),
        (merge, "b", r"adapters a are merged into the base; call `unmerge_adapter\(\)`"),
        (merge, None, r"adapters a are merged"),
        (partition, "b", r"down_proj: its weight holds 7 of its values only"),
        (nan, "b", r"the adapter 'b' holds values that are not finite"),
        (offload, "b", r"device meta"),
    ],
)
def test_bad_switches_are_refused_before_any_weight_is_touched(
    before: Callable[[PeftModel], None] | None, name: str | None, message: str
) -> None:
    model = adapted()
    if before is not None:
        before(model)
    weights = base_weights(model)
    with pytest.raises(S2FTError, match=message):
        s2ft.switch(model, name)
    assert same(base_weights(model), weights)
    assert not any(layer.is_switched for layer in layers(model))


def test_a_delta_that_turns_bad_later_is_noticed() -> None:
    model = adapted()
    s2ft.switch(model, "b")
    s2ft.switch(model, "a")
    expected = base_weights(model)
    nan(model)
    with pytest.raises(S2FTError, match="not finite"):
        s2ft.switch(model, "b")
    assert same(base_weights(model), expected)


def test_models_without_slices_and_with_whole_modules_are_refused() -> None:
    with pytest.raises(S2FTError, match="holds no S²FT adapter"):
        s2ft.switch(build("llama"), "a")
    with pytest.raises(S2FTError, match="holds no S²FT adapter"):
        s2ft.switch(get_peft_model(build("llama"), LoraConfig(target_modules=["o_proj"])), "default")
    whole = get_peft_model(build("llama"), config(0, modules_to_save=["lm_head"]))
    with pytest.raises(S2FTError, match=r"lm_head is kept whole by an adapter"):
        s2ft.switch(whole, "default")
    model = get_peft_model(build("llama"), config(0))
    with s2ft.in_place(model), pytest.raises(S2FTError, match="switching is not possible inside"):
        s2ft.switch(model, "default")


def test_mixed_batches_are_refused_while_an_adapter_stands_in_the_base_and_exact_beside_it() -> None:
    model, x = adapted(), tokens(3, 5)
    expected = model(x, adapter_names=["c", "__base__", "b"]).logits
    s2ft.switch(model, "b")
    with pytest.raises(S2FTError, match=r"`adapter_names` is not possible while the model is switched to 'b'"):
        model(x, adapter_names=["c", "__base__", "b"])
    s2ft.switch(model, None)
    assert torch.equal(model(x, adapter_names=["c", "__base__", "b"]).logits, expected)


@pytest.mark.parametrize("name", ["b", None])
def test_training_is_refused_and_evaluation_is_not(name: str | None) -> None:
    model, x = adapted(), tokens(2, 5)
    s2ft.switch(model, name)
    model.train()
    with pytest.raises(S2FTError, match=r"its adapters do not train: call `model.set_adapter\(name\)`"):
        model(x)
    with torch.no_grad():
        model(x)
    model.set_adapter("b")
    model(x, labels=x).loss.backward()
    assert all(block.weight.grad is not None for block in (layer.s2ft_block["b"] for layer in layers(model)))


def test_set_adapter_ends_the_switch() -> None:
    model, x = adapted(), tokens(2, 5)
    before = base_weights(model)
    model.set_adapter("c")
    expected = model(x).logits
    s2ft.switch(model, "b")
    model.set_adapter("c")
    assert same(base_weights(model), before)
    assert torch.equal(model(x).logits, expected)


def test_disable_adapter_is_the_base_for_as_long_as_it_lasts() -> None:
    model, x = adapted(), tokens(2, 5)
    s2ft.switch(model, None)
    base = model(x).logits
    s2ft.switch(model, "b")
    switched = model(x).logits
    with model.disable_adapter():
        assert torch.equal(model(x).logits, base)
        model.add_adapter("d", config(4))
        assert torch.equal(model(x).logits, base)
    assert torch.equal(model(x).logits, switched)
    s2ft.switch(model, None)
    assert torch.equal(model(x).logits, base)


def test_saving_while_switched_saves_what_saving_before_does(tmp_path: Path) -> None:
    model = adapted()
    model.save_pretrained(tmp_path / "before")
    s2ft.switch(model, "b")
    model.save_pretrained(tmp_path / "switched")
    files = sorted(path.relative_to(tmp_path / "before") for path in (tmp_path / "before").rglob("adapter_*"))
    assert len(files) == 6
    for file in files:
        assert (tmp_path / "before" / file).read_bytes() == (tmp_path / "switched" / file).read_bytes()


def test_loading_while_switched_checks_the_true_base_and_goes_on(tmp_path: Path) -> None:
    base, x = build("llama", torch.float32), tokens(2, 5)
    everything = {"o_proj": 1.0, "down_proj": 1.0, "v_proj": 1.0, "up_proj": 0.3}  # overlaps, and new modules
    get_peft_model(copy.deepcopy(base), config(5, ratios=everything)).save_pretrained(tmp_path / "good")
    get_peft_model(build("llama", torch.float32), config(5)).save_pretrained(tmp_path / "foreign")
    model = get_peft_model(copy.deepcopy(base), config(0), adapter_name="a").eval()
    s2ft.switch(model, "a")
    before = model(x).logits
    with pytest.raises(S2FTError, match="another base"):
        model.load_adapter(str(tmp_path / "foreign"), adapter_name="d")
    assert torch.equal(model(x).logits, before)
    model.load_adapter(str(tmp_path / "good"), adapter_name="d")
    assert torch.equal(model(x).logits, before)
    s2ft.switch(model, "d")
    torch.testing.assert_close(
        model(x).logits, PeftModel.from_pretrained(base, tmp_path / "good")(x).logits, rtol=1e-4, atol=1e-4
    )


def test_combining_while_switched() -> None:
    model, x = adapted(), tokens(2, 5)
    s2ft.switch(model, "b")
    before = model(x).logits
    model.add_weighted_adapter(["b"], [1.0], "again")
    assert torch.equal(model(x).logits, before)
    s2ft.switch(model, "again")
    assert torch.equal(model(x).logits, before)


@pytest.mark.parametrize("active", ["a", "b"])
def test_deleting_the_adapter_that_is_switched_to_leaves_the_base(active: str) -> None:
    model, x = adapted(), tokens(2, 5)
    before = base_weights(model)
    model.set_adapter(active)
    s2ft.switch(model, None)
    base = model(x).logits
    s2ft.switch(model, "b")
    model.delete_adapter("b")
    assert same(base_weights(model), before)
    assert torch.equal(model(x).logits, base)
    with pytest.raises(S2FTError, match=r"'b' is not loaded; loaded are 'a', 'c'"):
        s2ft.switch(model, "b")


def test_deleting_another_adapter_changes_nothing() -> None:
    model, x = adapted(), tokens(2, 5)
    s2ft.switch(model, "b")
    before = model(x).logits
    model.delete_adapter("a")
    assert torch.equal(model(x).logits, before)


def test_merging_is_refused_and_unloading_gives_the_base_back() -> None:
    model = adapted()
    before = {name.replace("base_model.model.", ""): tensor for name, tensor in base_weights(model).items()}
    s2ft.switch(model, "b")
    switched = base_weights(model)
    for merging in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(S2FTError, match="merging is not possible while the model is switched to 'b'"):
            merging()
    assert same(base_weights(model), switched)
    unloaded = model.unload()
    assert same({name.replace(".base_layer", ""): t for name, t in before.items()}, base_weights(unloaded))


def test_unloading_gives_back_a_module_that_an_adapter_has_a_copy_of() -> None:
    base, x = build("llama", torch.float32), tokens(2, 5)
    plain, own = base(x).logits, base.lm_head
    model = get_peft_model(base, S2FTConfig(ratios=0.3, modules_to_save=["lm_head"], init_weights=False)).eval()
    with torch.no_grad():
        model.get_base_model().lm_head.modules_to_save["default"].weight.add_(1)
    assert not torch.equal(model(x).logits, plain)
    unloaded = model.unload()
    assert unloaded.lm_head is own
    assert torch.equal(unloaded(x).logits, plain)


def test_entering_the_in_place_layout_is_refused() -> None:
    model = get_peft_model(build("llama", torch.float32), config(0)).eval()
    s2ft.switch(model, "default")
    with pytest.raises(S2FTError, match=r"the model is switched"), s2ft.in_place(model):
        pass


def test_transformers_own_calls() -> None:
    model, x = build("llama", torch.float32), tokens(2, 5)
    before = base_weights(model)
    for seed, name in enumerate(ADAPTERS):
        model.add_adapter(config(seed), adapter_name=name)
    model.set_adapter("c")
    expected = model(x).logits
    s2ft.switch(model, "b")
    model.delete_adapter("b")
    assert torch.equal(
        model.model.layers[0].mlp.down_proj.base_layer.weight, before["model.layers.0.mlp.down_proj.weight"]
    )
    s2ft.switch(model, "a")
    model.set_adapter("c")
    assert torch.equal(model(x).logits, expected)


def test_a_copy_of_a_switched_model_switches_by_itself() -> None:
    model = adapted()
    before = base_weights(model)
    s2ft.switch(model, "b")
    switched = base_weights(model)
    twin = copy.deepcopy(model)
    s2ft.switch(twin, None)
    assert same(base_weights(twin), before)
    assert same(base_weights(model), switched)


def test_a_cast_while_switched_casts_what_is_kept() -> None:
    model = adapted()
    s2ft.switch(model, "b")
    expected = base_weights(adapted_cast(model))
    model.to(torch.bfloat16)
    s2ft.switch(model, None)
    assert same(base_weights(model), expected)


def adapted_cast(model: PeftModel) -> PeftModel:
    twin = copy.deepcopy(model)
    s2ft.switch(twin, None)
    return twin.to(torch.bfloat16)


def test_layers_that_share_a_weight_get_it_back() -> None:
    model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False))
    model[1].weight = model[0].weight
    before = model[0].weight.detach().clone()
    peft = get_peft_model(model, S2FTConfig(ratios=None, budget=0.9, target_modules=["0", "1"], init_weights=False))
    peft.add_adapter("b", S2FTConfig(budget=0.8, target_modules=["0", "1"], init_weights=False))
    for name in ("default", "b", "default", None):
        s2ft.switch(peft, name)
    assert torch.equal(layers(peft)[0].weight, before)
    s2ft.switch(peft, "b")
    peft.set_adapter("default")
    assert torch.equal(layers(peft)[0].weight, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_parked_adapters_switch_as_others_do(dtype: torch.dtype) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, x = adapted(dtype=dtype).to(device), tokens(2, 5).to(device)
    model.set_adapter("b")
    dynamic = model(x).logits
    s2ft.switch(model, "b")
    expected = model(x).logits
    s2ft.switch(model, None)
    park(model, "b")
    for block in (layer.s2ft_block["b"] for layer in layers(model)):
        assert block.weight.device.type == "cpu"
        assert block.weight.is_pinned() == torch.cuda.is_available()
    s2ft.switch(model, "b")
    assert torch.equal(model(x).logits, expected)
    model.set_adapter("b")
    assert torch.equal(model(x).logits, dynamic)
    with pytest.raises(S2FTError, match=r"adapter 'd' is not loaded; loaded are 'a', 'b', 'c'"):
        park(model, "d")


@pytest.mark.parametrize("name", ["../out", "x/y", "x.y", ""])
def test_a_name_that_would_leave_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    base = build("llama", torch.float32)
    get_peft_model(copy.deepcopy(base), config(0)).save_pretrained(tmp_path / "a")
    model = PeftModel.from_pretrained(base, tmp_path / "a")
    parameters = [name for name, _ in model.named_parameters()]
    with pytest.raises(S2FTError, match="is no name: it becomes a folder"):
        model.load_adapter(str(tmp_path / "a"), adapter_name=name)
    assert [name for name, _ in model.named_parameters()] == parameters
    assert list(model.peft_config) == ["default"]
