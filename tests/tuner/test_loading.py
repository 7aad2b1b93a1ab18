"""Loading an adapter: all or nothing, the adapter alone, its channels and values as they were saved."""

import copy
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from peft import (
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from adapter_files import CONFIG, PREFIX, WEIGHTS, edit, flip, write_tensors
from families import build, tokens
from live import state, unchanged
from s2ft import AdapterPool, S2FTConfig, S2FTError, any_base, fuse, in_place, merge, read_adapter, switch
from s2ft.format.checksum import checksums
from s2ft.format.slices import Slice
from s2ft.format.validation import header_problems
from s2ft.format.weight_file import Header

RATIOS = {"o_proj": 0.25, "v_proj": 0.5, "down_proj": 0.2}
DOWN = "model.layers.0.mlp.down_proj"


@pytest.fixture
def base() -> nn.Module:
    return build("llama", torch.float32)


def save(base: nn.Module, folder: Path, **options: Any) -> Path:
    config = S2FTConfig(**{"ratios": RATIOS, "init_weights": False, "task_type": "CAUSAL_LM", **options})
    get_peft_model(copy.deepcopy(base), config).save_pretrained(folder)
    return folder


def by_peft(base: nn.Module, folder: Path) -> nn.Module:
    return PeftModel.from_pretrained(base, folder)


def live(base: nn.Module, folder: Path) -> nn.Module:
    model = base if isinstance(base, PeftModel) else get_peft_model(base, S2FTConfig(ratios=0.3))
    model.load_adapter(str(folder), "other")
    return model


def native(base: nn.Module, folder: Path) -> nn.Module:
    base.load_adapter(str(folder), "other")  # type: ignore[operator]
    return base


LOADERS = (by_peft, live, native)
FOREIGN = (
    "model.norm.weight",
    "model.embed_tokens.weight",
    f"{DOWN}.base_layer.weight",
    "model.layers.0.mlp.up_proj.weight",
)


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("loader", LOADERS)
def test_a_file_cannot_overwrite_the_base(
    loader: Callable[..., Any], name: str, base: nn.Module, tmp_path: Path
) -> None:
    folder = save(base, tmp_path / "a")
    shape = base.get_parameter(name.replace(".base_layer", "")).shape
    write_tensors(folder, {**load_file(folder / WEIGHTS), PREFIX + name: torch.full(shape, 7.0)})
    model = get_peft_model(base, S2FTConfig(ratios=0.3)) if loader is live else base
    before = state(model)
    for reader in (lambda: loader(model, folder), lambda: read_adapter(folder), lambda: fuse([folder])):
        with pytest.raises(
            S2FTError, match=rf"{name}' is neither a slice nor what the config declares.*overwrite the base"
        ):
            reader()
    assert unchanged(before, model)


def test_a_state_dict_cannot_overwrite_the_base(base: nn.Module) -> None:
    model = get_peft_model(base, S2FTConfig(ratios=0.3))
    saved = {**get_peft_model_state_dict(model), f"{PREFIX}model.norm.weight": torch.full((24,), 7.0)}
    saved = {name: torch.zeros_like(tensor) if "weight" in name else tensor for name, tensor in saved.items()}
    before = state(model)
    with pytest.raises(S2FTError, match=r"model\.norm\.weight' is no part of the adapter"):
        set_peft_model_state_dict(model, saved)
    assert unchanged(before, model)


def test_an_adapter_without_safetensors_is_checked_as_well(base: nn.Module, tmp_path: Path) -> None:
    model = get_peft_model(copy.deepcopy(base), S2FTConfig(ratios=0.3, init_weights=False))
    model.save_pretrained(tmp_path, safe_serialization=False)
    x = tokens(2, 5)
    assert torch.equal(by_peft(copy.deepcopy(base), tmp_path)(x).logits, model(x).logits)
    tensors = torch.load(tmp_path / "adapter_model.bin", weights_only=True)
    torch.save({**tensors, f"{PREFIX}model.norm.weight": torch.ones(24)}, tmp_path / "adapter_model.bin")
    before = state(base)
    with pytest.raises(S2FTError, match="neither a slice nor"):
        by_peft(base, tmp_path)
    assert unchanged(before, base)


EXTRAS = ({"trainable_token_indices": {"embed_tokens": [1, 5]}}, {"modules_to_save": ["lm_head"]})


@pytest.mark.parametrize("extra", EXTRAS, ids=["tokens", "modules_to_save"])
@pytest.mark.parametrize("loader", LOADERS)
def test_a_load_that_fails_leaves_the_model_and_the_next_one_works(
    loader: Callable[..., Any], extra: dict[str, Any], base: nn.Module, tmp_path: Path
) -> None:
    bad, good = save(base, tmp_path / "bad", **extra), save(base, tmp_path / "good", **extra)
    write_tensors(bad, {name: tensor for name, tensor in load_file(bad / WEIGHTS).items() if "s2ft_block" in name})
    model = get_peft_model(base, S2FTConfig(ratios=0.3)) if loader is live else base
    before = state(model)
    with pytest.raises(S2FTError, match=r"has no token_adapter|lm_head\.weight is missing"):
        loader(model, bad)
    assert unchanged(before, model)
    assert isinstance(loader(model, good), nn.Module)


def test_channels_that_the_config_left_open_are_the_files(base: nn.Module, tmp_path: Path) -> None:
    x = tokens(2, 5)
    model = inject_adapter_in_model(S2FTConfig(ratios=0.4, init_weights=False), copy.deepcopy(base))
    saved = get_peft_model_state_dict(model)
    other = inject_adapter_in_model(S2FTConfig(ratios=0.4, init_weights=False), copy.deepcopy(base))
    assert not set_peft_model_state_dict(other, saved).unexpected_keys
    assert torch.equal(other(x).logits, model(x).logits)
    ours, theirs = other.peft_config["default"], model.peft_config["default"]
    assert (ours.slices, ours.base_digest) == (theirs.slices, theirs.base_digest)
    whole = get_peft_model(copy.deepcopy(base), S2FTConfig(ratios=0.4))
    set_peft_model_state_dict(whole, saved)
    whole.save_pretrained(tmp_path)
    assert torch.equal(by_peft(base, tmp_path)(x).logits, model(x).logits)


def test_adapters_of_one_config_do_not_take_each_others_channels(base: nn.Module, tmp_path: Path) -> None:
    x, config = tokens(2, 5), S2FTConfig(ratios=RATIOS, init_weights=False)
    own = save(base, tmp_path / "own", strategy="random", seed=5)
    model = get_peft_model(copy.deepcopy(base), config, "a")
    before = model(x).logits
    model.add_adapter("b", config)
    model.load_adapter(own, "b")
    model.save_pretrained(tmp_path / "both")
    assert torch.equal(by_peft(base, tmp_path / "both" / "a")(x).logits, before)
    assert torch.equal(by_peft(base, tmp_path / "both" / "b")(x).logits, by_peft(base, own)(x).logits)


def test_a_reference_after_channels_came_from_a_file_has_them_too(base: nn.Module, tmp_path: Path) -> None:
    """As TRL makes it for DPO: by the trained adapter's config, its tensors copied by their names."""
    x, own = tokens(2, 5), save(base, tmp_path / "own", strategy="random", seed=5)
    model = get_peft_model(copy.deepcopy(base), S2FTConfig(ratios=RATIOS))
    model.load_adapter(own, "default", is_trainable=True)
    model.add_adapter("ref", model.peft_config["default"])
    for name, tensor in model.state_dict().items():
        if name.endswith(".default.weight"):
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(tensor)
    expected = model(x).logits
    model.set_adapter("ref")
    assert model.peft_config["ref"].slices == model.peft_config["default"].slices
    assert torch.equal(model(x).logits, expected)


def test_other_channels_inside_in_place_are_refused_as_such(base: nn.Module, tmp_path: Path) -> None:
    own = save(base, tmp_path / "own", strategy="random", seed=5)
    model = get_peft_model(copy.deepcopy(base), S2FTConfig(ratios=RATIOS, seed=6))
    before = state(model)
    with in_place(model), pytest.raises(S2FTError, match="loading other channels is not possible inside"):
        model.load_adapter(own, "default")
    assert unchanged(before, model)


def test_a_compiled_block_is_refused_before_the_adapter_not_after(base: nn.Module) -> None:
    model = copy.deepcopy(base)
    model.model.layers[1] = torch.compile(model.model.layers[1], backend="eager")
    before = state(model)
    with pytest.raises(
        S2FTError, match=r"layers\.1\._orig_mod\..* is compiled: add adapters, and choose channels, first"
    ):
        get_peft_model(model, S2FTConfig(ratios=0.4))
    assert unchanged(before, model)


def test_torchs_own_state_dict_chooses_channels_too_or_changes_nothing(base: nn.Module) -> None:
    x = tokens(2, 5)
    first, second = (get_peft_model(copy.deepcopy(base), S2FTConfig(ratios=0.4, init_weights=False)) for _ in range(2))
    saved = first.state_dict()
    second.load_state_dict(saved)
    assert torch.equal(second(x).logits, first(x).logits)
    assert second.peft_config["default"].slices == first.peft_config["default"].slices
    names = [name for name in saved if name.endswith("default.weight")]
    zeros = {name: torch.zeros_like(tensor) if name in names else tensor for name, tensor in saved.items()}
    before = state(second)
    with pytest.raises(S2FTError, match="not finite"):
        second.load_state_dict({**zeros, names[-1]: torch.full_like(saved[names[-1]], torch.nan)})
    assert unchanged(before, second)


def test_channels_of_a_state_go_to_the_modules_path_where_a_block_is_compiled(base: nn.Module) -> None:
    model, other = (get_peft_model(copy.deepcopy(base), S2FTConfig(ratios=0.4, init_weights=False)) for _ in range(2))
    for each in (model, other):
        blocks = each.base_model.model.model.layers
        blocks[0] = torch.compile(blocks[0], backend="eager")
    modules = set(model.peft_config["default"].slices)
    model.load_state_dict(other.state_dict())
    assert set(model.peft_config["default"].slices) == modules
    assert model.peft_config["default"].slices == other.peft_config["default"].slices


def problems_of(folder: Path) -> list[str]:
    with pytest.raises(S2FTError) as caught:
        read_adapter(folder)
    return caught.value.problems


def test_all_that_is_wrong_with_a_config_is_listed(base: nn.Module, tmp_path: Path) -> None:
    folder = save(base, tmp_path / "a")
    edit(folder, auto_mapping="x", modules_to_save="lm_head")
    found = [problem.partition("=")[0].rpartition(" ")[2] for problem in problems_of(folder)]
    assert found == ["auto_mapping", "modules_to_save"]


def test_what_a_library_repeats_of_a_file_is_printable(base: nn.Module, tmp_path: Path) -> None:
    folder = save(base, tmp_path / "a")
    edit(folder, task_type="\x1b[2J")
    assert problems_of(folder)[0].partition(": ")[2].startswith(r"Invalid task type: '\x1b[2J'")


def test_a_digest_of_foreign_slices_does_not_hide_what_else_is_wrong(base: nn.Module, tmp_path: Path) -> None:
    folder = save(base, tmp_path / "a")
    edit(folder, base_digest={DOWN: "out 1=ab; in 2-=cd"}, checksums=None)
    write_tensors(folder, {**load_file(folder / WEIGHTS), "stranger": torch.ones(2)})
    found = problems_of(folder)
    assert len(found) == 3
    assert all(word in problem for word, problem in zip(("'out 1'", "'in 2-'", "'stranger'"), found, strict=True))


def test_a_flipped_bit_is_named_and_old_files_are_read(base: nn.Module, tmp_path: Path) -> None:
    folder = save(base, tmp_path / "a", modules_to_save=["lm_head"])
    flip(folder / WEIGHTS, -9)
    for reader in (read_adapter, lambda path: by_peft(base, path)):
        with pytest.raises(S2FTError, match=r"is not what was saved: its checksum differs") as error:
            reader(folder)
        assert str(error.value).count("checksum differs") == 1
    edit(folder, checksums=None)
    assert isinstance(by_peft(base, folder), PeftModel)


def test_whatever_writes_an_adapter_writes_its_checksums(base: nn.Module, tmp_path: Path) -> None:
    plain = save(base, tmp_path / "a")
    fuse([plain, save(base, tmp_path / "b")], output=tmp_path / "fused")
    native(copy.deepcopy(base), plain).save_pretrained(tmp_path / "native")  # type: ignore[operator]
    for folder in (plain, tmp_path / "fused", tmp_path / "native"):
        noted = json.loads((folder / CONFIG).read_text())["checksums"]
        assert noted == checksums(load_file(folder / WEIGHTS))
    config = read_adapter(plain).config
    config.save_pretrained(str(tmp_path / "alone"))
    assert json.loads((tmp_path / "alone" / CONFIG).read_text())["checksums"] is None


def test_the_files_say_how_to_load_them(base: nn.Module, tmp_path: Path) -> None:
    folder = save(base, tmp_path / "a")
    for text in (json.loads((folder / CONFIG).read_text())["how_to_load"], (folder / "README.md").read_text()):
        assert "`pip install s2ft`, and `import s2ft` before PEFT or transformers load it" in text
    by_peft(base, folder).save_pretrained(folder)
    assert (folder / "README.md").read_text().count("## How to load") == 1


@pytest.mark.parametrize("empty", [[], "", {}, None])
@pytest.mark.parametrize("loader", LOADERS)
def test_targets_that_are_left_empty_are_those_of_the_slices(
    loader: Callable[..., Any], empty: object, base: nn.Module, tmp_path: Path
) -> None:
    folder = save(base, tmp_path / "a")
    x, plain = tokens(2, 5), by_peft(copy.deepcopy(base), folder)
    expected = plain(x).logits
    edit(folder, target_modules=empty)
    if empty == {}:
        with pytest.raises(S2FTError, match="target_modules="):
            loader(base, folder)
        return
    model = loader(base, folder)
    (model.set_adapter if loader is not by_peft else lambda _: None)("other")
    assert torch.equal(model(x).logits, expected)


def narrow(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    name = f"{PREFIX}{DOWN}.s2ft_block.weight"
    write_tensors(folder, {**tensors, name: tensors[name][1:].contiguous()})


def test_both_dimensions_of_a_delta_are_the_layers(base: nn.Module, tmp_path: Path) -> None:
    base.save_pretrained(tmp_path / "base")  # type: ignore[operator]
    folder = save(base, tmp_path / "a")
    narrow(folder)
    model = get_peft_model(copy.deepcopy(base), S2FTConfig(ratios=0.3))
    readers = (
        lambda: AdapterPool(model, {"a": folder}, 2**24, 0).bring(["a"]),
        lambda: merge(folder, tmp_path / "out", str(tmp_path / "base")),
        lambda: by_peft(base, folder),
    )
    for reader in readers:
        with pytest.raises(S2FTError, match=r"down_proj\S* has shape \[23, 9\]; \D*\[24, 9\]"):
            reader()


def test_slices_are_bounded_by_the_tensors_before_they_take_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    modules = {f"layers.{n}.mlp.down_proj": "in 0-16777214" for n in range(20)}
    config = S2FTConfig(slices=modules, target_modules=set(modules))
    headers = {}
    for module in modules:
        headers[f"{PREFIX}{module}.s2ft_block.weight"] = Header("float32", (8, 2))
        headers[f"{PREFIX}{module}.s2ft_block.indices"] = Header("int64", (2,))
    monkeypatch.setattr(Slice, "parse", lambda text: pytest.fail(f"expanded {text}"))
    problems = list(header_problems(config, headers))
    assert len(problems) == 40
    assert all("16777215 channels" in problem or "differs from" in problem for problem in problems)


def calls(work: Callable[[], object]) -> int:
    """How many functions are called, C's included."""
    count = 0

    def note(_: object, event: str, __: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


def test_the_check_is_linear_in_the_modules() -> None:
    def work(size: int) -> int:
        modules = {f"layers.{n}.mlp.down_proj": "in 0-1" for n in range(size)}
        config = S2FTConfig(slices=modules, target_modules={"down_proj"})
        headers = {f"other.{n}.s2ft_block.weight": Header("float32", (8, 2)) for n in range(size)}
        return calls(lambda: list(header_problems(config, headers)))

    assert work(800) < 2.2 * work(400)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_what_is_no_regular_file_is_refused_at_once(name: str, base: nn.Module, tmp_path: Path) -> None:
    folder = save(base, tmp_path / "a")
    (folder / name).unlink()
    os.mkfifo(folder / name)
    for reader in (read_adapter, lambda path: by_peft(base, path)):
        with pytest.raises(S2FTError, match="is no regular file"):
            reader(folder)


def test_values_that_the_base_cannot_add_up_are_warned_of(base: nn.Module, tmp_path: Path) -> None:
    folder = save(base, tmp_path / "a")
    tensors = load_file(folder / WEIGHTS)
    tensors[f"{PREFIX}{DOWN}.s2ft_block.weight"][0, 0] = 3e38
    write_tensors(folder, tensors)
    with pytest.warns(UserWarning, match=r"weights by up to 3e\+38, which the base's torch.float32 cannot add up"):
        by_peft(copy.deepcopy(base), folder)
    model = get_peft_model(base, S2FTConfig(ratios=0.25, seed=1)).eval()
    pool = AdapterPool(model, {"large": folder}, device_bytes=2**20, host_bytes=0)
    with pytest.warns(UserWarning, match=r"up to 3e\+38"):
        pool.bring(["large"])


def foreign(base: nn.Module, folder: Path) -> Path:
    """An adapter of the same channels as any of seed 5, made for a base with other weights."""
    other = copy.deepcopy(base)
    with torch.no_grad():
        other.get_parameter(f"{DOWN}.weight").mul_(2)
    return save(other, folder, strategy="random", seed=5)


def on_the_hub(folder: Path, cache: Path) -> dict[str, Any]:
    """The arguments by which PEFT finds a folder as a name on the Hub, as if it were downloaded already."""
    snapshot = cache / "models--me--adapter" / "snapshots" / ("0" * 40)
    shutil.copytree(folder, snapshot)
    (cache / "models--me--adapter" / "refs").mkdir()
    (cache / "models--me--adapter" / "refs" / "main").write_text("0" * 40)
    return {"model_id": "me/adapter", "cache_dir": str(cache)}


def by_peft_from_the_hub(base: nn.Module, hub: dict[str, Any]) -> nn.Module:
    return PeftModel.from_pretrained(base, **hub)


def live_from_the_hub(base: nn.Module, hub: dict[str, Any]) -> nn.Module:
    model = get_peft_model(base, S2FTConfig(ratios=0.3))
    model.load_adapter(adapter_name="other", **hub)
    return model


def native_from_the_hub(base: nn.Module, hub: dict[str, Any]) -> nn.Module:
    base.load_adapter(hub["model_id"], "other", adapter_kwargs={"cache_dir": hub["cache_dir"]})  # type: ignore[operator]
    return base


def spoil(folder: Path) -> None:
    flip(folder / WEIGHTS, -9)


def add_a_stranger(folder: Path) -> None:
    write_tensors(folder, {**load_file(folder / WEIGHTS), f"{PREFIX}model.norm.weight": torch.full((24,), 7.0)})
    edit(folder, checksums=None)


@pytest.mark.parametrize("loader", [by_peft_from_the_hub, live_from_the_hub, native_from_the_hub])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (spoil, "is not what was saved: its checksum differs"),
        (add_a_stranger, "overwrite the base"),
        (None, rf"made for another base.*the first is {DOWN}"),
    ],
)
def test_a_name_on_the_hub_is_checked_as_a_folder_is(
    loader: Callable[..., Any],
    change: Callable[[Path], None] | None,
    message: str,
    base: nn.Module,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    bad, good = (
        foreign(base, tmp_path / "a") if change is None else save(base, tmp_path / "a"),
        save(base, tmp_path / "b"),
    )
    if change is not None:
        change(bad)
    before, values = state(base), {name: value.clone() for name, value in base.state_dict().items()}
    with pytest.raises(S2FTError, match=message):
        loader(base, on_the_hub(bad, tmp_path / "bad"))
    if loader is live_from_the_hub:
        base = build("llama", torch.float32)
        base.load_state_dict(values)
    else:
        assert unchanged(before, base)
    loaded, x = loader(base, on_the_hub(good, tmp_path / "good")), tokens(2, 5)
    (loaded.set_adapter if loader is not by_peft_from_the_hub else lambda _: None)("other")
    twin = build("llama", torch.float32)
    twin.load_state_dict(values)
    assert torch.equal(loaded(x).logits, by_peft(twin, good)(x).logits)


def test_transformers_checks_a_name_on_the_hub_that_it_loads_with_its_base(
    base: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    base.save_pretrained(tmp_path / "base")  # type: ignore[operator]
    folder, x = save(base, tmp_path / "a"), tokens(2, 5)
    edit(folder, base_model_name_or_path=str(tmp_path / "base"))

    def load(cache: Path) -> nn.Module:
        on_the_hub(folder, cache)
        found: nn.Module = AutoModelForCausalLM.from_pretrained(
            "me/adapter", cache_dir=str(cache), adapter_kwargs={"cache_dir": str(cache)}
        )
        return found

    assert torch.equal(load(tmp_path / "good")(x).logits, by_peft(base, folder)(x).logits)
    add_a_stranger(folder)
    with pytest.raises(S2FTError, match="overwrite the base"):
        load(tmp_path / "bad")


def pickled(folder: Path) -> dict[str, Any]:
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()
    edit(folder, checksums=None)
    return {"model_id": str(folder)}


KEPT = ("safetensors", "pickled", "hub")
HELD = {
    "active": lambda model: None,
    "merged": lambda model: model.merge_adapter(),
    "switched": lambda model: switch(model, "default"),
}


@pytest.mark.parametrize("held", HELD)
@pytest.mark.parametrize("kept", KEPT)
def test_an_adapter_of_another_base_does_not_take_the_place_of_one(
    kept: str, held: str, base: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    folder = foreign(base, tmp_path / "a")
    found = {
        "safetensors": lambda: {"model_id": folder},
        "pickled": lambda: pickled(folder),
        "hub": lambda: on_the_hub(folder, tmp_path / "cache"),
    }[kept]()
    config = S2FTConfig(ratios=RATIOS, strategy="random", seed=5, init_weights=False)
    model = get_peft_model(base, config).eval()
    HELD[held](model)
    before = state(model)
    with pytest.raises(S2FTError, match=rf"made for another base.*the first is {DOWN}"):
        model.load_adapter(adapter_name="default", **found)
    assert unchanged(before, model)
    with any_base():
        model.load_adapter(adapter_name="default", **found)


def test_a_checkpoint_of_another_base_is_refused_inside_in_place_and_ones_own_is_not(
    base: nn.Module, tmp_path: Path
) -> None:
    folder = foreign(base, tmp_path / "a")
    model = get_peft_model(base, S2FTConfig(ratios=RATIOS, strategy="random", seed=5, init_weights=False))
    model.save_pretrained(tmp_path / "own")
    with in_place(model):
        with pytest.raises(S2FTError, match="made for another base"):
            model.load_adapter(folder, "default")
        model.load_adapter(tmp_path / "own", "default")


def test_channels_that_were_left_open_are_those_of_a_file_of_this_base(base: nn.Module, tmp_path: Path) -> None:
    folder = foreign(base, tmp_path / "a")
    own = save(base, tmp_path / "own", strategy="random", seed=5)
    model = get_peft_model(copy.deepcopy(base), S2FTConfig(ratios=RATIOS))
    before = state(model)
    with pytest.raises(S2FTError, match="made for another base"):
        model.load_adapter(folder, "default")
    assert unchanged(before, model)
    model.load_adapter(own, "default")
    x = tokens(2, 5)
    assert torch.equal(model(x).logits, by_peft(base, own)(x).logits)
