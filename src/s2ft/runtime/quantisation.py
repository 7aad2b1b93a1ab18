"""Quantised base models: which there are, what each needs, and whether one can be trained on.

    s2ft train --quantize nf4          quantised while it is loaded, by one of `QUANTISATIONS`
    s2ft train --model SOME-GPTQ       quantised already, as its config.json says (`PACKAGES`)

What is missing is said before anything is loaded. Whether gradients pass is seen on the loaded model (`runtime/trainable.py`).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from s2ft.common.errors import S2FTError, raise_together
from s2ft.runtime.gguf import gguf_file

PACKAGES: dict[str, tuple[str, ...]] = {
    "bitsandbytes": ("bitsandbytes",),
    "torchao": ("torchao",),
    "quanto": ("optimum.quanto",),
    "gptq": ("gptqmodel", "optimum"),
    "awq": ("gptqmodel",),
    "compressed-tensors": ("compressed_tensors",),
}
"""transformers' name of a quantisation → the modules that it needs."""

REFUSED = {"hqq": "transformers does not load HQQ any more"}
"""transformers' name of a quantisation → why it is refused."""

INSTALLED_AS = {  # module → its package
    "optimum.quanto": "optimum-quanto",
    "compressed_tensors": "compressed-tensors",
    "lomo_optim": "lomo-optim",
    "apollo_torch": "apollo-torch",
    "optimi": "torch-optimi",
    "torchdistx": "git+https://github.com/pytorch/torchdistx",
}
OF_BITSANDBYTES = ("bnb", "paged_", "adamw_8bit", "lion_", "ademamix")  # what its optimizers are called in transformers
OF_TORCHAO = ("adamw_torch_4bit", "adamw_torch_8bit")
OF_OTHERS = {  # begins with → the module that transformers imports for it
    "lomo": "lomo_optim",
    "adalomo": "lomo_optim",
    "grokadamw": "grokadamw",
    "schedule_free": "schedulefree",
    "apollo": "apollo_torch",
    "stable_adamw": "optimi",
    "adamw_anyprecision": "torchdistx",
    "adamw_torch_xla": "torch_xla",
    "adamw_torch_npu": "torch_npu",
}


@dataclass(frozen=True)
class Quantisation:
    """A way to quantise a model while it is loaded."""

    package: str
    config: Callable[[Any], Any]  # dtype of the computation → transformers' config


def _four_bits(kind: str, dtype: Any) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=True,  # as in QLoRA
        bnb_4bit_compute_dtype=dtype,
    )


def _eight_bits(dtype: Any) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_8bit=True)


def _torchao(kind: str, dtype: Any) -> Any:
    from torchao import quantization
    from transformers import TorchAoConfig

    return TorchAoConfig(getattr(quantization, kind)())


def _quanto(kind: str, dtype: Any) -> Any:
    from transformers import QuantoConfig

    return QuantoConfig(weights=kind)


QUANTISATIONS: dict[str, Quantisation] = {  # by the names of `format/terms.py`
    "nf4": Quantisation("bitsandbytes", partial(_four_bits, "nf4")),
    "fp4": Quantisation("bitsandbytes", partial(_four_bits, "fp4")),
    "int8": Quantisation("bitsandbytes", _eight_bits),
    "torchao-int8": Quantisation("torchao", partial(_torchao, "Int8WeightOnlyConfig")),
    "torchao-float8": Quantisation("torchao", partial(_torchao, "Float8WeightOnlyConfig")),
    "quanto-int8": Quantisation("optimum.quanto", partial(_quanto, "int8")),
    "quanto-int4": Quantisation("optimum.quanto", partial(_quanto, "int4")),
}


def check_quantisation(name: str | None, model: str, revision: str | None = None) -> None:
    """Raises `S2FTError` where the model cannot be quantised so, or needs a package that is not there; loads nothing.

    Args:
        name: One of `QUANTISATIONS`; None: the model is taken as it is.
        model: A folder or a name on the Hub, whose configuration is read.
        revision: On the Hub; None: the newest.
    """
    if name is not None and name not in QUANTISATIONS:
        raise S2FTError(f"quantize={name!r} is unknown; choose from {', '.join(QUANTISATIONS)}")
    own = own_quantisation(model, revision)
    if name is None:
        raise_together(_problems_of_own(model, own) if own is not None else [])
        return
    if own is not None:
        raise S2FTError(f"quantize={name!r}: model={model!r} is quantised already ({own}); leave quantize out")
    if gguf_file(model) is not None:
        raise S2FTError(
            f"quantize={name!r}: model={model!r} is a GGUF file, which is dequantised; write it once as a folder by `s2ft base`"
        )
    missing = _missing(QUANTISATIONS[name].package)
    raise_together([f"quantize={name!r} needs {missing}"] if missing else [])


def own_quantisation(model: str, revision: str | None = None) -> str | None:
    """How a model is quantised, as its config.json says, here or on the Hub; None where it is not, or nothing is found."""
    try:
        config = json.loads(_config_file(model, revision).read_text(encoding="utf-8"))
        return str(config["quantization_config"]["quant_method"])
    except (OSError, ValueError, KeyError, TypeError):  # what is wrong with a config is said when it is loaded
        return None


def _config_file(model: str, revision: str | None) -> Path:
    if Path(model).exists():
        return Path(model) / "config.json"
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(model, "config.json", revision=revision))
    except Exception as error:  # no such name, no connection and not in the cache, no access, ...
        raise FileNotFoundError(model) from error


def _problems_of_own(model: str, method: str) -> list[str]:
    if method in REFUSED:
        return [f"model={model!r} is quantised by {method}: {REFUSED[method]}"]
    missing = [text for package in PACKAGES.get(method, ()) if (text := _missing(package))]
    return [f"model={model!r} is quantised by {method}, which needs {text}" for text in missing]


def check_optimizer(optim: str) -> None:
    """Raises `S2FTError` for an optimizer of transformers whose package is not installed, or that is a method here."""
    if optim.startswith("galore"):
        raise S2FTError(f"optim={optim!r}: GaLore needs to know which layers it projects; take method=galore")
    is_bitsandbytes = any(part in optim for part in OF_BITSANDBYTES)
    other = next((module for start, module in OF_OTHERS.items() if optim.startswith(start)), None)
    package = "bitsandbytes" if is_bitsandbytes else "torchao" if optim in OF_TORCHAO else other
    if package is not None and (missing := _missing(package)):
        raise S2FTError(f"optim={optim!r} needs {missing}")


def _missing(module: str) -> str | None:
    """What is not installed, and how it is."""
    try:
        if find_spec(module) is not None:
            return None
    except ModuleNotFoundError:  # of a submodule's package
        pass
    package = INSTALLED_AS.get(module, module)
    return f"the package {package}, which is not installed: pip install {package}"
