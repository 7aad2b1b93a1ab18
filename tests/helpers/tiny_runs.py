"""What tests of training runs share: reading what a run left, and Ctrl-C at a given step."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from s2ft.finetune import train as program
from s2ft.finetune.options import TrainOptions
from s2ft.finetune.train import TrainResult
from s2ft.finetune.trainer import Flow


def train(options: TrainOptions) -> TrainResult:
    """`s2ft train`; its model is on the CPU afterwards, as what tests compare it with, also where it trained on a GPU."""
    result = program.train(options)
    result.model.cpu()
    return result


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a result or checkpoint."""
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def interrupt_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Sets what the first Ctrl-C sets, in the middle of a step."""
    begin = Flow.on_step_begin

    def on_step_begin(self, args, state, control, **kwargs):
        self.interrupted = state.global_step == step - 1
        return begin(self, args, state, control, **kwargs)

    monkeypatch.setattr(Flow, "on_step_begin", on_step_begin)


def skip_without(method: str) -> None:
    """Skips the test where the method's library is not installed."""
    if method == "galore" and find_spec("galore_torch") is None:
        pytest.skip("galore-torch is not installed")
