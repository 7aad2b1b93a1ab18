"""Adapter files are read without a base, checked, and described as they are."""

import copy
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from adapter_files import edit
from families import FAMILIES, build, tokens
from s2ft import S2FTConfig, S2FTError, any_base
from s2ft.adapters.file import read_adapter
from s2ft.adapters.inspection import changes, draw, summary
from s2ft.cli.inspect import table
from s2ft.cli.tables import print_table
from s2ft.format import weight_file
from s2ft.format.digest import agree, slice_digest
from s2ft.format.slices import Slice
from s2ft.layer.linear import S2FTLinear
from s2ft.training.plan import planned


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    config = S2FTConfig(
        ratios={"o_proj": 0.5, "v_proj": 0.5, "down_proj": 0.2}, init_weights=False, task_type="CAUSAL_LM"
    )
    get_peft_model(build("llama", torch.float32), config).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_read_is_what_the_model_holds(family: str, tmp_path: Path) -> None:
    model = get_peft_model(build(family, torch.float32), S2FTConfig(ratios=0.3, init_weights=False))
    model.save_pretrained(tmp_path)
    adapter = read_adapter(tmp_path)
    layers = {n.removeprefix("base_model.model."): m for n, m in model.named_modules() if isinstance(m, S2FTLinear)}
    assert set(adapter.deltas) == set(layers)
    for path, layer in layers.items():
        block = layer.s2ft_block["default"]
        assert torch.equal(adapter.deltas[path], block.weight)
        assert adapter.slices[path].indices.tolist() == block.indices.tolist()
    assert adapter.parameters == model.get_nb_trainable_parameters()[0]


def test_inspection_counts_and_norms(saved: Path) -> None:
    adapter = read_adapter(saved)
    rows = changes(adapter)
    assert [row.layer for row in rows] == [0] * 3 + [1] * 3 + [2] * 3
    by_module = {row.module: row for row in rows}
    o_proj = by_module["model.layers.1.self_attn.o_proj"]
    delta = load_file(saved / "adapter_model.safetensors")[
        "base_model.model.model.layers.1.self_attn.o_proj.s2ft_block.weight"
    ]
    assert (o_proj.side, o_proj.channels, o_proj.weights) == ("in", 20, 480)
    assert o_proj.norm == pytest.approx(float(torch.linalg.vector_norm(delta.double())), rel=1e-9)
    assert o_proj.largest == float(delta.abs().max())
    assert summary(adapter)["weights"] == sum(row.weights for row in rows)
    assert table(adapter).row_count == 9


def test_inspection_says_how_the_layout_would_hold_each_slice(saved: Path) -> None:
    adapter = read_adapter(saved)
    assert {row.in_place for row in changes(adapter)} == {None}
    with torch.device("meta"):
        base = build("llama", torch.float32)
    assert {row.in_place for row in changes(adapter, base)} == {"contiguous"}
    parts_of_heads = {path: Slice.parse("in 0-4,35-39") for path in adapter.slices if path.endswith("o_proj")}
    assert {place.how for place in planned(base, parts_of_heads)} == {"gathered"}
    assert [str(row) for row in table(adapter, base).columns[-1].cells] == ["contiguous"] * 9


def test_the_drawing_is_a_picture(saved: Path, tmp_path: Path) -> None:
    draw(read_adapter(saved), tmp_path / "channels.png")
    assert (tmp_path / "channels.png").read_bytes().startswith(b"\x89PNG")


def edit_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors, next(name for name in tensors if name.endswith("layers.0.mlp.down_proj.s2ft_block.weight")))
    save_file(tensors, folder / "adapter_model.safetensors")


DAMAGE = {
    "no adapter: there is no adapter_config.json": lambda f: (f / "adapter_config.json").unlink(),
    "is not JSON": lambda f: (f / "adapter_config.json").write_text("{"),
    "peft_type is 'LORA'": lambda f: edit(f, peft_type="LORA"),
    "names no slices": lambda f: edit(f, slices=None),
    "is no slice": lambda f: edit(f, slices={"model.layers.0.mlp.down_proj": "up 3"}),
    "strategy='best' is unknown": lambda f: edit(f, strategy="best"),
    "no adapter weights": lambda f: (f / "adapter_model.safetensors").unlink(),
    "truncated or no safetensors": lambda f: (f / "adapter_model.safetensors").write_bytes(
        (f / "adapter_model.safetensors").read_bytes()[:-50]
    ),
    "has no weight for": lambda f: edit_tensors(f, lambda tensors, name: tensors.pop(name)),
    "not finite": lambda f: edit_tensors(f, lambda tensors, name: tensors[name].view(-1)[3].fill_(torch.nan)),
    "has shape": lambda f: edit_tensors(
        f, lambda tensors, name: tensors.update({name: tensors[name][:, 1:].contiguous()})
    ),
    "differs from the config's slice": lambda f: edit_tensors(
        f, lambda tensors, name: tensors[name.replace("weight", "indices")].add_(1)
    ),
    "is torch.int32 of shape": lambda f: edit_tensors(
        f, lambda tensors, name: tensors.update({name: tensors[name].int()})
    ),
    "is not in the config's slices": lambda f: edit_tensors(
        f, lambda tensors, name: tensors.update({name.replace("layers.0", "layers.9"): tensors[name].clone()})
    ),
}


