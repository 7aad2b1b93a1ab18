"""Quantised bases: what is said before anything is loaded, and whether gradients pass."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from torch import Tensor, nn
from transformers.training_args import OptimizerNames

from quantised import library, stand_in
from s2ft.common.errors import S2FTError
from s2ft.format.terms import QUANTISATIONS as NAMES
from s2ft.runtime import quantisation
from s2ft.runtime.models import load_model
from s2ft.runtime.quantisation import QUANTISATIONS, check_optimizer, check_quantisation, own_quantisation
from s2ft.runtime.trainable import check_trainable, gradient_error

BASE = "src/s2ft/demo/base"


@pytest.fixture
def nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantisation, "find_spec", lambda name: None)


def packed(folder: Path, method: str) -> str:
    folder.joinpath("config.json").write_text(json.dumps({"quantization_config": {"quant_method": method}}))
    return str(folder)


def test_every_name_has_its_way() -> None:
    assert list(NAMES) == list(QUANTISATIONS)


@pytest.mark.usefixtures("nothing_installed")
@pytest.mark.parametrize("name", QUANTISATIONS)
def test_a_missing_package_is_named_with_how_to_get_it(name: str) -> None:
    with pytest.raises(
        S2FTError, match=rf"quantize='{name}' needs the package \S+, which is not installed: pip install \S+$"
    ):
        check_quantisation(name, BASE)
    with pytest.raises(S2FTError, match="needs the package"):
        load_model(BASE, torch.float32, name)


@pytest.mark.usefixtures("nothing_installed")
@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("gptq", r"is quantised by gptq, which needs the package gptqmodel.*\n.*needs the package optimum"),
        ("awq", r"is quantised by awq, which needs the package gptqmodel"),
        ("hqq", r"is quantised by hqq: transformers does not load HQQ any more"),
    ],
)
def test_a_base_that_cannot_be_loaded_is_refused_by_its_config(method: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(S2FTError, match=f"(?s){message}"):
        check_quantisation(None, packed(tmp_path, method))


def test_what_is_quantised_already_is_not_quantised_again(tmp_path: Path) -> None:
    with pytest.raises(
        S2FTError, match=r"quantize='nf4': model='.*' is quantised already \(gptq\); leave quantize out"
    ):
        check_quantisation("nf4", packed(tmp_path, "gptq"))
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"GGUF")
    with pytest.raises(S2FTError, match=r"quantize='nf4': model='.*model.gguf' is a GGUF file.*`s2ft base`"):
        check_quantisation("nf4", str(gguf))


@pytest.mark.usefixtures("nothing_installed")
def test_optimizers_of_other_packages_are_named() -> None:
    for optim, package in {
        "paged_adamw_8bit": "bitsandbytes",
        "adamw_8bit": "bitsandbytes",
        "adamw_torch_8bit": "torchao",
    }.items():
        with pytest.raises(S2FTError, match=f"optim='{optim}' needs the package {package}"):
            check_optimizer(optim)
    check_optimizer("adamw_torch_fused")
    with pytest.raises(S2FTError, match=r"optim='galore_adamw_8bit': GaLore .*; take method=galore"):
        check_optimizer("galore_adamw_8bit")


@pytest.mark.usefixtures("nothing_installed")
def test_every_optimizer_is_torchs_or_needs_a_package_that_is_named() -> None:
    own = {"adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop"}
    for name in {str(one.value) for one in OptimizerNames} - own:
        with pytest.raises(
            S2FTError, match=rf"optim='{name}'(: GaLore| needs the package \S+, which is not installed)"
        ):
            check_optimizer(name)
    for name in own:
        check_optimizer(name)


class Odd(nn.Linear):
    """A quantised layer whose gradient is scaled; 0: it gives none."""

    def __init__(self, factor: float) -> None:
        super().__init__(6, 5, bias=False)
        self.factor = factor
        stand_in(nn.ModuleDict({"layer": self}), levels=127)

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return self.factor * y + (1 - self.factor) * y.detach() if self.factor else y.detach()


@pytest.mark.parametrize(
    ("factor", "message"),
    [
        (1.0, None),
        (0.0, r"^0 \(Odd\) cannot be trained through: it gives its input no gradient"),
        (1.1, r"its gradient differs from that of its dequantised weight by 10%"),
    ],
)
def test_a_layer_is_trained_through_if_its_gradient_is_its_weights(factor: float, message: str | None) -> None:
    model = nn.Sequential(Odd(factor), nn.Linear(5, 2))
    if message is None:
        check_trainable(model)
        assert gradient_error(model[0]) < 1e-6
        return
    with pytest.raises(S2FTError, match=message):
        check_trainable(model)


def test_a_kernel_that_raises_is_quoted() -> None:
    model = nn.Sequential(Odd(1.0))

    def forward(x: Tensor) -> Any:
        raise NotImplementedError("no backward for int3")

    model[0].forward = forward
    with pytest.raises(S2FTError, match="cannot be trained through: no backward for int3"):
        check_trainable(model)


@pytest.mark.parametrize("name", QUANTISATIONS)
def test_the_embedded_base_is_quantised_while_it_is_loaded(name: str) -> None:
    library(QUANTISATIONS[name].package)
    model = load_model(BASE, torch.float32, name)
    check_trainable(model)
    assert find_spec(QUANTISATIONS[name].package)
    assert model.is_quantized


def test_how_a_model_on_the_hub_is_quantised_is_read_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "bitsandbytes"}}))
    asked = []
    monkeypatch.setattr(
        huggingface_hub, "hf_hub_download", lambda *names, **_: asked.append(names) or str(tmp_path / "config.json")
    )
    with pytest.raises(
        S2FTError, match=r"quantize='int8': model='org/quantised' is quantised already \(bitsandbytes\)"
    ):
        check_quantisation("int8", "org/quantised")
    assert asked == [("org/quantised", "config.json")]
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: 1 / 0)
    assert own_quantisation("org/no-connection") is None
