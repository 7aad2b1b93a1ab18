"""S²FT inside what surrounds PEFT: the enum of methods, transformers' own adapter calls, conversion to LoRA."""

import copy
import importlib
import pickle
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftType, convert_to_lora, get_peft_model, set_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

import s2ft
from commands import Command
from families import build, tokens
from live import layers, logits
from s2ft import S2FTConfig, S2FTModel
from s2ft.format.registration import peft_type, register_config, register_tuner


def config(**options: Any) -> S2FTConfig:
    return S2FTConfig(**{"ratios": 0.5, "init_weights": False, **options})


class TestRegistration:
    def test_the_member_is_like_any_other(self) -> None:
        member = peft_type()
        assert member is PeftType.S2FT is PeftType("S2FT") is PeftType["S2FT"]  # type: ignore[attr-defined]
        assert (member, member.name, member.value, str(member.value)) == ("S2FT", "S2FT", "S2FT", "S2FT")
        assert list(PeftType).count(member) == 1
        assert list(PeftType)[-1] is member
        assert member in PeftType
        assert len(PeftType) == len(set(PeftType)) == len(PeftType.__members__)
        assert repr(member) == "<PeftType.S2FT: 'S2FT'>"
        assert {member: 1}[PeftType("S2FT")] == 1

    def test_copies_are_the_member_itself(self) -> None:
        member = peft_type()
        assert copy.copy(member) is copy.deepcopy(member) is member
        assert all(
            pickle.loads(pickle.dumps(member, protocol)) is member for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1)
        )

    def test_other_members_are_untouched(self) -> None:
        assert PeftType("LORA") is PeftType.LORA
        with pytest.raises(ValueError, match="nothing"):
            PeftType("nothing")

    def test_once_is_enough(self) -> None:
        before = list(PeftType)
        importlib.reload(s2ft)
        register_config(S2FTConfig)
        register_tuner(S2FTModel)
        assert list(PeftType) == before
        assert PEFT_TYPE_TO_CONFIG_MAPPING[peft_type()] is S2FTConfig
        assert PEFT_TYPE_TO_TUNER_MAPPING[peft_type()] is S2FTModel

    def test_another_process_unpickles_it_after_the_import(self, tmp_path: Path) -> None:
        text = pickle.dumps(config(target_modules=["lin"])).hex()
        code = (
            f"import s2ft, pickle; config = pickle.loads(bytes.fromhex({text!r})); "
            "print(config.peft_type is s2ft.format.registration.peft_type())"
        )
        other = Command(code, tmp_path / "log")
        assert (other.wait(), other.printed) == (0, "True\n")


class TestTransformers:
    def test_add_set_disable_delete(self) -> None:
        model, ids = build("llama", torch.float32), tokens(2, 5)
        base = logits(model, ids)
        model.add_adapter(config(), "a")
        of_a = logits(model, ids)
        model.add_adapter(config(), "b")
        model.set_adapter("b")
        of_b = logits(model, ids)
        assert not torch.allclose(base, of_a)
        assert not torch.allclose(of_a, of_b)
        model.set_adapter("a")
        assert torch.equal(logits(model, ids), of_a)
        assert model.active_adapters() == ["a"]
        model.disable_adapters()
        assert torch.equal(logits(model, ids), base)
        model.enable_adapters()
        assert torch.equal(logits(model, ids), of_a)
        model.delete_adapter("b")
        assert all("b" not in layer.s2ft_block for layer in layers(model))
        assert torch.equal(logits(model, ids), of_a)

    def test_save_and_load(self, tmp_path: Path) -> None:
        plain, ids = build("llama", torch.float32), tokens(2, 5)
        model = copy.deepcopy(plain)
        model.add_adapter(config(), "a")
        model.save_pretrained(tmp_path)
        assert sorted(path.name for path in tmp_path.iterdir() if "adapter" in path.name) == [
            "adapter_config.json",
            "adapter_model.safetensors",
        ]
        for load in ({"peft_model_id": str(tmp_path)}, {"peft_model_id": str(tmp_path), "low_cpu_mem_usage": True}):
            loaded = copy.deepcopy(plain)
            loaded.load_adapter(**load)
            assert torch.equal(logits(loaded.eval(), ids), logits(model, ids))

    def test_what_peft_saved(self, tmp_path: Path) -> None:
        plain, ids = build("gpt2", torch.float32), tokens(2, 5)
        model = get_peft_model(copy.deepcopy(plain), config(target_modules="all-linear")).eval()
        model.save_pretrained(tmp_path)
        plain.load_adapter(str(tmp_path))
        assert torch.equal(logits(plain.eval(), ids), logits(model, ids))


class TestLora:
    @pytest.mark.parametrize(
        ("family", "dtype"), [("llama", torch.float32), ("gpt2", torch.float32), ("phi3", torch.bfloat16)]
    )
    def test_conversion_is_exact_from_the_slices_rank_on(self, family: str, dtype: torch.dtype) -> None:
        plain, ids = build(family, dtype), tokens(2, 6)
        model = get_peft_model(copy.deepcopy(plain), config(ratios=0.2, target_modules="all-linear")).eval()
        rank = max(block.indices.numel() for layer in layers(model) for block in layer.s2ft_block.values())
        lora_config, tensors = convert_to_lora(model, rank=rank)
        assert isinstance(lora_config, LoraConfig)
        lora = get_peft_model(plain, lora_config).eval()
        assert not set_peft_model_state_dict(lora, tensors).unexpected_keys
        tolerance = {"rtol": 1e-3, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.1, "atol": 0.1}
        torch.testing.assert_close(logits(lora, ids), logits(model, ids), **tolerance)

    def test_saved_as_lora(self, tmp_path: Path) -> None:
        plain, ids = build("llama", torch.float32), tokens(2, 6)
        model = get_peft_model(copy.deepcopy(plain), config(ratios=0.2, target_modules=["o_proj", "down_proj"])).eval()
        peft.save_as_lora(tmp_path, model, rank=20)
        lora = peft.PeftModel.from_pretrained(plain, tmp_path).eval()
        assert lora.peft_config["default"].peft_type == PeftType.LORA
        torch.testing.assert_close(logits(lora, ids), logits(model, ids), rtol=1e-3, atol=1e-4)


class TestPrecision:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_delta_is_float32_by_default(self, dtype: torch.dtype) -> None:
        model = get_peft_model(build("llama", dtype), config())
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
        assert logits(model, tokens(1, 4)).dtype == dtype

    def test_delta_takes_the_bases_dtype_on_demand(self) -> None:
        model = get_peft_model(build("llama", torch.bfloat16), config(), autocast_adapter_dtype=False)
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.bfloat16}

    def test_inference_mode_trains_nothing(self) -> None:
        model = get_peft_model(build("llama", torch.float32), config(inference_mode=True))
        assert not any(parameter.requires_grad for parameter in model.parameters())