@pytest.mark.parametrize("message", DAMAGE)
def test_a_damaged_or_foreign_adapter_is_refused(saved: Path, message: str) -> None:
    DAMAGE[message](saved)
    with pytest.raises(S2FTError, match=message):
        read_adapter(saved)


def test_another_base_is_refused_before_anything_is_put_in(saved: Path) -> None:
    other = build("llama", torch.float32)
    names = [name for name, _ in other.named_modules()]
    with pytest.raises(S2FTError, match=r"made for another base.*9 of 9 modules.*any_base"):
        PeftModel.from_pretrained(other, saved)
    assert names == [name for name, _ in other.named_modules()]
    x = tokens(1, 5)
    before = other(x).logits
    with any_base():
        loaded = PeftModel.from_pretrained(other, saved)
    assert not torch.equal(loaded(x).logits, before)


def test_a_smaller_base_is_refused_by_module(saved: Path) -> None:
    with pytest.raises(
        S2FTError, match=r"the adapter changes model.layers.0.self_attn.v_proj, which is no linear layer of this model"
    ):
        PeftModel.from_pretrained(build("gpt2", torch.float32), saved)


def test_the_digest_sees_any_change_of_the_slice_and_no_dtype_of_the_same_values() -> None:
    values = torch.randn(7, 5).bfloat16()
    digest = slice_digest(values)
    assert digest == slice_digest(values.float()) == slice_digest(values.double())
    changed = values.clone()
    changed[3, 2] += 1
    assert slice_digest(changed) != digest
    assert slice_digest(values.view(5, 7)) != digest
    assert slice_digest(values.to("meta")) is None
    assert agree(slice_digest(values.half()), digest)  # rounds otherwise: compared by its sketch
    assert not agree(slice_digest(torch.randn(7, 5).half()), digest)


def test_the_right_base_in_another_precision_is_taken(tmp_path: Path) -> None:
    base = build("llama", torch.bfloat16)
    get_peft_model(copy.deepcopy(base), S2FTConfig(ratios=0.3, init_weights=False)).save_pretrained(tmp_path)
    expected = read_adapter(tmp_path).deltas
    for dtype in (torch.float16, torch.float32, torch.bfloat16):
        model = copy.deepcopy(base).to(dtype)
        model.load_adapter(str(tmp_path))  # transformers' own
        for path, delta in expected.items():
            assert torch.equal(model.get_submodule(path).s2ft_block["default"].weight, delta)


def test_a_truncated_file_is_refused_before_anything_is_put_in(saved: Path) -> None:
    path = saved / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    model = build("llama", torch.float32)
    with any_base(), pytest.raises(S2FTError, match=r"adapter_model.safetensors is truncated"):
        PeftModel.from_pretrained(model, saved)
    assert not any("s2ft" in name for name, _ in model.named_modules())


@pytest.mark.parametrize("damage", ["missing", "nan"])
def test_a_damaged_delta_is_refused_when_it_is_loaded(saved: Path, damage: str) -> None:
    change = {
        "missing": lambda tensors, name: tensors.pop(name),
        "nan": lambda tensors, name: tensors[name].view(-1)[0].fill_(torch.nan),
    }
    edit_tensors(saved, change[damage])
    with any_base(), pytest.raises(S2FTError, match=r"has no weight for|not finite"):
        PeftModel.from_pretrained(build("llama", torch.float32), saved)


def test_a_file_is_opened_anew_before_much_of_it_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {f"t{number}": torch.randn(8) for number in range(12)}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    monkeypatch.setattr(weight_file, "MOST_MAPPED", 3 * 8 * 4)
    opened: list[str] = []
    plain = weight_file.safe_open
    monkeypatch.setattr(weight_file, "safe_open", lambda path, **how: (opened.append(str(path)), plain(path, **how))[1])
    read = dict(weight_file.WeightFile(tmp_path))
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
    assert len(opened) == 3


def test_names_are_shown_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = "layers.0.[/red]"
    name = f"base_model.model.{module}.s2ft_block"
    save_file(
        {f"{name}.weight": torch.ones(3, 1), f"{name}.indices": torch.zeros(1).long()},
        tmp_path / "adapter_model.safetensors",
    )
    S2FTConfig(slices={module: "in 0"}, target_modules=[module]).save_pretrained(str(tmp_path))
    print_table(table(read_adapter(tmp_path)))
    assert "[/red]" in capsys.readouterr().out
    for bad in ("\x1b[2J", "a\nb", "\ud800", ""):
        edit(tmp_path, slices={bad: "in 0"})
        with pytest.raises(S2FTError, match="empty or holds control characters") as error:
            read_adapter(tmp_path)
        assert all(letter.isprintable() or letter == "\n" for letter in str(error.value))
    edit(tmp_path, slices={module: "in 0"}, base_model_name_or_path="\x1b]0;x\x07")
    with pytest.raises(S2FTError, match=r"base_model_name_or_path=.*holds control characters"):
        read_adapter(tmp_path)
