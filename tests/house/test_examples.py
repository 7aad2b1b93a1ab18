"""The programs in examples/ run as they stand, on less data."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from s2ft.adapters.file import read_adapter
from s2ft.demo import base_path

EXAMPLES = Path(__file__).parents[2] / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.usefixtures("one_thread")
class TestExamples:
    @pytest.mark.parametrize("name", ["sft", "dpo"])
    def test_training_moves_and_leaves_an_adapter(
        self, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        example = load(name)
        example.DATA = example.DATA[:40]
        example.main(str(tmp_path / name))
        first, last = map(float, re.findall(r"[+-]?\d+\.\d+", capsys.readouterr().out.splitlines()[-1])[:2])
        assert last < first if name == "sft" else last > first
        assert any(bool(delta.any()) for delta in read_adapter(tmp_path / name).deltas.values())

    def test_a_classifier_comes_back_with_its_head(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        example = load("classify")
        example.DATA = example.DATA[::3]
        example.main(str(tmp_path / "classify"))
        assert float(re.findall(r"right: (\d\.\d+)", capsys.readouterr().out)[-1]) > 0.9
        assert any(
            name.endswith("score.weight") for name in load_file(tmp_path / "classify" / "adapter_model.safetensors")
        )

    def test_embeddings_come_nearer_and_come_back(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
        example = load("embed")
        example.EACH = 24
        example.main(str(tmp_path / "embed"))
        before, after, again = map(float, re.findall(r"\d\.\d+", capsys.readouterr().out.splitlines()[-1])[:3])
        assert before < after == again
        assert any(bool(delta.any()) for delta in read_adapter(tmp_path / "embed").deltas.values())

    def test_rows_of_a_batch_differ_by_their_adapter(self, capsys: pytest.CaptureFixture[str]) -> None:
        load("several_adapters").main()
        away = [float(number) for number in re.findall(r"is (\d+\.\d+) away", capsys.readouterr().out)]
        assert away[-1] == 0
        assert min(away[:-1]) > 0

    def test_the_base_comes_back_after_a_switch(self, capsys: pytest.CaptureFixture[str]) -> None:
        load("switch").main()
        moved, restored = capsys.readouterr().out.splitlines()[-2:]
        assert float(moved.rpartition(" ")[2]) > 0
        assert restored == "base weights as before: True"

    def test_a_score_of_ones_own_chooses_the_largest_weights(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        load("own_score").main(str(tmp_path / "own"))
        assert "strategy='own'" in capsys.readouterr().out
        adapter = read_adapter(tmp_path / "own")
        base = AutoModelForCausalLM.from_pretrained(str(base_path()))
        for layer, block in enumerate(base.model.layers):
            mlp = block.mlp
            weights = [mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight.T]
            peaks = torch.stack([weight.abs().amax(1) for weight in weights]).amax(0)
            chosen = adapter.slices[f"model.layers.{layer}.mlp.down_proj"].indices
            others = np.setdiff1d(np.arange(len(peaks)), chosen)
            assert peaks[chosen].min() >= peaks[others].max()


def test_every_example_is_listed() -> None:
    listed = re.findall(r"\]\((\w+\.py)\)", (EXAMPLES / "README.md").read_text(encoding="utf-8"))
    assert sorted(listed) == sorted(path.name for path in EXAMPLES.glob("*.py"))
