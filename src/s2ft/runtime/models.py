"""The base model and its tokenizer, from a folder, a GGUF file or the Hub, with errors that say what is missing.

Code that comes with a model is not run: unless it is told so, transformers asks at the terminal, and runs it on a "y".
"""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any, cast

import torch
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from s2ft.common.errors import S2FTError, first_line
from s2ft.runtime import gguf
from s2ft.runtime.failures import is_out_of_memory
from s2ft.runtime.lookup import check_folder
from s2ft.runtime.processes import own_device
from s2ft.runtime.quantisation import QUANTISATIONS, check_quantisation
from s2ft.tuner.model import S2FTModel  # noqa: F401 - PEFT knows the method from here on

log = logging.getLogger("s2ft")

HEADS = ("score", "classifier", "pre_classifier")  # of sequence classifiers


def load_tokenizer(name: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of the model `name`.

    Args:
        name: A folder, a GGUF file or a name on the Hub.
        revision: On the Hub; None: the newest.

    Raises:
        S2FTError: if there is no such model, or it has no tokenizer.
    """
    check_folder(name)
    try:
        source, options = _reading(name, revision)
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False, **options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise S2FTError(_unloadable(name, "tokenizer", error)) from error


def load_model(
    name: str, dtype: torch.dtype, quantize: str | None = None, revision: str | None = None
) -> PreTrainedModel:
    """The causal language model `name`, its weights in `dtype`.

    Args:
        name: A folder, a GGUF file or a name on the Hub.
        dtype: Of what is not quantised, and of the computation.
        quantize: One of `QUANTISATIONS`: quantised while it is loaded, onto the device that it is to run on.
        revision: On the Hub; None: the newest.

    Raises:
        S2FTError: if there is no such model, its files are incomplete or of another kind, or it cannot be quantised so.
    """
    return _loaded(name, AutoModelForCausalLM, dtype, quantize, may_lack=(), revision=revision)


def load_scorer(name: str, dtype: torch.dtype, quantize: str | None = None) -> PreTrainedModel:
    """The model `name` with a head that gives a text one score; a head that its files lack is drawn, always alike.

    Raises:
        S2FTError: as `load_model`, or if transformers has no such head for the model.
    """
    config = load_config(name)
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise S2FTError(
            f"model={name!r} is a {type(config).__name__.removesuffix('Config')}, for which transformers has no model with a "
            "score head (AutoModelForSequenceClassification); take another model"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return _loaded(name, AutoModelForSequenceClassification, dtype, quantize, may_lack=HEADS, num_labels=1)


def _loaded(
    name: str,
    kind: Any,
    dtype: torch.dtype,
    quantize: str | None,
    may_lack: tuple[str, ...],
    revision: str | None = None,
    **settings: Any,
) -> PreTrainedModel:
    """The model as a class of transformers reads it; weights may be missing only in the modules named."""
    check_folder(name)
    check_quantisation(quantize, name, revision)
    try:
        source, options = _reading(name, revision)
        is_gguf = "gguf_file" in options
        options |= gguf.dequantising() if is_gguf else {"use_safetensors": True}  # the older .bin files are pickles
        if quantize is not None:
            config = QUANTISATIONS[quantize].config(dtype)
            options |= {"quantization_config": config, "device_map": {"": own_device()}}
        model, info = kind.from_pretrained(
            source, dtype=dtype, output_loading_info=True, trust_remote_code=False, **settings, **options
        )
    except Exception as error:  # OSError, ValueError, SafetensorError, ...: what a broken or foreign file leads to
        if is_out_of_memory(error):
            raise
        raise S2FTError(_unloadable(name, "model", error)) from error
    missing = sorted(key for key in info["missing_keys"] if key.partition(".")[0] not in may_lack)
    if missing:
        raise S2FTError(
            f"model={name!r} is incomplete: it lacks {len(missing)} of its weights, the first is {missing[0]}"
        )
    if is_gguf:
        gguf.make_plain(model, name)
    return cast("PreTrainedModel", model)


def load_config(name: str, revision: str | None = None) -> PreTrainedConfig:
    """The configuration of the model `name`; raises `S2FTError` if there is no such model, or it cannot be read."""
    check_folder(name)
    try:
        source, options = _reading(name, revision)
        return AutoConfig.from_pretrained(source, trust_remote_code=False, **options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise S2FTError(_unloadable(name, "configuration", error)) from error


def _reading(name: str, revision: str | None) -> tuple[str, dict[str, Any]]:
    """What `from_pretrained` takes for `name`: where, and the options besides."""
    source, options = gguf.reading(name)
    return source, options if revision is None else {**options, "revision": revision}


def empty_model(name: str, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The causal language model `name` without values (device meta): its configuration alone is read.

    Args:
        name: A folder, a GGUF file, or a name on the Hub.
        dtype: Of its weights; None: torch's default.

    Raises:
        S2FTError: if there is no such model.
    """
    config = load_config(name)
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(
                config, trust_remote_code=False, **({"dtype": dtype} if dtype else {})
            )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise S2FTError(_unloadable(name, "configuration", error)) from error


def settle_generation(model: PreTrainedModel) -> None:
    """Lets a model sample whose generation config has values of sampling, but does not say that it samples.

    transformers does not save such a config once anything in it has changed, as the tokens of the tokenizer do in training.

    Raises:
        S2FTError: if there is more for which it would not be saved.
    """
    config = getattr(model, "generation_config", None)
    if config is None or _why_unsaved(config) is None:
        return
    config.do_sample = True
    if (reason := _why_unsaved(config)) is not None:
        raise S2FTError(
            f"model={model.name_or_path!r}: transformers would not save its generation config: {reason}; mend that file"
        )
    log.info("generation config: do_sample=True, as its values of sampling would not be saved without")


def _why_unsaved(config: GenerationConfig) -> str | None:
    """What keeps the config from being saved, but for the padding, which the tokenizer's replaces."""
    whole = copy.deepcopy(config)
    whole.pad_token_id = None
    try:
        whole.validate(strict=True)
    except ValueError as error:
        return " ".join(str(error).split())[:300]
    return None


def place(model: PreTrainedModel, device: torch.device | str) -> None:
    """Moves the model to a device; a quantised one was loaded onto its own, and some refuse to be moved."""
    if not getattr(model, "is_quantized", False) or next(model.parameters()).device != torch.device(device):
        model.to(device)


def positions(model: PreTrainedModel) -> int | None:
    """How many positions the model was made for; None where it does not say."""
    value = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return value if isinstance(value, int) and value > 0 else None


def _unloadable(name: str, part: str, error: Exception) -> str:
    if gguf.gguf_file(name) is not None:
        where = "a GGUF file, cut short or of a kind that transformers does not read"
    else:
        where = "the folder" if Path(name).is_dir() else "no folder here; the Hub"
    if "trust_remote_code" in str(error):
        return (
            f"model={name!r}: its {part} needs code that comes with it, and s2ft runs no such code; take another model"
        )
    return f"model={name!r}: its {part} cannot be loaded ({where}): {first_line(error)}"
