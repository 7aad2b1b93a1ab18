"""What the package uses of other libraries that is private there: each name with the behaviour that we rely on.

A new version of a library may change these without a word. `USED` is complete: a test finds the names in the source.
"""

import inspect
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import transformers
from accelerate.hooks import ModelHook, add_hook_to_module
from packaging.version import Version
from peft import LoraConfig, PeftType, get_peft_model
from peft.tuners import tuners_utils
from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch._C import _autograd
from torch._compile import _disable_dynamo
from torch.nn.parallel.replicate import replicate
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.core_model_loading import ConversionOps, WeightConverter, revert_weight_conversion
from trl import DPOTrainer, KTOTrainer, RewardTrainer
from trl.experimental.orpo import ORPOTrainer
from trl.trainer import utils

from mixtures import mixture
from private_names import private_names
from source import MODULES, SOURCE

Check = Callable[[], None]


def takes(owner: Any, name: str, *wanted: str) -> None:
    """The method has these parameters, and whatever else it has besides has a default."""
    parameters = inspect.signature(getattr(owner, name)).parameters
    assert list(parameters)[: len(wanted)] == list(wanted)
    rest = list(parameters.values())[len(wanted) :]
    assert all(one.default is not one.empty or one.kind in (one.VAR_POSITIONAL, one.VAR_KEYWORD) for one in rest)


def llama() -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2)
    )


def lora(**settings: Any) -> Any:
    return get_peft_model(llama(), LoraConfig(target_modules=["q_proj"], **settings))


# ---- torch -----------------------------------------------------------------------------------------------------------


def apply_is_how_modules_are_cast() -> None:
    takes(nn.Module, "_apply", "self", "fn", "recurse")
    seen = []

    class Noted(nn.Linear):
        def _apply(self, fn: Any, recurse: bool = True) -> Any:
            seen.append(fn(torch.zeros(1)).dtype)
            return super()._apply(fn, recurse)

    nn.Sequential(Noted(2, 2)).to(torch.float64)
    assert seen == [torch.float64]


def save_to_state_dict_is_called_with_a_prefix() -> None:
    class Without(nn.Linear):
        def _save_to_state_dict(self, destination, prefix, keep_vars):
            super()._save_to_state_dict(destination, prefix, keep_vars)
            destination.pop(f"{prefix}bias")

    assert set(nn.Sequential(Without(2, 2)).state_dict()) == {"0.weight"}


def load_from_state_dict_is_called_with_all_keys_and_a_prefix() -> None:
    wanted = ("state_dict", "prefix", "local_metadata", "strict", "missing_keys", "unexpected_keys", "error_msgs")
    takes(nn.Module, "_load_from_state_dict", "self", *wanted)
    seen = {}

    class Noted(nn.Linear):
        def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
            seen[prefix] = set(state_dict)
            super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    model = nn.ModuleDict({"layer": Noted(2, 2)})
    model.load_state_dict(model.state_dict())
    assert {key for keys in seen.values() for key in keys} >= {"layer.weight", "layer.bias"}
    assert list(seen) == ["layer."]


def hooks_stand_in_a_dict_by_their_handle() -> None:
    layer, calls = nn.Linear(2, 2), []
    handle = layer.register_forward_hook(lambda *_: calls.append("removed"))
    layer.register_forward_hook(lambda *_: calls.append("kept"))
    assert next(iter(layer._forward_hooks)) == handle.id
    layer._forward_hooks.pop(handle.id)
    layer(torch.zeros(2))
    assert calls == ["kept"]


def a_view_knows_its_base() -> None:
    base = torch.zeros(4)
    assert base._base is None
    assert base[:2]._base is base


def a_version_counts_writes() -> None:
    tensor = torch.zeros(2)
    before = tensor._version
    tensor.add_(1)
    assert tensor._version == before + 1
    tensor.data.add_(1)
    assert tensor._version == before + 1


