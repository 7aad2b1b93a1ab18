"""The in-place layout against the indexed path: outputs, gradients, twenty steps of every optimizer, and the way back."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import (
    Adafactor,
    BloomConfig,
    BloomForCausalLM,
    CLIPVisionConfig,
    CLIPVisionModel,
    DiffLlamaConfig,
    DiffLlamaForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Olmo2Config,
    Olmo2ForCausalLM,
    StableLmConfig,
    StableLmForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

from families import FAMILIES, build, tokens
from live import checkpoint, layers, values
from s2ft import S2FTConfig, S2FTError, in_place
from s2ft.training import in_place as module_under_test
from s2ft.training.in_place import Layout
from s2ft.training.lean import Patches

DEFAULT = {"o_proj": 0.25, "down_proj": 0.1}
NESTED = {"q_proj": 0.5, "k_proj": 0.5, "v_proj": 0.5, "o_proj": 0.25, "up_proj": 0.2, "down_proj": 0.1}


class Wrapped(Tensor):
    """What sharding and quantisation make of a weight: another class of tensor."""


def adapted(family: str = "llama", dtype: torch.dtype = torch.float32, **options: Any) -> PeftModel:
    config = S2FTConfig(**{"ratios": DEFAULT, "init_weights": False, "task_type": "CAUSAL_LM", **options})
    return get_peft_model(build(family, dtype), config).train()


def deltas(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def gradients(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_same(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert ours.keys() == expected.keys()
    different = [name for name in ours if not torch.equal(ours[name], expected[name])]
    assert not different


@pytest.fixture
def layout_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the lean activations, which compute float64 norms more precisely than transformers does."""
    monkeypatch.setattr(module_under_test, "lean", lambda model: Patches())


@pytest.mark.usefixtures("layout_alone")
@pytest.mark.parametrize("ratios", [DEFAULT, NESTED, 0.3], ids=["default", "nested", "one number"])
@pytest.mark.parametrize("family", FAMILIES)
def test_output_base_output_gradients_and_the_way_back(family: str, ratios: Any) -> None:
    model = adapted(family, torch.float64, ratios=ratios)
    ids, before = tokens(2, 9), values(model)
    expected, expected_gradients = model(ids).logits, gradients(model, ids)
    with model.disable_adapter():
        base = model(ids).logits
    assert not torch.allclose(base, expected)
    with in_place(model) as layout:
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-9, atol=1e-10)
        with model.disable_adapter():
            torch.testing.assert_close(model(ids).logits, base, rtol=1e-9, atol=1e-10)
        ours = gradients(model, ids)
        assert any(not torch.equal(value, before[name]) for name, value in model.state_dict().items() if name in before)
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-8, atol=1e-11)
    assert_same(values(model), before)
    fused = {p.module for p in layout.placements if p.how != "contiguous"}
    assert all(path.endswith(("qkv_proj", "c_attn")) for path in fused)  # several projections in one layer


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.1),
    "fused": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, fused=True),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
    "adafactor": lambda parameters: Adafactor(parameters, lr=1e-3, scale_parameter=False, relative_step=False),
}


def train(
    model: nn.Module, batches: list[Tensor], optimizer: str, accumulate: int = 1, clip: float | None = None
) -> None:
    parameters = [p for p in model.parameters() if p.requires_grad]
    steps = OPTIMIZERS[optimizer](parameters)
    for index, ids in enumerate(batches, 1):
        (model(input_ids=ids, labels=ids).loss / accumulate).backward()
        if index % accumulate == 0:
            if clip is not None:
                torch.nn.utils.clip_grad_norm_(parameters, clip)
            steps.step()
            steps.zero_grad()


