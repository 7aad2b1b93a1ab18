"""Switching, merging, pools, names and state dicts: what each does while another is under way."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

import s2ft
from families import build, tokens
from s2ft import S2FTConfig, S2FTError
from s2ft.adapter.pool import AdapterPool
from s2ft.files import check_free, new_file, staged


def model() -> PeftModel:
    """With the adapters "default" and "b", in evaluation mode."""
    made = get_peft_model(build("llama", torch.float64), S2FTConfig(ratios=0.3, init_weights=False, seed=1))
    made.add_adapter("b", S2FTConfig(ratios=0.3, init_weights=False, seed=2))
    return made.eval()


def base_output(made: PeftModel, ids: Tensor) -> Tensor:
    with made.disable_adapter(), torch.no_grad():
        return made(ids).logits


def test_disabling_gives_the_base_when_an_adapter_was_merged_after_switching_to_none() -> None:
    made, ids = model(), tokens(2, 7)
    expected = base_output(made, ids)
    s2ft.switch(made, None)
    made.merge_adapter(["default"])
    torch.testing.assert_close(base_output(made, ids), expected)


@pytest.mark.parametrize("name", ["__base__", "keys", "forward", "a.b", "a/b", ""])
def test_names_with_another_meaning_are_refused(name: str) -> None:
    made = model()
    with pytest.raises((S2FTError, ValueError), match="adapter"):
        made.add_adapter(name, S2FTConfig(ratios=0.3))
    with pytest.raises((S2FTError, ValueError), match="adapter"):
        made.add_weighted_adapter(["default", "b"], [0.5, 0.5], name)
    assert set(made.peft_config) == {"default", "b"}


def merged(made: PeftModel) -> Any:
    made.merge_adapter(["b"])
    return made.unmerge_adapter


def switched(made: PeftModel) -> Any:
    s2ft.switch(made, "b")
    return lambda: s2ft.switch(made, None)


@pytest.mark.parametrize("change", [merged, switched])
def test_base_weights_are_not_loaded_over_an_adapter_that_stands_in_them(change: Any) -> None:
    made = model()
    own = {name: value.clone() for name, value in made.state_dict().items()}
    layer = made.get_base_model().model.layers[0].mlp.down_proj
    undo = change(made)
    for target in (made, layer):
        other = {name: 2 * value for name, value in target.state_dict().items() if value.is_floating_point()}
        with pytest.raises(S2FTError, match="loading base weights"):
            target.load_state_dict(other, strict=False)
    undo()
    assert all(torch.equal(value, own[name]) for name, value in made.state_dict().items())


def test_a_name_of_the_pool_is_not_loaded_into_the_model(tmp_path: Path) -> None:
    base = build("llama", torch.float32)
    for name, seed in (("alice", 3), ("bob", 4)):
        copy = build("llama", torch.float32)
        copy.load_state_dict(base.state_dict())
        get_peft_model(copy, S2FTConfig(ratios=0.3, init_weights=False, seed=seed)).save_pretrained(tmp_path / name)
    made = get_peft_model(base, S2FTConfig(ratios=0.3, init_weights=False, seed=1)).eval()
    pool = AdapterPool(made, str(tmp_path), device_bytes=1 << 24, host_bytes=1 << 24)
    ids = tokens(2, 5)
    with torch.no_grad():
        expected = made(ids, adapter_names=["alice", "bob"]).logits
        with pytest.raises(S2FTError, match="'alice' is a name of the model's AdapterPool"):
            made.load_adapter(str(tmp_path / "bob"), adapter_name="alice")
        torch.testing.assert_close(made(ids, adapter_names=["alice", "bob"]).logits, expected)
        s2ft.switch(made, "default")
        with pytest.raises(S2FTError, match="switched to 'default'"):
            made(ids, adapter_names=["alice", "bob"])
    made.set_adapter("default")
    made.unload()
    pool.close()


def test_two_files_can_be_written_into_one_folder_at_a_time(tmp_path: Path) -> None:
    with new_file(tmp_path / "a.gguf") as first:
        first.write_text("a")
        with new_file(tmp_path / "b.gguf") as second:
            second.write_text("b")
    assert sorted((path.name, path.read_text()) for path in tmp_path.iterdir()) == [("a.gguf", "a"), ("b.gguf", "b")]


def test_outputs_that_cannot_be_made_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for output in (tmp_path / "file" / "x", tmp_path / "link", tmp_path):
        with pytest.raises(S2FTError, match="output="):
            check_free(output)
    with pytest.raises(S2FTError, match="cannot be written to"), staged(Path("/proc/x")):
        pass


def test_plain_modules_keep_loading_state_dicts() -> None:
    made = model()
    assert isinstance(made, nn.Module)
    assert not made.load_state_dict(made.state_dict()).missing_keys
