"""What transformers makes of a base's folder without its weights: the model on device meta, and the tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from s2ft.common.errors import S2FTError, first_line
from s2ft.format.saved import SavedConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_CLASSES = {
    "CAUSAL_LM": ("AutoModelForCausalLM", "MODEL_FOR_CAUSAL_LM_MAPPING"),
    "SEQ_2_SEQ_LM": ("AutoModelForSeq2SeqLM", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING"),
    "SEQ_CLS": ("AutoModelForSequenceClassification", "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING"),
    "TOKEN_CLS": ("AutoModelForTokenClassification", "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING"),
    "QUESTION_ANS": ("AutoModelForQuestionAnswering", "MODEL_FOR_QUESTION_ANSWERING_MAPPING"),
    "FEATURE_EXTRACTION": ("AutoModel", "MODEL_MAPPING"),
}
"""PEFT's name of a task → transformers' class for it, whose module paths its adapters have, and the configurations it knows."""


def empty_model(adapter: SavedConfig, folder: Path) -> PreTrainedModel:
    """The model without values (device meta), of the class that the adapter's module paths are of.

    Raises:
        S2FTError: if its configuration cannot be loaded.
    """
    import transformers

    task, mapping = _CLASSES.get(str(adapter.task_type), _CLASSES["CAUSAL_LM"])
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        named = _class_named((adapter.auto_mapping or {}).get("base_model_class"))
        if named is None and type(config) not in getattr(transformers, mapping):  # such as Qwen2.5-VL
            named = _class_named(next(iter(config.architectures or ()), None))
        with torch.device("meta"):
            if named is not None:
                return named(config)
            model: PreTrainedModel = getattr(transformers, task).from_config(config, trust_remote_code=False)
            return model
    except (OSError, ValueError, KeyError, ImportError, AttributeError, TypeError, RecursionError) as error:
        raise S2FTError(f"base={str(folder)!r}: its configuration cannot be loaded: {first_line(error)}") from error


def _class_named(name: object) -> type[PreTrainedModel] | None:
    """The class of transformers that a file names; None where there is none of models."""
    import transformers

    found = getattr(transformers, str(name), None)
    return found if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel) else None


def tokenizer_of(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer beside the weights; raises `S2FTError` if there is none that can be loaded."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise S2FTError(f"base={str(folder)!r}: its tokenizer cannot be loaded: {first_line(error)}") from error
