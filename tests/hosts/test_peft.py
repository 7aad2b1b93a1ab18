"""S²FT under PEFT's interface: save and load, several adapters, mixed batches, merging, what is targeted."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.utils import ModulesToSaveWrapper
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import s2ft
from families import build, tokens
from live import layers, logits, same, values
from s2ft import S2FTConfig, S2FTError
from s2ft.layer.linear import S2FTLinear

ROWS_AND_COLUMNS = {"q_proj": 0.5, "v_proj": 0.5, "o_proj": 0.5, "up_proj": 0.2, "down_proj": 0.2}


def config(**options: Any) -> S2FTConfig:
    return S2FTConfig(**{"ratios": ROWS_AND_COLUMNS, "init_weights": False, **options})


def base(dtype: torch.dtype = torch.float32) -> nn.Module:
    return build("llama", dtype)


def adapted(model: nn.Module, names: str = "ab", **options: Any) -> PeftModel:
    """`model` with one adapter for each letter of `names`, all on channels of their own choice; the first is active."""
    peft_model = get_peft_model(model, config(**options), adapter_name=names[0])
    for name in names[1:]:
        peft_model.add_adapter(name, config(**options))
    return peft_model.eval()


class TestSaveAndLoad:
    @pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
    def test_comes_back_bit_for_bit(self, tmp_path: Path, low_cpu_mem_usage: bool) -> None:
        plain, ids = base(), tokens(2, 7)
        model = adapted(copy.deepcopy(plain), "ab")
        model.save_pretrained(tmp_path)
        assert not list(tmp_path.rglob("*.bin"))
        loaded = PeftModel.from_pretrained(plain, tmp_path / "a", "a", low_cpu_mem_usage=low_cpu_mem_usage)
        loaded.load_adapter(tmp_path / "b", "b", low_cpu_mem_usage=low_cpu_mem_usage)
        assert same(values(model), values(loaded))
        for name in "ab":
            model.set_adapter(name)
            loaded.set_adapter(name)
            assert torch.equal(logits(model, ids), logits(loaded, ids))

    def test_file_holds_indices_and_deltas_only(self, tmp_path: Path) -> None:
        model = adapted(base(), "a")
        model.save_pretrained(tmp_path)
        tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
        assert {name.rpartition(".")[2] for name in tensors} == {"weight", "indices"}
        assert (
            sum(t.numel() for n, t in tensors.items() if n.endswith("weight")) == model.get_nb_trainable_parameters()[0]
        )

    def test_loads_for_training(self, tmp_path: Path) -> None:
        plain = base()
        adapted(copy.deepcopy(plain), "a").save_pretrained(tmp_path)
        frozen = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "a")
        assert not any(parameter.requires_grad for parameter in frozen.parameters())
        trained = PeftModel.from_pretrained(plain, tmp_path / "a", is_trainable=True)
        wanting = [name for name, parameter in trained.named_parameters() if parameter.requires_grad]
        assert wanting
        assert all("s2ft_block.default.weight" in name for name in wanting)

    def test_another_base_is_refused_before_any_change(self, tmp_path: Path) -> None:
        adapted(base(), "a").save_pretrained(tmp_path)
        other = base()
        before = values(other)
        with pytest.raises(S2FTError, match="another base"):
            PeftModel.from_pretrained(other, tmp_path / "a")
        assert same(before, values(other))
        assert not layers(other)
        with s2ft.any_base():
            loaded = PeftModel.from_pretrained(other, tmp_path / "a")
        assert layers(loaded)

    def test_a_model_without_the_modules_is_refused(self, tmp_path: Path) -> None:
        adapted(base(), "a").save_pretrained(tmp_path)
        with pytest.raises(S2FTError, match=r"q_proj, which is no linear layer of this model"):
            PeftModel.from_pretrained(build("gpt2", torch.float32), tmp_path / "a")

    def test_tampered_indices_are_refused(self, tmp_path: Path) -> None:
        plain = base()
        adapted(copy.deepcopy(plain), "a").save_pretrained(tmp_path)
        path = tmp_path / "a" / "adapter_model.safetensors"
        tensors = load_file(path)
        name = next(name for name in tensors if name.endswith("indices"))
        save_file({**tensors, name: tensors[name].flip(0)}, path, metadata={"format": "pt"})
        with pytest.raises(S2FTError, match="indices differs from the config's slice"):
            PeftModel.from_pretrained(plain, tmp_path / "a")

    def test_direct_injection_and_state_dict(self) -> None:
        plain, ids = base(), tokens(2, 5)
        model = inject_adapter_in_model(config(seed=3), copy.deepcopy(plain)).eval()
        saved = get_peft_model_state_dict(model)
        assert saved
        again = inject_adapter_in_model(config(seed=3), plain).eval()
        assert not torch.equal(logits(model, ids), logits(again, ids))
        assert not set_peft_model_state_dict(again, saved).unexpected_keys
        assert torch.equal(logits(model, ids), logits(again, ids))

    def test_pickle_and_deepcopy(self) -> None:
        model, ids = adapted(base(), "ab"), tokens(2, 5)
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(logits(model, ids), logits(copied, ids))
            assert copied.peft_config["a"].peft_type is model.peft_config["a"].peft_type


class TestOneConfigTwice:
    def test_the_model_keeps_the_object_it_was_given(self) -> None:
        given = config()
        assert get_peft_model(base(), given).peft_config["default"] is given
        assert given.slices
        assert given.base_digest

    def test_another_base_gets_a_choice_of_its_own(self) -> None:
        given = config(strategy="weight")
        first = get_peft_model(base(), given)
        kept = copy.deepcopy(given)
        second = get_peft_model(base(), given).peft_config["default"]
        assert first.peft_config["default"] == kept
        assert second is not given
        assert second.base_digest != kept.base_digest
        assert second.slices != kept.slices

    def test_a_file_is_not_chosen_anew(self, tmp_path: Path) -> None:
        adapted(base(), "a").save_pretrained(tmp_path)
        with pytest.raises(S2FTError, match="another base"):
            get_peft_model(base(), S2FTConfig.from_pretrained(tmp_path / "a"))


class TestSeveralAdapters:
    def test_set_disable_delete(self) -> None:
        plain, ids = base(), tokens(2, 6)
        expected = logits(plain, ids)
        model = adapted(plain, "ab")
        of_a = logits(model, ids)
        model.set_adapter("b")
        of_b = logits(model, ids)
        assert not torch.allclose(of_a, of_b)
        with model.disable_adapter():
            assert torch.equal(logits(model, ids), expected)
        assert torch.equal(logits(model, ids), of_b)
        model.delete_adapter("b")
        assert torch.equal(logits(model, ids), of_a)
        model.delete_adapter("a")
        assert torch.equal(logits(model.base_model, ids), expected)
        assert all(not layer.s2ft_block for layer in layers(model))

    @pytest.mark.parametrize(
        "wrong", [{"target_modules": ["nothing"]}, {"base_digest": None, "slices": {"lm_head": "in 99"}}]
    )
    def test_one_that_cannot_be_added_leaves_no_trace(self, wrong: dict[str, Any]) -> None:
        model, ids = adapted(base(), "a"), tokens(2, 5)
        before, expected = values(model), logits(model, ids)
        with pytest.raises(S2FTError):
            model.add_adapter("b", config(**{"ratios": 0.5, **wrong}))
        assert list(model.peft_config) == ["a"]
        assert same(before, values(model))
        assert torch.equal(logits(model, ids), expected)
        assert all(parameter.requires_grad == (".a." in name) for name, parameter in model.named_parameters())

    def test_a_foreign_one_leaves_no_trace(self, tmp_path: Path) -> None:
        adapted(base(), "b").save_pretrained(tmp_path)
        model = adapted(base(), "a")
        before = values(model)
        with pytest.raises(S2FTError, match="another base"):
            model.load_adapter(tmp_path / "b", "b")
        assert list(model.peft_config) == ["a"]
        assert same(before, values(model))

    def test_two_active_at_once_add_up(self) -> None:
        plain, ids = base(torch.float64), tokens(2, 6)
        model = adapted(plain, "ab")
        model.base_model.set_adapter(["a", "b"])
        together = logits(model, ids)
        model.merge_adapter(["a", "b"])
        torch.testing.assert_close(logits(model, ids), together)

    def test_only_the_active_one_trains(self) -> None:
        model = adapted(base(), "ab").train()
        for active, idle in ("ab", "ba"):
            model.set_adapter(active)
            model(input_ids=tokens(1, 5), labels=tokens(1, 5)).loss.backward()
            gradients = {name: parameter.grad is not None for name, parameter in model.named_parameters()}
            assert all(has == (f".{active}." in name) for name, has in gradients.items())
            assert not any(gradients[name] for name in gradients if f".{idle}." in name)
            model.zero_grad(set_to_none=True)

    def test_a_module_named_like_the_prefix_is_no_adapter(self) -> None:
        model = get_peft_model(nn.ModuleDict({"lin": nn.Linear(8, 8), "s2ft_head": nn.Linear(8, 8)}), mlp_config("lin"))
        assert not model.base_model.model["s2ft_head"].weight.requires_grad
        assert not any("s2ft_head" in name for name in get_peft_model_state_dict(model))

    def test_status(self) -> None:
        model = adapted(base(), "ab")
        status = model.get_model_status()
        assert (status.adapter_model_type, status.enabled, status.active_adapters) == ("S2FTModel", True, ["a"])
        assert status.peft_types == {"a": "S2FT", "b": "S2FT"}
        assert status.trainable_params == model.get_nb_trainable_parameters()[0]
        assert all(
            layer.requires_grad == {"a": True, "b": False}
            for layer in model.get_layer_status()
            if len(layer.requires_grad) == 2
        )
        model.merge_adapter()
        assert model.get_model_status().merged_adapters == ["a"]


class TestMixedBatch:
    NAMES = ("a", "__base__", "b", "a")

    def alone(self, model: PeftModel, name: str, call: Any) -> Tensor:
        if name == "__base__":
            with model.disable_adapter():
                found: Tensor = call()
                return found
        model.set_adapter(name)
        return call()

    @pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
    def test_forward_rows_are_those_of_each_adapter(self, family: str) -> None:
        options = {"ratios": 0.4, "target_modules": "all-linear"}
        model = adapted(build(family, torch.float64), "ab", **options)
        ids = tokens(4, 6)
        mixed = logits(model, ids, adapter_names=list(self.NAMES))
        for row, name in enumerate(self.NAMES):
            torch.testing.assert_close(mixed[row], self.alone(model, name, lambda: logits(model, ids))[row])
        assert (
            len(
                {
                    tuple(row[-1].tolist())
                    for row in logits(model, ids[:1].expand(4, -1), adapter_names=list(self.NAMES))
                }
            )
            == 3
        )

    @pytest.mark.parametrize("beams", [1, 3])
    def test_generation(self, beams: int) -> None:
        model = adapted(base(torch.float64), "ab")
        for parameter in model.parameters():
            if parameter.dim() == 2 and parameter.requires_grad:
                parameter.data *= 20
        ids = tokens(4, 6)
        options = {"max_new_tokens": 6, "min_new_tokens": 6, "num_beams": beams, "do_sample": False}
        mixed = model.generate(input_ids=ids, adapter_names=list(self.NAMES), **options)
        alone = {name: self.alone(model, name, lambda: model.generate(input_ids=ids, **options)) for name in self.NAMES}
        for row, name in enumerate(self.NAMES):
            assert torch.equal(mixed[row], alone[name][row])
        assert not torch.equal(alone["a"], alone["__base__"])

    def test_modules_to_save_follow_their_row(self) -> None:
        model = adapted(base(), "ab", modules_to_save=["lm_head"])
        head = model.base_model.model.lm_head
        assert isinstance(head, ModulesToSaveWrapper)
        head.modules_to_save["b"].weight.data.zero_()
        mixed = logits(model, tokens(2, 4), adapter_names=["a", "b"])
        assert mixed[0].abs().sum() > 0
        assert not mixed[1].any()

    def test_what_cannot_be_mixed_is_refused(self) -> None:
        model, ids = adapted(base(), "ab"), tokens(2, 4)
        with pytest.raises(ValueError, match=r"non-existing adapter.*nobody"):
            logits(model, ids, adapter_names=["a", "nobody"])
        with pytest.raises(ValueError, match="but got 3 and 2"):
            logits(model, ids, adapter_names=["a", "b", "a"])
        with pytest.raises(ValueError, match="but got 3 and 2"):
            logits(model, ids, adapter_names=["__base__"] * 3)  # which no slice would notice
        places = torch.arange(ids.shape[1])[None]  # one row for all
        logits(model, ids, adapter_names=["__base__"] * 2, position_ids=places)
        with pytest.raises(ValueError, match="training mode"):
            logits(model.train(), ids, adapter_names=["a", "b"])
        model.eval().merge_adapter(["a"])
        with pytest.raises(ValueError, match=r"merged adapters.*Merged: a"):
            logits(model, ids, adapter_names=["a", "b"])

    def test_hooks_go_away_after_an_error(self) -> None:
        model, ids = adapted(base(), "ab"), tokens(2, 4)
        with pytest.raises(ValueError, match="Length of"):
            logits(model, ids, adapter_names=["a"])
        assert all(not layer._forward_pre_hooks for layer in layers(model))


class TestMerge:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_unmerge_is_exact(self, dtype: torch.dtype) -> None:
        plain = base(dtype)
        model = adapted(copy.deepcopy(plain), "ab")
        before = values(model)
        model.merge_adapter(["a", "b"])
        assert not same(before, values(model))
        model.unmerge_adapter()
        assert same(before, values(model))
        assert same(values(plain), values(model.unload()))

    def test_a_thousand_cycles_in_bfloat16(self) -> None:
        layer = S2FTLinear(nn.Linear(16, 12).bfloat16(), "a", s2ft_slice("in 1,5-7,15"), init_weights=False)
        layer.update_layer("b", s2ft_slice("out 0,5-7,11"), init_weights=False)
        before = layer.weight.clone()
        for cycle in range(1000):
            layer.merge(adapter_names=["a", "b"] if cycle % 2 else ["b", "a"])
            layer.unmerge()
        assert torch.equal(layer.weight, before)

    def test_overlapping_adapters_one_after_the_other(self) -> None:
        layer = S2FTLinear(nn.Linear(16, 12), "a", s2ft_slice("in 0-9"), init_weights=False)
        for name, chosen in (("b", "in 5-12"), ("c", "out 3-8")):
            layer.update_layer(name, s2ft_slice(chosen), init_weights=False)
        before = layer.weight.clone()
        expected = before + sum(layer.get_delta_weight(name) for name in "abc")
        for name in "abc":
            layer.merge(adapter_names=[name])
        torch.testing.assert_close(layer.weight.data, expected.detach())
        layer.unmerge()
        assert torch.equal(layer.weight, before)

    def test_merge_and_unload(self) -> None:
        model, ids = adapted(base(torch.float64), "ab"), tokens(2, 6)
        expected = logits(model, ids)
        merged = model.merge_and_unload()
        assert not layers(merged)
        torch.testing.assert_close(logits(merged, ids), expected)

    def test_merging_twice_warns_and_changes_nothing(self) -> None:
        model = adapted(base(), "a")
        model.merge_adapter()
        once = values(model)
        with pytest.warns(UserWarning, match="already merged"):
            model.merge_adapter()
        assert same(once, values(model))

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_safe_merge_refuses_what_is_not_finite(self, value: float) -> None:
        model = adapted(base(), "a")
        before = values(model.base_model.model.model.layers[2])
        next(p for n, p in model.named_parameters() if "layers.2" in n and p.requires_grad).data[0, 0] = value
        with pytest.raises(ValueError, match=r"NaNs detected in the merged weights\. The adapter a"):
            model.merge_adapter(safe_merge=True)
        after = values(model.base_model.model.model.layers[2])
        assert all(torch.equal(before[name], after[name]) for name in before if "base_layer" in name)

    def test_adapters_made_on_a_merged_base_are_not_checked_against_it(self) -> None:
        model = adapted(base(), "a")
        model.merge_adapter()
        model.add_adapter("b", config())
        model.unmerge_adapter()


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(20, 10)
        self.lin0 = nn.Linear(10, 30)
        self.lin1 = nn.Linear(30, 6, bias=False)
        self.conv = nn.Conv1d(6, 6, 1)

    def forward(self, ids: Tensor) -> Tensor:
        found: Tensor = self.lin1(self.lin0(self.emb(ids)).relu())
        return found


def mlp_config(targets: Any, **options: Any) -> S2FTConfig:
    return S2FTConfig(**{"ratios": 0.3, "target_modules": targets, "init_weights": False, **options})


def s2ft_slice(text: str) -> Any:
    from s2ft.format.slices import Slice

    return Slice.parse(text)


class TestTargets:
    @pytest.mark.parametrize("strategy", ["random", "weight"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_choosing_changes_no_weight(self, strategy: str, dtype: torch.dtype) -> None:
        plain = base(dtype)
        before = values(plain)
        model = get_peft_model(plain, S2FTConfig(ratios=0.5, strategy=strategy))
        assert same(before, values(model.unload()))

    @pytest.mark.parametrize(
        ("targets", "options", "expected"),
        [
            (["lin0"], {}, {"lin0"}),
            ("lin.", {}, {"lin0", "lin1"}),
            (["lin0", "lin1"], {"exclude_modules": ["lin1"]}, {"lin0"}),
            ("lin.", {"exclude_modules": "lin0"}, {"lin1"}),
        ],
    )
    def test_on_any_network(self, targets: Any, options: dict[str, Any], expected: set[str]) -> None:
        model = get_peft_model(MLP(), mlp_config(targets, **options))
        assert set(model.targeted_module_names) == expected
        assert all(block.side == "in" for layer in layers(model) for block in layer.s2ft_block.values())

    def test_what_is_not_linear_is_refused(self) -> None:
        model = MLP()
        with pytest.raises(S2FTError, match="conv, a Conv1d"):
            get_peft_model(model, mlp_config(["lin0", "conv"]))
        assert not layers(model)

    def test_nothing_found(self) -> None:
        with pytest.raises(ValueError, match="Target modules not found"):
            get_peft_model(MLP(), mlp_config(["nothing"]))

    def test_all_linear_leaves_the_head_out(self) -> None:
        model = get_peft_model(base(), S2FTConfig(ratios=0.3, target_modules="all-linear"))
        names = {name.rpartition(".")[2] for name in model.targeted_module_names}
        assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}

    @pytest.mark.parametrize(
        "options",
        [
            {"layers_to_transform": [1]},
            {"layers_to_transform": 1, "layers_pattern": "layers"},
            {"layers": 1, "target_modules": None},
            {"layers": "1-1", "target_modules": None},
        ],
    )
    def test_one_layer(self, options: dict[str, Any]) -> None:
        chosen = S2FTConfig(**{"ratios": 0.5, "target_modules": ["o_proj", "down_proj"], **options})
        names = get_peft_model(base(), chosen).targeted_module_names
        assert sorted(names) == ["model.layers.1.mlp.down_proj", "model.layers.1.self_attn.o_proj"]

    def test_modules_to_save_and_tokens(self, tmp_path: Path) -> None:
        plain, ids = base(), tokens(2, 5)
        options = {"modules_to_save": ["lm_head"], "trainable_token_indices": [4, 7]}
        model = adapted(copy.deepcopy(plain), "a", **options).train()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        model(input_ids=torch.tensor([[4, 7, 9]]), labels=ids[:1, :3]).loss.backward()
        optimizer.step()
        model.eval().save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "a").eval()
        assert torch.equal(logits(model, ids), logits(loaded, ids))
        merged = model.merge_and_unload()
        changed = (merged.model.embed_tokens.weight != plain.model.embed_tokens.weight).any(1).nonzero().flatten()
        assert changed.tolist() == [4, 7]
        assert not torch.equal(merged.lm_head.weight, plain.lm_head.weight)
        torch.testing.assert_close(logits(merged, ids), logits(loaded, ids))