def a_view_tells_how_it_was_made() -> None:
    base = torch.zeros(4, requires_grad=True).clone()
    with torch.no_grad():
        without = base[:2]
    assert _autograd._get_creation_meta(base[:2]) == _autograd.CreationMeta.DEFAULT
    assert _autograd._get_creation_meta(without) == _autograd.CreationMeta.NO_GRAD_MODE


def the_gradient_of_a_bags_weights_is_a_dot_product() -> None:
    grad, table = torch.randn(2, 3), torch.randn(5, 3)
    rows, bags = torch.tensor([4, 0, 2]), torch.tensor([0, 2])
    backward = torch.ops.aten._embedding_bag_per_sample_weights_backward
    found = backward(grad, table, rows, bags, torch.tensor([0, 0, 1]), 0)
    torch.testing.assert_close(found, (grad[[0, 0, 1]] * table[rows]).sum(-1))


def a_function_is_kept_from_torchs_compiler() -> None:
    seen = []

    @_disable_dynamo
    def plain(x: Tensor) -> Tensor:
        seen.append(torch.compiler.is_compiling())
        return x + 1

    assert torch.equal(torch.compile(lambda x: plain(x * 2) * 3, backend="eager")(torch.ones(2)), torch.full((2,), 9.0))
    assert seen == [False]


def copies_for_several_gpus_are_made_by_a_method() -> None:
    takes(nn.Module, "_replicate_for_data_parallel", "self")
    assert "_replicate_for_data_parallel" in inspect.getsource(replicate)


def the_cpu_says_whether_it_has_bf16() -> None:
    assert isinstance(torch.cpu._is_avx512_bf16_supported(), bool)


# ---- transformers, accelerate, quanto, Python ------------------------------------------------------------


def a_blocks_checkpoint_function_says_whether_it_is_reentrant() -> None:
    model = llama().train()
    for reentrant in (True, False):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        for block in model.model.layers:
            assert block._gradient_checkpointing_func.keywords["use_reentrant"] is reentrant


def experts_know_their_gate() -> None:
    experts = mixture("gpt-oss", torch.float32).model.layers[0].mlp.experts
    rows, x = torch.randn(3, 48), torch.randn(3, 32)
    gate, up = rows[:, ::2].clamp(max=experts.limit), rows[:, 1::2].clamp(-experts.limit, experts.limit)
    torch.testing.assert_close(experts._apply_gate(rows), (up + 1) * gate * torch.sigmoid(gate * experts.alpha))
    if Version(transformers.__version__) >= Version(
        "5.23"
    ):  # before, such experts are known as part of a model that is split
        assert experts._is_expert_parallel is False
    assert (experts.has_gate, experts.is_transposed, experts.is_concatenated) == (True, True, False)
    assert experts(x, torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1)).shape == x.shape


def an_offloading_hook_stands_on_the_module() -> None:
    layer = nn.Linear(2, 2)
    assert not hasattr(layer, "_hf_hook")
    add_hook_to_module(layer, ModelHook())
    assert hasattr(layer, "_hf_hook")


def quantos_weights_know_their_group_size() -> None:
    quanto = pytest.importorskip("optimum.quanto")
    makers = [cls.__init__ for cls in quanto.WeightQBitsTensor.__mro__ if "__init__" in vars(cls)]
    assert any("_group_size" in maker.__code__.co_names for maker in makers if hasattr(maker, "__code__"))


def the_enum_has_the_member_as_if_it_had_been_written_there() -> None:
    """PEFT's enum is closed; `format/registration.py` adds to what Python's enums look their members up in."""
    member = PeftType("S2FT")
    assert (member.name, member.value, member) == ("S2FT", "S2FT", "S2FT")
    assert PeftType["S2FT"] is PeftType.S2FT is member
    assert member in list(PeftType)
    assert len(PeftType) == len(list(PeftType)) == len(PeftType.__members__)


# ---- PEFT ------------------------------------------------------------------------------------------------------------