def both_ways(
    model: nn.Module, run: Callable[[nn.Module], None]
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Deltas before; after `run` outside; and after `run` in place."""
    before, other = deltas(model), copy.deepcopy(model)
    base = {name: value for name, value in values(model).items() if "s2ft" not in name}
    run(model)
    with in_place(other):
        run(other)
    assert_same({name: value for name, value in values(other).items() if "s2ft" not in name}, base)
    return before, deltas(model), deltas(other)


def relative_error(before: dict[str, Tensor], expected: dict[str, Tensor], ours: dict[str, Tensor]) -> float:
    """Of all changes together."""
    wrong = sum(float((ours[name] - expected[name]).double().square().sum()) for name in ours)
    change = sum(float((expected[name] - before[name]).double().square().sum()) for name in ours)
    assert change > 0
    return (wrong / change) ** 0.5


FAMILIES_AND_OPTIMIZERS = [(family, "adamw") for family in FAMILIES] + [
    (family, optimizer) for family in ("llama", "phi3", "gpt2") for optimizer in ("fused", "sgd", "adafactor")
]


@pytest.mark.parametrize(("family", "optimizer"), FAMILIES_AND_OPTIMIZERS)
def test_twenty_steps_equal_the_indexed_path_in_fp32(family: str, optimizer: str) -> None:
    model = adapted(family, ratios=NESTED)
    batches = [tokens(2, 9) for _ in range(20)]
    most = (
        2e-2 if optimizer == "adamw" else 2e-3
    )  # where a gradient is nearly zero, its rounding decides Adam's whole step
    assert relative_error(*both_ways(model, lambda m: train(m, batches, optimizer))) < most


@pytest.mark.parametrize(
    ("family", "optimizer"), [("llama", name) for name in OPTIMIZERS] + [("gpt2", "sgd"), ("qwen3", "sgd")]
)
def test_twenty_steps_equal_the_indexed_path_in_bf16_to_its_rounding(family: str, optimizer: str) -> None:
    model = adapted(family, torch.bfloat16, ratios=NESTED)
    assert {p.dtype for p in deltas(model).values()} == {torch.float32}
    batches = [tokens(4, 9) for _ in range(20)]
    assert relative_error(*both_ways(model, lambda m: train(m, batches, optimizer))) < 0.15


def test_bf16_follows_full_autograd_with_fp32_masters() -> None:
    """The reference: W = bf16(base + delta) as a plain parameter; its gradient, on the slice, moves the fp32 delta."""
    model = adapted("mistral", torch.bfloat16)
    reference = copy.deepcopy(model).get_base_model()
    slices = {
        name: (layer.base_layer, layer.s2ft_block["default"])
        for name, layer in reference.named_modules()
        if hasattr(layer, "s2ft_block")
    }
    for name in slices:
        parent, _, leaf = name.rpartition(".")
        setattr(reference.get_submodule(parent), leaf, slices[name][0])
    originals = {name: base.weight.detach().clone() for name, (base, _) in slices.items()}
    masters = {name: block.weight.detach().clone() for name, (_, block) in slices.items()}
    before = {name: value.clone() for name, value in masters.items()}
    batches = [tokens(4, 9) for _ in range(10)]
    for ids in batches:
        for name, (base, block) in slices.items():
            base.weight.requires_grad_().grad = None
            columns = originals[name][:, block.indices].float() + masters[name]
            base.weight.data[:, block.indices] = columns.bfloat16()
        reference(input_ids=ids, labels=ids).loss.backward()
        for name, (base, block) in slices.items():
            masters[name] -= 0.5 * base.weight.grad[:, block.indices].float()
    with in_place(model):
        for ids in batches:
            model.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
            for p in model.parameters():
                if p.requires_grad:
                    p.data -= 0.5 * p.grad
    ours = {name: model.get_base_model().get_submodule(name).s2ft_block["default"].weight.detach() for name in slices}
    assert relative_error(before, masters, ours) < 0.05


def accumulated(model: nn.Module) -> None:
    train(model, [tokens_of(i) for i in range(12)], "adamw", accumulate=3, clip=0.05)


def autocast(model: nn.Module) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        train(model, [tokens_of(i) for i in range(6)], "sgd")


def checkpointed(model: nn.Module, reentrant: bool) -> None:
    checkpoint(model, use_reentrant=reentrant)
    train(model, [tokens_of(i) for i in range(6)], "sgd")


def tokens_of(seed: int) -> Tensor:
    return torch.randint(3, 61, (2, 9), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("run", "most"),
    [
        (accumulated, 2e-3),
        (autocast, 0.1),
        (lambda model: checkpointed(model, True), 1e-3),
        (lambda model: checkpointed(model, False), 1e-3),
    ],
    ids=["accumulation and clipping", "autocast", "reentrant checkpoints", "checkpoints"],
)
def test_what_loops_do(run: Callable[[nn.Module], None], most: float) -> None:
    assert relative_error(*both_ways(adapted(ratios=NESTED), run)) < most


class TestTheWayBack:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    def test_base_weights_return_bit_for_bit_after_training(self, dtype: torch.dtype) -> None:
        model = adapted("qwen2", dtype, ratios=NESTED)
        base = {name: value for name, value in values(model).items() if "s2ft" not in name}
        for _ in range(3):
            with in_place(model):
                train(model, [tokens(2, 5)], "sgd")
        assert_same({name: value for name, value in values(model).items() if "s2ft" not in name}, base)

    def test_saving_inside_writes_checkpoint_coordinates(self, tmp_path: Path) -> None:
        model = adapted(ratios=NESTED)
        base = build("llama", torch.float32)
        base.load_state_dict(
            {
                name.replace("base_layer.", ""): value
                for name, value in model.get_base_model().state_dict().items()
                if "s2ft" not in name
            }
        )
        with in_place(model):
            train(model, [tokens(2, 5) for _ in range(2)], "adamw")
            model.save_pretrained(str(tmp_path))
            inside = deltas(model)
        loaded = PeftModel.from_pretrained(base, str(tmp_path), is_trainable=True)
        assert_same(deltas(loaded), inside)
        ids = tokens(2, 7)
        torch.testing.assert_close(loaded.eval()(ids).logits, model.eval()(ids).logits)

    def test_loading_weights_inside_is_seen(self, tmp_path: Path) -> None:
        model, ids = adapted(), tokens(2, 7)
        model.save_pretrained(str(tmp_path))
        expected = model.eval()(ids).logits
        with in_place(model):
            train(model, [tokens(2, 5)], "sgd")
            assert not torch.allclose(model.eval()(ids).logits, expected)
            model.load_adapter(str(tmp_path), "default", is_trainable=True)  # as Trainer resumes
            torch.testing.assert_close(model.eval()(ids).logits, expected, rtol=1e-4, atol=1e-5)

    def test_a_step_that_raises_leaves_a_model_that_goes_on(self) -> None:
        model, ids = adapted("llama", torch.float64), tokens(2, 7)
        before = values(model)
        with in_place(model):
            expected = gradients(model, ids)
            loss = model(input_ids=ids, labels=ids).loss
            handle = model.get_base_model().model.layers[1].self_attn.o_proj.register_full_backward_pre_hook(fail)
            with pytest.raises(RuntimeError, match="on purpose"):
                model(input_ids=ids, labels=ids).loss.backward()
            handle.remove()
            assert all(torch.allclose(value, expected[name]) for name, value in gradients(model, ids).items())
            del loss
        assert_same(values(model), before)

    def test_an_exception_inside_leaves_the_layout(self) -> None:
        model = adapted()
        before = values(model)
        with pytest.raises(RuntimeError, match="on purpose"), in_place(model):
            fail(model(tokens(2, 5)))
        assert_same(values(model), before)

    def test_a_failure_on_entering_changes_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = adapted()
        before = values(model)
        monkeypatch.setattr(module_under_test, "lean", fail)
        with pytest.raises(RuntimeError, match="on purpose"), in_place(model):
            pass
        assert_same(values(model), before)
        model.merge_adapter()  # outside again

    def test_entering_inside_changes_nothing_and_the_outermost_leaves(self) -> None:
        model = adapted()
        before = values(model)
        with in_place(model) as outer:
            inside = values(model)
            with in_place(model) as inner, in_place(model.get_base_model()):
                assert inner is outer
            assert_same(values(model), inside)
        assert_same(values(model), before)

    @pytest.mark.parametrize(
        "duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
    )
    def test_copies_made_inside_are_inside_and_leave_by_a_block_of_their_own(self, duplicate: Any) -> None:
        model, ids = adapted(), tokens(2, 7)
        before, outside = values(model), model.eval()(ids).logits
        with in_place(model):
            expected = model.eval()(ids).logits
            other = duplicate(model)
        assert torch.equal(other(ids).logits, expected)
        train(other.train(), [tokens(2, 5)], "sgd")
        assert_same(values(model), before)
        with pytest.raises(S2FTError, match="inside"):
            other.merge_adapter()
        with in_place(other):
            pass
        assert_same(
            {n: v for n, v in values(other).items() if "s2ft" not in n},
            {n: v for n, v in before.items() if "s2ft" not in n},
        )
        assert not torch.allclose(other.eval()(ids).logits, outside)


def fail(*_: Any) -> None:
    raise RuntimeError("on purpose")


class TestWhatTheSlotHolds:
    def test_a_reference_pass_before_backward_does_not_disturb_it(self) -> None:
        """As DPO does: policy forward, base forward, backward."""
        model, ids = adapted("llama", torch.float64), tokens(2, 7)
        with in_place(model):
            expected = gradients(model, ids)
            model.zero_grad()
            loss = model(input_ids=ids, labels=ids).loss
            with model.disable_adapter(), torch.no_grad():
                model(ids)
            loss.backward()
            for name, p in model.named_parameters():
                if p.requires_grad:
                    torch.testing.assert_close(p.grad, expected[name])

    @pytest.mark.usefixtures("layout_alone")
    def test_gradients_of_the_base_alone_are_the_bases(self) -> None:
        model = adapted("llama", torch.float64)
        x = torch.randn(2, 5, 24, dtype=torch.float64, requires_grad=True)

        def input_gradient() -> Tensor:
            with model.disable_adapter():
                output = model(inputs_embeds=x).logits
            if model.get_base_model().model.layers[0].mlp.down_proj.layout is not None:
                model(tokens(1, 3))  # the slots hold the adapter again when backward begins
            return torch.autograd.grad(output.square().sum(), x)[0]

        expected = input_gradient()
        with in_place(model):
            torch.testing.assert_close(input_gradient(), expected, rtol=1e-5, atol=1e-7)

    def test_writes_to_data_are_seen(self) -> None:
        """Some optimizers write below autograd's eyes."""
        model, ids = adapted(), tokens(2, 7)
        with in_place(model):
            first = model.eval()(ids).logits
            model.train()
            for p in model.parameters():
                if p.requires_grad:
                    p.data.add_(0.5)
            trained = model(ids).logits.detach()
            for p in model.parameters():
                if p.requires_grad:
                    p.data.sub_(1.0)
            with torch.no_grad():
                evaluated = model.eval()(ids).logits
        assert not torch.allclose(trained, first)
        assert not torch.allclose(trained, evaluated)
        with torch.no_grad():
            torch.testing.assert_close(model(ids).logits, evaluated, rtol=1e-4, atol=1e-5)

    def test_so_are_those_between_two_evaluations(self) -> None:
        """Averages of the parameters are swapped in by their `data`, without a change of mode."""
        model, ids = adapted().eval(), tokens(2, 7)
        with torch.no_grad():
            with in_place(model):
                first = model(ids).logits
                for p in model.parameters():
                    if p.requires_grad:
                        p.data.add_(0.5)
                second = model(ids).logits
            assert not torch.allclose(first, second)
            torch.testing.assert_close(model(ids).logits, second, rtol=1e-4, atol=1e-5)

    def test_a_state_that_was_taken_inside_is_not_loaded_outside(self) -> None:
        model = adapted()
        before = values(model)
        with in_place(model):
            inside = copy.deepcopy(model.state_dict())
        with pytest.raises(S2FTError, match=r"this state was taken inside `s2ft\.in_place\(model\)`"):
            model.load_state_dict(inside)
        for name, value in values(model).items():
            assert torch.equal(value, before[name])
        frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
        trained = {
            name: value for name, value in inside.items() if name not in frozen
        }  # as DeepSpeed saves: with the marks
        assert not set(model.load_state_dict(trained, strict=False).missing_keys) - frozen
        model.load_state_dict(copy.deepcopy(model.state_dict()))

    def test_torchs_checkpoints_find_each_key_of_a_state(self) -> None:
        model = adapted()
        with in_place(model):
            found = get_model_state_dict(model, options=StateDictOptions(ignore_frozen_params=True))
        assert deltas(model).keys() <= found.keys()

    def test_random_numbers_of_devices_without_the_model_are_left_alone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        seen, fork = [], torch.random.fork_rng
        monkeypatch.setattr(torch.random, "fork_rng", lambda devices: seen.append(devices) or fork(devices))
        with in_place(adapted()):
            pass
        assert seen
        assert seen == [[]] * len(seen)

    def test_copies_for_several_gpus_are_refused(self) -> None:
        model = adapted()
        layer = model.get_base_model().model.layers[1].mlp.down_proj
        layer._replicate_for_data_parallel()
        with in_place(model), pytest.raises(S2FTError, match=r"DataParallel.*s2ft\.in_place.*accelerate launch"):
            layer._replicate_for_data_parallel()

    def test_changing_a_delta_between_forward_and_backward_is_an_error(self) -> None:
        model, ids = adapted(), tokens(2, 7)
        with in_place(model):
            loss = model(input_ids=ids, labels=ids).loss
            with torch.no_grad():
                for p in model.parameters():
                    if p.requires_grad:
                        p.add_(1)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()

    def test_backward_keeps_the_selected_activations_and_not_what_they_were_cut_from(self) -> None:
        model = get_peft_model(
            build("llama", torch.float32), S2FTConfig(target_modules=["down_proj"], ratios=0.1, layers=[2])
        )
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with in_place(model) as layout:
            layer = model.get_base_model().model.layers[2].mlp.down_proj
            x = torch.randn(3, 5, 44)
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                result = layer(x)
            del result
            assert [place.how for place in layout.placements] == ["contiguous"]
        block = layer.s2ft_block["default"]
        sizes.pop(block.weight.untyped_storage().data_ptr())
        sizes.pop(layer.base_layer.weight.untyped_storage().data_ptr(), None)
        assert sum(sizes.values()) == 3 * 5 * block.indices.numel() * 4

    def test_raw_writes_after_a_backward_in_eval_mode_are_seen(self) -> None:
        model, ids = adapted().eval(), tokens(2, 7)
        with in_place(model):
            gradients(model, ids)
            for p in model.parameters():
                if p.requires_grad:
                    p.data.add_(0.5)
            with torch.no_grad():
                evaluated = model(ids).logits
        with torch.no_grad():
            torch.testing.assert_close(model(ids).logits, evaluated, rtol=1e-4, atol=1e-5)

    def test_a_graph_does_not_cross_the_border(self) -> None:
        model, ids = adapted(), tokens(2, 7)
        before = values(model)
        outside = model(input_ids=ids, labels=ids).loss
        with in_place(model):
            inside = model(input_ids=ids, labels=ids).loss
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                outside.backward()
        with pytest.raises((S2FTError, RuntimeError), match=r"run backward inside|modified by an inplace operation"):
            inside.backward()
        assert_same(values(model), before)


class TestWhatIsRefusedInside:
    @pytest.mark.parametrize(
        "act",
        [
            lambda model: model.merge_adapter(),
            lambda model: model.merge_and_unload(),
            lambda model: model.unload(),
            lambda model: model.add_adapter("other", S2FTConfig(ratios=0.2)),
            lambda model: model.delete_adapter("default"),
            lambda model: model.load_state_dict(model.state_dict()),
            lambda model: model.eval()(tokens(2, 5), adapter_names=["default", "__base__"]),
        ],
        ids=["merge", "merge and unload", "unload", "add", "delete", "base weights", "adapter_names"],
    )
    def test_what_would_read_the_base(self, act: Callable[[Any], Any]) -> None:
        model = adapted()
        before = values(model)
        with in_place(model):
            with pytest.raises(S2FTError, match="in_place"):
                act(model)
            model.train()(tokens(2, 5))
        assert_same(values(model), before)

    def test_merging_an_adapter_that_lies_elsewhere(self) -> None:
        model = adapted()
        model.add_adapter("other", S2FTConfig(ratios={"up_proj": 0.2}, seed=5))
        before = values(model)
        with in_place(model), pytest.raises(S2FTError, match="merging"):
            model.merge_adapter(adapter_names=["other"])
        assert_same(values(model), before)

    def test_another_active_adapter(self) -> None:
        model = adapted()
        model.add_adapter("other", S2FTConfig(ratios=DEFAULT, seed=5))
        with in_place(model):
            with pytest.raises(S2FTError, match=r"'default' is active; asked for: 'other'"):
                model.set_adapter("other")
            model(tokens(2, 5))
            model.set_adapter("default")
            model(tokens(2, 5))

    @pytest.mark.parametrize("ratios", [DEFAULT, {"up_proj": 0.2}], ids=["the same modules", "others of the same FFN"])
    def test_a_second_active_adapter(self, ratios: Any) -> None:
        model, ids = adapted(), tokens(2, 5)
        model.add_adapter("other", S2FTConfig(ratios=ratios, seed=5, init_weights=False))
        expected = model(ids).logits
        with in_place(model):
            for target in (model.base_model, *layers(model)):
                with pytest.raises(S2FTError, match="asked for: 'default', 'other'"):
                    target.set_adapter(["default", "other"])
            torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)
            assert model.base_model.active_adapters == ["default"]


