"""What stands beside the language model in a model of several parts: vision and audio towers, and projectors between."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

# Parts of a config, by their names
_TEXT_PART = re.compile(r"text|language|llm")
_TOWER_PART = re.compile(r"vision|audio|image|speech")


def towers(model: nn.Module) -> list[str]:
    """Paths of what stands beside a language model (vision, audio, projectors between): built from such a part of its config.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> towers(LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=16, intermediate_size=24, num_attention_heads=4)))
        []
    """
    kinds = _tower_configs(getattr(model, "config", None))
    found: list[str] = []
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{tower}.") for tower in found)
        if path and not inside and type(getattr(module, "config", None)) in kinds:
            found.append(path)
    return found


def _tower_configs(config: Any) -> set[type]:
    """The kinds of config of what stands beside the language model in a composite model."""
    parts = getattr(config, "sub_configs", None)
    found = {name: getattr(config, name, None) for name in (parts if isinstance(parts, dict) else ())}
    texts = {type(part) for name, part in found.items() if _TEXT_PART.search(name)}
    beside: set[type] = set()
    for name, part in found.items():
        if part is None or _TEXT_PART.search(name):
            continue
        if _TOWER_PART.search(name) or (texts and name.endswith("_config") and not getattr(part, "sub_configs", None)):
            beside.add(type(part))
        else:
            beside |= _tower_configs(part)
    return beside - texts