def a_layer_keeps_which_adapters_are_active_and_whether_they_are_disabled() -> None:
    layer = next(module for module in lora().modules() if isinstance(module, BaseTunerLayer))
    assert (layer._disable_adapters, layer._active_adapter) == (False, ["default"])
    layer.enable_adapters(False)
    assert layer._disable_adapters is layer.disable_adapters is True


def a_saved_module_knows_its_adapters() -> None:
    model = lora(modules_to_save=["lm_head"])
    wrapper = next(module for module in model.modules() if isinstance(module, AuxiliaryTrainingWrapper))
    assert wrapper._adapters == {"default"}


def all_linear_becomes_the_names_of_layers() -> None:
    takes(tuners_utils, "_maybe_include_all_linear_layers", "peft_config", "model")
    config = tuners_utils._maybe_include_all_linear_layers(LoraConfig(target_modules="all-linear"), llama())
    names = {path.rpartition(".")[2] for path in config.target_modules}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def an_excluded_target_is_marked() -> None:
    config = LoraConfig(target_modules=["q_proj"], exclude_modules=["q_proj"])
    found = tuners_utils.check_target_module_exists(config, "model.layers.0.self_attn.q_proj")
    assert isinstance(found, tuners_utils._ExcludedModule)
    assert not found


def an_adapters_name_goes_out_of_a_key() -> None:
    assert LoraModel._remove_adapter_name_from_key("a.lora_A.first.weight", "first") == "a.lora_A.weight"


STATE = ("model", "config", "adapter_name", "state_dict")
# ---- TRL -------------------------------------------------------------------------------------------------------------


def a_trainer_prepares_its_data_by_a_method() -> None:
    for trainer in (DPOTrainer, KTOTrainer, RewardTrainer):
        takes(trainer, "_prepare_dataset", "self", "dataset", "processing_class", "args", "dataset_name")


def what_a_trainer_will_log_stands_in(name: str, *trainers: type) -> None:
    for trainer in trainers:
        methods = [method for method in vars(trainer).values() if hasattr(method, "__code__")]
        assert any(name in method.__code__.co_names for method in methods)


def trls_head_reads_the_size_of_its_tiles_when_it_is_called() -> None:
    assert utils._CHUNKED_LOGPROB_CHUNK_SIZE >= 1
    assert "_CHUNKED_LOGPROB_CHUNK_SIZE" in inspect.getsource(utils.add_fused_lm_head)


def a_model_is_saved_by_the_conversions_that_it_notes() -> None:
    """Without the note, by those of its class."""
    model = llama()
    model._weight_conversions = [
        WeightConverter("weight", "weight", [type("Op", (ConversionOps,), {"convert": None})()])
    ]
    with pytest.raises(NotImplementedError):
        revert_weight_conversion(model, model.state_dict())
    del model._weight_conversions
    assert revert_weight_conversion(model, model.state_dict()).keys() == model.state_dict().keys()


