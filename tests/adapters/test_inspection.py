"""The picture of an adapter: rows are layers in their order, the same in every panel, with labels that can be read."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from transformers import LlamaConfig, LlamaForCausalLM

from exported import save_adapter, save_base
from families import TWO_BLOCKS
from s2ft.adapters.file import Adapter
from s2ft.adapters.inspection import picture
from s2ft.format.config import S2FTConfig
from s2ft.format.slices import Slice


def adapter(modules: list[str]) -> Adapter:
    """One random slice for each module, in the order of their names as text, as configs keep them."""
    slices = {path: Slice("in", np.sort(np.random.choice(50, 4, replace=False))) for path in sorted(modules)}
    return Adapter(Path("a"), S2FTConfig(), slices, {path: torch.randn(7, 4) for path in slices}, {})


def rows(figure: Figure) -> dict[str, np.ndarray]:
    """Title → [layers, bins]."""
    panels = [axes for axes in figure.axes if axes.get_images()]
    return {axes.get_title(): np.ma.filled(axes.get_images()[0].get_array(), np.nan) for axes in panels}


def test_rows_are_layers_by_number_and_blank_where_there_is_no_slice() -> None:
    held = {"self_attn.o_proj": range(2, 13), "mlp.down_proj": [0, 3, 11]}
    made = adapter([f"model.layers.{layer}.{name}" for name, layers in held.items() for layer in layers])
    drawn = rows(picture(made))
    assert set(drawn) == set(held)
    for name, layers in held.items():
        assert len(drawn[name]) == 13  # of both panels: layer 12 is the last with a slice
        for layer in range(13):
            path = f"model.layers.{layer}.{name}"
            assert np.isnan(drawn[name][layer]).all() == (layer not in layers)
            if layer in layers:
                norm = float(made.deltas[path].double().norm())
                assert np.sqrt(np.nansum(drawn[name][layer] ** 2)) == pytest.approx(norm)


@pytest.mark.parametrize("layers", [1, 2, 12, 13, 30, 61, 126])
def test_labels_do_not_overlap(layers: int) -> None:
    figure = picture(
        adapter([f"h.{n}.{name}" for n in range(layers) for name in ("attn.c_proj", "mlp.c_proj", "mlp.c_fc")])
    )
    figure.set_dpi(120)
    figure.draw_without_rendering()
    for axes in [axes for axes in figure.axes if axes.get_images()]:
        labels = [label for label in axes.get_yticklabels() if label.get_text()]
        assert [int(label.get_text()) for label in labels] == [round(place - 0.5) for place in axes.get_yticks()]
        assert labels[0].get_text() == "0"
        boxes = [label.get_window_extent() for label in labels]
        assert all(lower.y1 < upper.y0 for upper, lower in pairwise(boxes))


def test_stacks_have_panels_of_their_own() -> None:
    made = adapter(["enc.block.0.ff.wo", "enc.block.1.ff.wo", "dec.block.4.ff.wo", "lm_head"])
    assert {title: len(values) for title, values in rows(picture(made)).items()} == {
        "enc.block.*.ff.wo": 2,
        "dec.block.*.ff.wo": 5,
        "lm_head": 1,
    }


def test_layers_that_lie_directly_in_the_block_have_one_panel() -> None:
    made = adapter([f"model.decoder.layers.{n}.{name}" for n in range(3) for name in ("fc1", "self_attn.out_proj")])
    assert {title: len(values) for title, values in rows(picture(made)).items()} == {"fc1": 3, "self_attn.out_proj": 3}


def smaller(folder: Path) -> Path:
    """A llama of the same paths, and half the width."""
    sizes = {**TWO_BLOCKS, "hidden_size": 12, "intermediate_size": 22, "num_hidden_layers": 3}
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda folder: save_base(folder, "gpt2"), "changes model.layers.0.mlp.down_proj, which is no linear layer of"),
        (smaller, "of model.layers.0.mlp.down_proj, whose input side has 22 channels"),
    ],
)
def test_a_base_that_the_adapter_does_not_fit_is_refused(other, message: str, tmp_path: Path, s2ft) -> None:
    base = save_base(tmp_path / "base", "llama")
    made = save_adapter(tmp_path / "adapter", base, {"down_proj": 0.9, "q_proj": 0.5})
    other(tmp_path / "other")
    files = ["--png", str(tmp_path / "a.png"), "--json", str(tmp_path / "a.json")]
    code, _, err = s2ft("inspect", str(made), "--base", str(tmp_path / "other"), *files)
    assert code == 2, err
    assert message in err
    assert "Traceback" not in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "other"]
    code, out, err = s2ft("inspect", str(made), "--base", str(base))
    assert code == 0, err
    assert "in place" in out
