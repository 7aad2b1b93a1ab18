"""What stands beside the language model in a model of several parts: vision and audio towers, and projectors between."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from torch import nn

from s2ft.common.errors import S2FTError

# Parts of a config, by their names
_TEXT_PART = re.compile(r"text|language|llm")
_TOWER_PARTS = {"vision": re.compile(r"vision|image"), "audio": re.compile(r"audio|speech")}
_BETWEEN = "projector"

_READS = {"vision": ("pixel_values",), "audio": ("input_features", "input_values")}
"""What a model of that kind alone reads."""


def towers(model: nn.Module) -> dict[str, str]:
    """Paths of what stands beside a language model → vision, audio or projector, by the part of its config that built it.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> towers(LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=16, intermediate_size=24, num_attention_heads=4)))
        {}
    """
    kinds = _tower_configs(getattr(model, "config", None))
    found: dict[str, str] = {}
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{tower}.") for tower in found)
        if path and not inside and (kind := kinds.get(type(getattr(module, "config", None)))) is not None:
            found[path] = kind
    return found


def in_part(model: nn.Module, part: str) -> Callable[[str], bool]:
    """Whether the module at a path belongs to a part of the model: language, vision, audio, or all.

    Raises:
        S2FTError: if the model has no such part.
    """
    beside = towers(model)
    if part == "all" or (not beside and _is_alone(model, part)):
        return lambda path: True
    if part == "language":
        places = tuple(f"{path}." for path in beside)
        return lambda path: not f"{path}.".startswith(places)
    places = tuple(f"{path}." for path, kind in beside.items() if kind == part)
    if not places:
        parts = ", ".join(sorted({"language", *beside.values()} - {_BETWEEN})) if beside else "no towers"
        raise S2FTError(f"targets={part!r}: {type(model).__name__} has no {part} tower; it has {parts}")
    return lambda path: f"{path}.".startswith(places)


def _is_alone(model: nn.Module, part: str) -> bool:
    """Whether a model without towers is such a part itself."""
    reads = getattr(model, "main_input_name", "input_ids")
    kind = next((kind for kind, names in _READS.items() if reads in names), "language")
    if part == "language" and kind != part:
        raise S2FTError(f"targets={part!r}: {type(model).__name__} has no language model; it reads {reads}")
    return kind == part


def _tower_configs(config: Any) -> dict[type, str]:
    """The kinds of config of what stands beside the language model in a composite model."""
    parts = getattr(config, "sub_configs", None)
    found = {name: getattr(config, name, None) for name in (parts if isinstance(parts, dict) else ())}
    texts = {type(part) for name, part in found.items() if _TEXT_PART.search(name)}
    beside: dict[type, str] = {}
    for name, part in found.items():
        if part is None or _TEXT_PART.search(name):
            continue
        kind = next((kind for kind, pattern in _TOWER_PARTS.items() if pattern.search(name)), None)
        between = texts and name.endswith("_config") and not getattr(part, "sub_configs", None)
        beside |= {type(part): kind or _BETWEEN} if kind or between else _tower_configs(part)
    return {kind: name for kind, name in beside.items() if kind not in texts}