USED: dict[str, Check] = {
    "_CHUNKED_LOGPROB_CHUNK_SIZE": trls_head_reads_the_size_of_its_tiles_when_it_is_called,
    "_apply": apply_is_how_modules_are_cast,
    "_load_from_state_dict": load_from_state_dict_is_called_with_all_keys_and_a_prefix,
    "_save_to_state_dict": save_to_state_dict_is_called_with_a_prefix,
    "_forward_hooks": hooks_stand_in_a_dict_by_their_handle,
    "_base": a_view_knows_its_base,
    "_version": a_version_counts_writes,
    "CreationMeta": a_view_tells_how_it_was_made,
    "_get_creation_meta": a_view_tells_how_it_was_made,
    "_embedding_bag_per_sample_weights_backward": the_gradient_of_a_bags_weights_is_a_dot_product,
    "_is_avx512_bf16_supported": the_cpu_says_whether_it_has_bf16,
    "_gradient_checkpointing_func": a_blocks_checkpoint_function_says_whether_it_is_reentrant,
    "_disable_dynamo": a_function_is_kept_from_torchs_compiler,
    "_replicate_for_data_parallel": copies_for_several_gpus_are_made_by_a_method,
    "_apply_gate": experts_know_their_gate,
    "_is_expert_parallel": experts_know_their_gate,
    "_hf_hook": an_offloading_hook_stands_on_the_module,
    "_prepare_dataset": a_trainer_prepares_its_data_by_a_method,
    "_metrics": partial(what_a_trainer_will_log_stands_in, "_metrics", DPOTrainer, KTOTrainer, RewardTrainer),
    "_total_train_tokens": partial(
        what_a_trainer_will_log_stands_in, "_total_train_tokens", DPOTrainer, KTOTrainer, RewardTrainer
    ),
    "_stored_metrics": partial(what_a_trainer_will_log_stands_in, "_stored_metrics", ORPOTrainer),
    "_weight_conversions": a_model_is_saved_by_the_conversions_that_it_notes,
    "_group_size": quantos_weights_know_their_group_size,
    **dict.fromkeys(
        ("_name_", "_value_", "_sort_order_", "_member_names_", "_member_map_", "_value2member_map_"),
        the_enum_has_the_member_as_if_it_had_been_written_there,
    ),
    "_active_adapter": a_layer_keeps_which_adapters_are_active_and_whether_they_are_disabled,
    "_disable_adapters": a_layer_keeps_which_adapters_are_active_and_whether_they_are_disabled,
    "_adapters": a_saved_module_knows_its_adapters,
    "_maybe_include_all_linear_layers": all_linear_becomes_the_names_of_layers,
    "_ExcludedModule": an_excluded_target_is_marked,
    "_remove_adapter_name_from_key": an_adapters_name_goes_out_of_a_key,
    # What each of these does for S²FT is in tests/hosts/test_peft.py; here, that PEFT still asks for them in this form
    "_cast_adapter_dtype": partial(takes, BaseTuner, "_cast_adapter_dtype", "self", "adapter_name", "autocast_adapter_dtype"),
    "_check_merge_allowed": partial(takes, BaseTuner, "_check_merge_allowed", "self"),
    "_check_target_module_exists": partial(takes, BaseTuner, "_check_target_module_exists", "peft_config", "key"),
    "_create_and_replace": partial(
        takes, BaseTuner, "_create_and_replace",
        "self", "peft_config", "adapter_name", "target", "target_name", "parent", "current_key",
    ),
    "_enable_adapter_layers": partial(takes, BaseTuner, "_enable_adapter_layers", "self", "enabled"),
    "_get_adapter_state_dict": partial(takes, BaseTuner, "_get_adapter_state_dict", *STATE, "unwanted_adapter_names"),
    "_move_adapter_to_device_of_base_layer": partial(
        takes, BaseTunerLayer, "_move_adapter_to_device_of_base_layer", "self", "adapter_name", "device"
    ),
    "_remap_adapter_state_dict_for_load": partial(takes, BaseTuner, "_remap_adapter_state_dict_for_load", *STATE),
    "_replace_module": partial(takes, BaseTuner, "_replace_module", "self", "parent", "child_name", "new_module", "child"),
    "_unload_and_optionally_merge": partial(
        takes, BaseTuner, "_unload_and_optionally_merge", "self", "merge", "progressbar", "safe_merge", "adapter_names"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", USED)
def test_a_private_name_does_what_we_rely_on(name: str) -> None:
    USED[name]()


def test_the_list_is_complete() -> None:
    found = private_names()
    assert {name: places for name, places in found.items() if name not in USED} == {}
    assert set(USED) - set(found) == set()


def test_every_exception_for_a_private_member_gives_its_reason() -> None:
    lines = [
        (path, line) for path in MODULES for line in path.read_text(encoding="utf-8").split("\n") if "SLF001" in line
    ]
    for path, line in lines:
        assert re.search(r"# noqa: SLF001 - \w+", line), f"{path.relative_to(SOURCE)}: {line.strip()}"


def test_the_page_on_dependencies_names_them_all() -> None:
    page = (SOURCE.parents[1] / "docs" / "dependencies.md").read_text(encoding="utf-8")
    assert {name for name in USED if f"`{name}`" not in page} == set()
