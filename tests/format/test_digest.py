"""An adapter of a quantised base knows its base again, quantised or plain, and no other."""

import base64
import copy
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

from families import build
from quantised import QUANTISED, Grid, stand_in
from s2ft import S2FTConfig, S2FTError, any_base, fuse, select
from s2ft.format.digest import agree, slice_digest
from s2ft.format.sketch import LIKE, SIZE, cosine, sketch

CONFIG = {"ratios": {"o_proj": 0.5, "up_proj": 0.3, "down_proj": 0.3}, "seed": 0, "init_weights": False}


def plain(seed: int = 3) -> nn.Module:
    before = torch.get_rng_state()
    torch.manual_seed(seed)
    model = build("llama", torch.float32)
    torch.set_rng_state(before)
    return model


def trained_on(model: nn.Module, folder: Path) -> Path:
    get_peft_model(model, S2FTConfig(**CONFIG)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", QUANTISED)
def test_an_adapter_of_a_quantised_base_knows_it_again(kind: str, tmp_path: Path) -> None:
    adapter = trained_on(QUANTISED[kind](plain()), tmp_path / "adapter")
    digests = json.loads((adapter / "adapter_config.json").read_text())["base_digest"]
    assert len(digests) == 9
    PeftModel.from_pretrained(QUANTISED[kind](plain()), adapter)
    PeftModel.from_pretrained(plain(), adapter)
    PeftModel.from_pretrained(stand_in(plain(), levels=100), adapter)  # another quantisation of the same base
    for other in (plain(seed=4), QUANTISED[kind](plain(seed=4))):
        with pytest.raises(S2FTError, match=r"made for another base.* 9 of 9 modules hold other weights"):
            PeftModel.from_pretrained(other, adapter)
        with any_base():
            PeftModel.from_pretrained(other, adapter)


@pytest.mark.parametrize("kind", QUANTISED)
def test_an_adapter_of_a_plain_base_knows_the_quantised_one(kind: str, tmp_path: Path) -> None:
    adapter = trained_on(plain(), tmp_path / "adapter")
    PeftModel.from_pretrained(QUANTISED[kind](plain()), adapter)
    with pytest.raises(S2FTError, match="made for another base"):
        PeftModel.from_pretrained(QUANTISED[kind](plain(seed=4)), adapter)


def test_on_the_same_grid_a_fine_tuned_relative_is_told_apart(tmp_path: Path) -> None:
    adapter = trained_on(stand_in(plain()), tmp_path / "adapter")
    relative = plain()
    with torch.no_grad():
        for parameter in relative.parameters():
            parameter.add_(0.2 * parameter.std() * torch.randn_like(parameter))
    PeftModel.from_pretrained(copy.deepcopy(relative), adapter)  # within what a quantisation changes
    with pytest.raises(S2FTError, match="made for another base"):
        PeftModel.from_pretrained(stand_in(relative), adapter)


@pytest.mark.parametrize("kind", QUANTISED)
def test_nothing_of_a_quantised_model_is_changed_by_its_digest(kind: str) -> None:
    model = QUANTISED[kind](plain())
    weights = [module.weight for module in model.modules() if isinstance(getattr(module, "weight", None), nn.Parameter)]
    x = torch.randint(3, 60, (1, 5))
    with torch.no_grad():
        before = model.train()(x).logits  # in evaluation, bitsandbytes repacks on the CPU
    tuned = get_peft_model(model, S2FTConfig(ratios=0.3, seed=0))
    assert tuned.peft_config["default"].base_digest
    held = {id(parameter) for parameter in tuned.parameters()}
    assert all(id(weight) in held for weight in weights)
    with torch.no_grad():
        assert torch.equal(tuned.train()(x).logits, before)


def test_what_nobody_can_dequantise_has_no_digest_and_still_trains() -> None:
    class Unknown(Grid):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is nn.functional.linear and args[0].dim() == 2:
                raise TypeError("this kernel takes batches only")
            return super().__torch_function__(func, types, args, kwargs)

    Unknown.__module__ = "elsewhere"
    model = plain()
    for layer in model.model.layers:
        layer.mlp.down_proj.weight = nn.Parameter(Unknown(layer.mlp.down_proj.weight.data), requires_grad=False)
    with pytest.raises(
        S2FTError, match=r"the weight of model\.layers\.0\.mlp\.down_proj is a Unknown, as quantisation"
    ):
        select(model, S2FTConfig(ratios=0.5, strategy="weight"))
    tuned = get_peft_model(model, S2FTConfig(ratios={"o_proj": 0.5, "down_proj": 0.3}, seed=0))
    assert {path.rpartition(".")[2] for path in tuned.peft_config["default"].base_digest} == {"o_proj"}
    ids = torch.randint(3, 60, (2, 5))
    tuned(ids, labels=ids).loss.backward()
    assert all(parameter.grad.any() for parameter in tuned.parameters() if parameter.requires_grad)


def test_sharded_weights_are_gathered_for_scores_and_digests() -> None:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model = plain()
        mesh = init_device_mesh("cpu", (1,))
        for layer in model.model.layers:
            down = layer.mlp.down_proj
            down.weight = nn.Parameter(distribute_tensor(down.weight.data, mesh, [Shard(0)]))
        for strategy in ("product", "gradient"):
            config = S2FTConfig(ratios={"down_proj": 0.5}, strategy=strategy)
            with pytest.raises(S2FTError, match=r"runs the model, but the weight of .*down_proj is a DTensor, sharded"):
                select(model, config, iter([{"input_ids": "not read"}]))
        for strategy in ("weight", "lift", "random"):
            config = S2FTConfig(budget=0.05, strategy=strategy, seed=0 if strategy == "random" else None)
            expected = get_peft_model(plain(), config).peft_config["default"]
            found = get_peft_model(copy.deepcopy(model), config).peft_config["default"]
            assert (found.slices, found.base_digest) == (expected.slices, expected.base_digest)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("strategy", ["activation", "saliency"])
def test_a_part_of_the_activations_is_not_taken_for_the_whole(strategy: str) -> None:
    """As under tensor parallelism: each process feeds its part of the heads into its part of o."""
    model = plain()
    output = model.model.layers[1].self_attn.o_proj
    output.forward = lambda x: nn.functional.linear(x, output.weight[:, : x.shape[-1]], output.bias)
    output.register_forward_pre_hook(lambda _, given: (given[0][..., :20],))
    with pytest.raises(S2FTError, match=r"1\.self_attn\.o_proj gets 20 of its 40 input channels in this process"):
        select(model, S2FTConfig(ratios=0.5, strategy=strategy), [{"input_ids": torch.randint(3, 60, (1, 5))}])


def test_digests_of_before_are_read_and_damaged_sketches_agree_with_nothing() -> None:
    weight = torch.randn(30, 20)
    now, quantised = slice_digest(weight), slice_digest(weight + 0.01, grid="int8")
    before = now.partition("~")[0]
    assert len(before) == 32
    assert agree(before, now)
    assert not agree(before, slice_digest(weight.T.contiguous()))
    assert agree(before, quantised)  # nothing to compare
    for damaged in ("~?", "~AAAA", "int8~" + "A" * 86, now + "x"):
        assert not agree(damaged, quantised)


def test_fusing_takes_adapters_of_a_base_and_of_its_quantised_copy(tmp_path: Path) -> None:
    one, two = trained_on(plain(), tmp_path / "a"), trained_on(stand_in(plain()), tmp_path / "b")
    fuse([one, two], output=tmp_path / "both")
    PeftModel.from_pretrained(plain(), tmp_path / "both")
    with pytest.raises(S2FTError, match="made for different bases"):
        fuse([one, trained_on(stand_in(plain(seed=4)), tmp_path / "c")])


@pytest.mark.parametrize("shape", [(1, 3), (7, 5), (64, 1), (200, 33)])
def test_a_sketch_keeps_the_angle(shape: tuple[int, int]) -> None:
    """Against the cosine of the values themselves; the sketch's own error is 1/√64 where they are unrelated."""
    for mixed in (0.0, 0.05, 0.3):
        errors, unlike = [], []
        for _ in range(11):  # one alone may lie 3σ away
            a, b = torch.randn(shape), torch.randn(shape)
            other = (1 - mixed) * a + mixed * b
            exact = float(torch.nn.functional.cosine_similarity(a.flatten(), other.flatten(), dim=0))
            errors.append(cosine(sketch(a), sketch(other)) - exact)
            unlike.append(1 - exact)
        assert abs(np.median(errors)) <= 0.02 + 0.25 * np.median(unlike)
    assert cosine(sketch(a), sketch(-a)) == pytest.approx(-1)


def test_a_sketch_is_the_signed_sums_that_its_picture_shows() -> None:
    """Against a loop, on more values than are read at once."""
    values = torch.randn(1000, 601).bfloat16()
    bits = np.unpackbits(np.frombuffer(hashlib.shake_128(b"(1000, 601)").digest(601000 // 8), np.uint8))
    sums = np.zeros(64)
    np.add.at(sums, np.arange(601000) % 64, values.double().flatten().numpy() * np.where(bits, 1, -1))
    expected = np.rint(sums / np.abs(sums).max() * 127).astype(np.int8)
    assert np.abs(np.frombuffer(base64.urlsafe_b64decode(sketch(values) + "=="), np.int8) - expected).max() <= 1


def test_unrelated_weights_are_far_from_alike() -> None:
    found = np.array([cosine(sketch(torch.randn(40, 30)), sketch(torch.randn(40, 30))) for _ in range(200)])
    assert np.abs(found).max() < LIKE + 0.1
    assert (np.abs(found) > LIKE).sum() <= 1
    assert found.std() == pytest.approx(SIZE**-0.5, rel=0.3)


def test_zeros_and_what_is_not_finite_have_no_sketch() -> None:
    assert sketch(torch.zeros(3, 4)) is None
    assert sketch(torch.full((3, 4), torch.nan)) is None
    assert "~" not in slice_digest(torch.zeros(3, 4))