class TestWhatIsRefusedOnEntering:
    def test_a_model_without_the_method(self) -> None:
        with pytest.raises(S2FTError, match="no S²FT adapter"), in_place(build("llama")):
            pass

    def test_merged_adapters(self) -> None:
        model = adapted()
        model.merge_adapter()
        with pytest.raises(S2FTError, match="default are merged"), in_place(model):
            pass

    def test_several_active_adapters(self) -> None:
        model = adapted()
        model.add_adapter("other", S2FTConfig(ratios=DEFAULT, seed=5))
        model.base_model.set_adapter(["default", "other"])
        with pytest.raises(S2FTError, match="active are: default, other"), in_place(model):
            pass


def hows(layout: Layout, ending: str) -> set[tuple[str, str]]:
    return {(place.how, place.reason) for place in layout.placements if place.module.endswith(ending)}


class TestObstacles:
    def same_inside(self, model: nn.Module, dtype_tolerance: float = 1e-4) -> Layout:
        ids, before = tokens(2, 7), values(model)
        expected = model(ids).logits
        with in_place(model) as layout:
            torch.testing.assert_close(model(ids).logits, expected, rtol=dtype_tolerance, atol=dtype_tolerance)
        assert_same(values(model), before)
        return layout

    def test_heads_in_three_groups_are_gathered(self) -> None:
        sizes = {"hidden_size": 48, "intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": 12}
        config = LlamaConfig(vocab_size=61, **sizes, num_key_value_heads=4)
        chosen = S2FTConfig(target_modules=["o_proj"], slices={"model.layers.0.self_attn.o_proj": "in 0-3,12-15,24-27"})
        chosen.init_weights = False
        layout = self.same_inside(get_peft_model(LlamaForCausalLM(config), chosen))
        assert hows(layout, "o_proj") == {("gathered", "the chosen heads or channels cannot lie side by side")}

    def test_norms_over_all_heads_move_along(self) -> None:
        sizes = {"hidden_size": 24, "intermediate_size": 44, "num_hidden_layers": 2, "num_attention_heads": 4}
        base = Olmo2ForCausalLM(Olmo2Config(vocab_size=61, pad_token_id=0, **sizes, num_key_value_heads=2))
        for parameter in base.parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter))
        chosen = S2FTConfig(ratios={"q_proj": 0.25, "k_proj": 0.5, "o_proj": 0.25}, init_weights=False, seed=3)
        model = get_peft_model(base, chosen)
        norms = [layer.self_attn.q_norm.weight for layer in base.model.layers]
        before = [norm.clone() for norm in norms]
        with in_place(model):
            moved = [not torch.equal(norm, own) for norm, own in zip(norms, before, strict=True)]
            kept = [torch.equal(norm.sort().values, own.sort().values) for norm, own in zip(norms, before, strict=True)]
        assert any(moved)
        assert all(kept), "in another order, and nothing else"
        layout = self.same_inside(model)
        assert {place.how for place in layout.placements} == {"contiguous"}

    def test_a_parameter_that_knows_each_head_keeps_their_order(self) -> None:
        sizes = {
            "hidden_size": 24,
            "intermediate_size": 20,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "head_dim": 6,
        }
        base = GptOssForCausalLM(
            GptOssConfig(vocab_size=61, **sizes, num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=1)
        )
        path = "model.layers.1.self_attn.o_proj"
        chosen = S2FTConfig(target_modules=["o_proj"], slices={path: "in 6-11,18-23"}, init_weights=False)
        ((how, reason),) = hows(self.same_inside(get_peft_model(base, chosen)), "o_proj")
        assert how == "gathered"
        assert "self_attn.sinks" in reason

    def test_heads_that_are_as_many_as_they_are_wide(self) -> None:
        """A sink for each head has the shape of a norm that all heads share."""
        sizes = {
            "hidden_size": 24,
            "intermediate_size": 20,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "head_dim": 4,
        }
        base = GptOssForCausalLM(
            GptOssConfig(vocab_size=61, **sizes, num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=1)
        )
        nn.init.normal_(base.model.layers[0].self_attn.sinks)
        path = "model.layers.0.self_attn.o_proj"
        chosen = S2FTConfig(target_modules=["o_proj"], slices={path: "in 4-7,12-15"}, init_weights=False)
        layout = self.same_inside(get_peft_model(base, chosen))
        assert [(how, "sinks" in reason) for how, reason in hows(layout, "o_proj")] == [("gathered", True)]

    def test_heads_that_are_paired_show_when_the_model_runs(self) -> None:
        sizes = {"hidden_size": 32, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 4}
        base = DiffLlamaForCausalLM(DiffLlamaConfig(vocab_size=61, **sizes, num_key_value_heads=4))
        chosen = S2FTConfig(ratios={"o_proj": 0.25, "down_proj": 0.2}, init_weights=False, seed=3)
        layout = self.same_inside(get_peft_model(base, chosen))
        gathered = {reason for how, reason in hows(layout, "o_proj") if how == "gathered"}
        assert gathered <= {"it computes something else when its heads or channels change places"}
        assert {how for how, _ in hows(layout, "down_proj")} == {"contiguous"}

    def test_a_norm_for_each_head_keeps_their_order(self) -> None:
        sizes = {"hidden_size": 32, "intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": 4}
        base = StableLmForCausalLM(StableLmConfig(vocab_size=61, **sizes, num_key_value_heads=4, qk_layernorm=True))
        for parameter in base.parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter))
        chosen = S2FTConfig(target_modules=["o_proj"], slices={"model.layers.0.self_attn.o_proj": "in 8-15,24-31"})
        chosen.init_weights = False
        assert {how for how, _ in hows(self.same_inside(get_peft_model(base, chosen)), "o_proj")} == {"gathered"}

    def test_what_trains_besides_is_not_moved(self, tmp_path: Path) -> None:
        base = Olmo2ForCausalLM(
            Olmo2Config(
                vocab_size=61,
                pad_token_id=0,
                hidden_size=24,
                intermediate_size=44,
                num_hidden_layers=1,
                num_attention_heads=4,
            )
        )
        chosen = S2FTConfig(
            target_modules=["o_proj"],
            slices={"model.layers.0.self_attn.o_proj": "in 6-11,18-23"},
            modules_to_save=["q_norm"],
            init_weights=False,
        )
        model = get_peft_model(base, chosen)
        with torch.no_grad():
            next(p for name, p in model.named_parameters() if "q_norm" in name and p.requires_grad).normal_()
        layout = self.same_inside(model)
        assert {how for how, _ in hows(layout, "o_proj")} == {"gathered"}

    def test_a_trained_bias_is_not_moved(self) -> None:
        slices = {f"model.layers.{layer}.mlp.down_proj": "in 1,5,9" for layer in range(2)}
        model = adapted(ratios=None, target_modules=["down_proj"], slices=slices)
        model.get_base_model().model.layers[0].mlp.gate_proj.bias.requires_grad_()
        layout = self.same_inside(model)
        assert hows(layout, "layers.0.mlp.down_proj") == {
            ("gathered", "the bias of base_model.model.model.layers.0.mlp.gate_proj is trained itself")
        }
        assert {how for how, _ in hows(layout, "layers.1.mlp.down_proj")} == {"contiguous"}

    def test_a_model_that_cannot_be_run_is_not_permuted(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = adapted(ratios={"down_proj": 0.2}, seed=3)
        monkeypatch.setattr("s2ft.training.in_place.Probe", fail)
        layout = self.same_inside(model)
        assert any("cannot be run on its dummy input" in place.reason for place in layout.placements)

    def llava(self) -> PeftModel:
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        vision = CLIPVisionConfig(**sizes, image_size=16, patch_size=8)
        text = LlamaConfig(vocab_size=64, **sizes)
        base = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=60))
        targets = r".*(vision.*out_proj|fc2|down_proj)"
        config = S2FTConfig(ratios=0.5, target_modules=targets, init_weights=False, seed=5)
        return get_peft_model(base, config).eval()

    def test_a_tower_beside_the_text_is_run_by_itself(self) -> None:
        model, before = self.llava(), None
        tower, image = model.get_base_model().model.vision_tower, torch.randn(2, 3, 16, 16)
        expected, before = tower(image).last_hidden_state, values(model)
        with in_place(model) as layout:
            assert {place.how for place in layout.placements} == {"contiguous"}
            torch.testing.assert_close(tower(image).last_hidden_state, expected, rtol=1e-4, atol=1e-5)
        assert_same(values(model), before)

    def test_a_tower_that_no_dummy_input_reaches(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = self.llava()
        monkeypatch.setattr(CLIPVisionModel, "forward", fail)
        with in_place(model) as layout:
            unreached = ("gathered", "no dummy input gets there, so its order cannot be checked")
            assert unreached in hows(layout, "out_proj")
            assert hows(layout, "fc2") == {("contiguous", "")}  # an MLP runs by itself
            assert hows(layout, "down_proj") == {("contiguous", "")}

    def test_an_image_is_what_a_vision_model_is_probed_with(self) -> None:
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        base = ViTForImageClassification(ViTConfig(**sizes, image_size=16, patch_size=8))
        model = get_peft_model(base, S2FTConfig(ratios=0.3, init_weights=False, seed=5)).eval()
        image, before = torch.randn(2, 3, 16, 16), values(model)
        expected = model(pixel_values=image).logits
        with in_place(model) as layout:
            assert {place.how for place in layout.placements} == {"contiguous"}
            torch.testing.assert_close(model(pixel_values=image).logits, expected, rtol=1e-4, atol=1e-5)
        assert_same(values(model), before)

    @pytest.mark.parametrize("endings", [("lm_head",), ("o_proj",), ("down_proj", "lm_head")])
    def test_weights_that_are_still_zero_do_not_hide_what_is_permuted(self, endings: tuple[str, ...]) -> None:
        base = build("llama", torch.float32)
        for path, module in base.named_modules():
            if path.endswith(endings):
                nn.init.zeros_(module.weight)
        model = get_peft_model(base, S2FTConfig(ratios={"o_proj": 0.25, "down_proj": 0.2}, init_weights=False, seed=3))
        assert {place.how for place in self.same_inside(model).placements} == {"contiguous"}

    def test_a_zero_weight_does_not_hide_heads_that_keep_their_order(self) -> None:
        base = BloomForCausalLM(BloomConfig(vocab_size=61, hidden_size=32, n_layer=1, n_head=4))
        attention = base.transformer.h[0].self_attention
        nn.init.zeros_(attention.dense.weight)
        chosen = S2FTConfig(target_modules=["dense"], slices={"transformer.h.0.self_attention.dense": "in 8-15,24-31"})
        chosen.init_weights = False
        layout = self.same_inside(get_peft_model(base, chosen))
        assert hows(layout, "dense") == {
            ("gathered", "it computes something else when its heads or channels change places")
        }

    def test_a_weight_that_is_sharded_inside(self) -> None:
        model = adapted()
        layout = module_under_test.enter(model)
        linear = model.get_base_model().model.layers[1].mlp.down_proj.base_layer
        whole = linear.weight
        linear.weight = nn.Parameter(whole.data.as_subclass(Wrapped), requires_grad=False)
        with pytest.raises(S2FTError, match=r"has become another Wrapped inside `s2ft\.in_place"):
            model(tokens(2, 5))
        linear.weight = whole
        layout.leave()

    def test_a_shared_weight_is_not_written_to(self) -> None:
        base = build("llama", torch.float32)
        base.model.layers[1].mlp.down_proj.weight = base.model.layers[0].mlp.down_proj.weight
        layout = self.same_inside(get_peft_model(base, S2FTConfig(ratios=DEFAULT, init_weights=False)))
        assert ("added", "its weight is shared with another layer") in hows(layout, "down_proj")
        assert {how for how, _ in hows(layout, "o_proj")} == {"contiguous"}

    def test_a_packed_weight_is_not_written_to(self) -> None:
        class Packed(nn.Linear):
            def __init__(self, linear: nn.Linear) -> None:
                super().__init__(linear.in_features, linear.out_features, bias=False)
                self.values = linear.weight.detach()
                self.weight = nn.Parameter(torch.zeros(5, 1, dtype=torch.uint8), requires_grad=False)

            def forward(self, x: Tensor) -> Tensor:
                return nn.functional.linear(x, self.values)

        base = build("mistral", torch.float32)
        base.model.layers[1].mlp.down_proj = Packed(base.model.layers[1].mlp.down_proj)
        model = get_peft_model(base, S2FTConfig(ratios=DEFAULT, init_weights=False))
        layout = self.same_inside(model)
        assert ("added", "its weight is quantised (Packed), stored as torch.uint8") in hows(
            layout, "layers.1.mlp.down_proj"
        )


class TestCompiled:
    @pytest.mark.slow
    def test_a_pass_without_the_adapter_in_between_changes_no_gradient(self) -> None:
        """As in preference training. Inductor keeps the weight for backward, not a copy of it."""
        model, ids = adapted(ratios=NESTED), tokens(2, 9)

        def all_gradients(run: Any) -> list[Tensor]:
            model.zero_grad()
            loss = run(input_ids=ids, labels=ids).loss
            with torch.no_grad(), model.disable_adapter():
                reference.append(run(input_ids=ids).logits)
            loss.backward()
            return [p.grad.clone() for p in model.parameters() if p.grad is not None]

        reference: list[Tensor] = []
        with in_place(model):
            expected = all_gradients(model)
            found = all_gradients(torch.compile(model, backend="inductor"))
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(reference[1], reference[0], rtol=1e-3, atol=1e-5)

    def test_trains_the_same_without_a_graph_break(self) -> None:
        model = adapted(ratios=NESTED)
        batches = [tokens(2, 9) for _ in range(3)]
        expected = copy.deepcopy(model)
        train(expected, batches, "sgd")
        with in_place(model):
            compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
            train(compiled, batches, "sgd")
            with model.disable_adapter():  # eager, after compiled passes
                base = model.eval()(batches[0]).logits
        for name, delta in deltas(expected).items():
            torch.testing.assert_close(deltas(model)[name], delta, rtol=1e-3, atol=1e-5)
        with model.disable_adapter():
            torch.testing.assert_close(model(batches[0]).logits, base, rtol=1e-4, atol=1e-5)
