"""Any of PEFT's own methods, as `--method peft:NAME`, with the keys of its own config.

    --method peft:miss --peft-config r=16
    --method peft:oft  --peft-config "oft_block_size=16,target_modules=[q_proj,v_proj]"

Unless `target_modules` is among the keys, the method lies on all linear layers, as LoRA does where sizes are compared. The size
that trains a given number of parameters is found by counting, on a copy of the model without values.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import fields
from difflib import get_close_matches
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from s2ft.common.errors import S2FTError, first_line, gathered
from s2ft.finetune.method import ADAMW, Method
from s2ft.finetune.values import config_keys
from s2ft.format.choice import pattern_problems

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import nn
    from transformers import PreTrainedModel

    from s2ft.finetune.channels import Examples
    from s2ft.finetune.options import TrainOptions

PREFIX = "peft:"
SIZES = (
    "oft_block_size",
    "boft_block_size",
    "n_frequency",
    "block_size",
    "r",
)  # keys; a method's is the first that it has
LARGEST = 20  # power of two that is tried as a size
MOST_REFUSED = 4  # sizes in a row, before no larger one is tried
_PATTERNS = ("target_modules", "exclude_modules")  # keys whose text is a regular expression
OWN_TARGETS = ("ia3", "ln_tuning", "shadow", "trainable_tokens")  # what they lie on is their idea
UNFIT = {  # name → why it cannot be trained here
    "adaption_prompt": "PEFT gives its model a forward that TRL's loss does not pass through",
    "adalora": "its ranks are shared out anew while it trains, by a training loop that asks it to",
    "poly": "it needs to know the task of each example",
    "s2ft": "that is method=s2ft",
    "xlora": "it mixes LoRA adapters that are trained already",
}


def known_names() -> list[str]:
    """What can follow `peft:`."""
    return sorted(name for name in _configs() if why_unfit(name) is None)


def why_unfit(name: str) -> str | None:
    """Why a method of PEFT cannot be trained here; None if it can."""
    from peft.config import PromptLearningConfig

    if name not in UNFIT and issubclass(_configs()[name], PromptLearningConfig):
        return "it trains tokens before the prompt, and the loss here has no place for them"
    return UNFIT.get(name)


def _configs() -> dict[str, type[PeftConfig]]:
    """The config class of each of PEFT's methods, by its name in small letters."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    return {str(getattr(kind, "value", kind)).lower(): config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}


class PeftMethod(Method):
    """One of PEFT's methods.

    Args:
        name: Without the prefix.

    Raises:
        ValueError: if PEFT has no such method, or it cannot be trained here.
    """

    options = frozenset({"peft_config"}) | ADAMW
    learning_rate = float("nan")  # none is known, so `problems` asks for one
    autocast = True

    def __init__(self, name: str) -> None:
        if name not in _configs():
            near = get_close_matches(name, known_names(), n=1)
            meant = f"; did you mean {PREFIX}{near[0]}?" if near else "."
            raise ValueError(f"it is none of PEFT's methods{meant} PEFT has {', '.join(known_names())}")
        if (reason := why_unfit(name)) is not None:
            raise ValueError(f"cannot be trained here: {reason}")
        self.name, self.title = name, f"PEFT's {name}"

    @property
    def keys(self) -> list[str]:
        """Of its config, PEFT's bookkeeping left out."""
        from peft import PeftConfig

        return sorted({field.name for field in fields(_configs()[self.name])} - {f.name for f in fields(PeftConfig)})

    @property
    def size_key(self) -> str | None:
        """The key that says how much is trained; None where the method leaves no choice."""
        return next((key for key in SIZES if key in self.keys), None)

    def config(self, keys: Mapping[str, Any] | None, task_type: str = "CAUSAL_LM") -> PeftConfig:
        """PEFT's config, for its `task_type`.

        Raises:
            S2FTError: for keys that it does not have, or values that it refuses.
        """
        keys = keys or {}
        unknown = [key for key in keys if key not in self.keys]
        if unknown:
            raise S2FTError(
                f"peft_config={_listed(keys)}: {self.name} has no {', '.join(unknown)}; it has {', '.join(self.keys)}"
            )
        given = {"task_type": task_type, **keys}
        if "target_modules" in self.keys and self.name not in OWN_TARGETS:
            given.setdefault("target_modules", "all-linear")
        try:
            return _configs()[self.name](**given)
        except Exception as error:  # PEFT's configs check by ValueError, TypeError and ImportError
            raise S2FTError(f"peft_config={_listed(keys)}: {first_line(error)}") from error

    def problems(self, values: Mapping[str, Any]) -> list[str]:
        """What keys and learning rate are refused for."""
        keys = config_keys(values.get("peft_config")) or {}
        patterns = (f"peft_config: {text}" for name in _PATTERNS for text in pattern_problems(name, keys.get(name)))
        found = [*patterns] or gathered(lambda: self.config(keys)) or [*self._needs_base(keys, values)]
        if values.get("learning_rate") is None:
            found.append(f"learning_rate is missing: none is known for method={PREFIX}{self.name}; give one, or auto")
        return found

    def _needs_base(self, keys: Mapping[str, Any], values: Mapping[str, Any]) -> Iterator[str]:
        from s2ft.finetune.objectives import OBJECTIVES
        from s2ft.tuner.unloading import changes_base

        key, objective = changes_base(self.config(keys)), values.get("objective", "sft")
        if key is not None and OBJECTIVES[objective].needs_base:
            yield f"peft_config: {key}={keys[key]!r} changes the base, which objective={objective!r} needs as its reference"
        if key == "init_lora_weights" and values.get("learning_rate") == "auto":
            yield f"learning_rate='auto': {key}={keys[key]!r} changes the base at each of the short runs; give a rate"

    def peft_config(self, options: TrainOptions, model: PreTrainedModel, examples: Examples | None) -> PeftConfig:
        """The config with the keys that were given."""
        from s2ft.finetune.objectives import OBJECTIVES

        return self.config(options.peft_config, OBJECTIVES[options.objective].task_type)

    def of_size(self, model: PreTrainedModel, parameters: int, given: TrainOptions | None = None) -> dict[str, Any]:
        """The size key with which the number of parameters is nearest, beside the keys that are given."""
        key, keys = self.size_key, dict((given and given.peft_config) or {})
        if key is None or key in keys:
            return {"peft_config": keys} if keys else {}

        def count(size: int) -> int | None:
            try:
                return trained(model, self.config({**keys, key: size}))
            except S2FTError:  # a size that the config refuses
                return None

        size = nearest_size(count, parameters)
        return {"peft_config": keys if size is None else {**keys, key: size}}

    @contextmanager
    def building(self) -> Iterator[None]:
        """Reports what PEFT refuses to lay on this model."""
        try:
            yield
        except (ValueError, TypeError, RuntimeError, ImportError, NotImplementedError) as error:
            if isinstance(error, S2FTError):
                raise
            raise S2FTError(f"method='{PREFIX}{self.name}' does not go onto this model: {first_line(error)}") from error


def _listed(keys: Mapping[str, Any]) -> str:
    return ",".join(f"{key}={value}" for key, value in keys.items())


def trained(model: nn.Module, config: PeftConfig) -> int | None:
    """How many parameters the config trains on a model of device meta; None if PEFT refuses it."""
    import torch

    for count in (_whole, _layer_by_layer):
        with suppress(Exception), torch.random.fork_rng(devices=[]):  # as many kinds of errors as PEFT has methods
            return count(model, copy.deepcopy(config))
    return None


def _whole(model: nn.Module, config: PeftConfig) -> int:
    import torch
    from peft import get_peft_model

    with torch.device("meta"):
        return _count(get_peft_model(copy.deepcopy(model), config))


def _layer_by_layer(model: nn.Module, config: PeftConfig) -> int:
    """For methods that look at values: one real layer of each shape, as often as the model has it."""
    from peft import get_peft_model
    from torch import nn

    from s2ft.finetune.lora import linears
    from s2ft.layer.linears import features

    config.target_modules, config.task_type = ["0"], None
    shapes = Counter(map(features, linears(model).values()))
    single = {shape: get_peft_model(nn.Sequential(nn.Linear(*shape)), copy.deepcopy(config)) for shape in shapes}
    return sum(_count(single[shape]) * often for shape, often in shapes.items())


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def nearest_size(count: Callable[[int], int | None], wanted: int) -> int | None:
    """The size for which `count` is nearest to `wanted`; sizes without a count are passed over.

    Powers of two first, until `wanted` is passed or gets no nearer, then between the two nearest: some methods take only sizes
    that divide those of the model.

    Example:
        >>> nearest_size(lambda size: 100 * size, 1130), nearest_size(lambda size: 64 // size if size < 40 else None, 5)
        (11, 12)
    """
    counts: dict[int, int] = {}
    refused = 0
    for power in range(LARGEST):
        before = counts.get(max(counts, default=0))
        found = count(2**power)
        refused = refused + 1 if found is None else 0
        if found is not None:
            counts[2**power] = found
        if refused == MOST_REFUSED or (found is not None and before is not None and not _nearer(found, before, wanted)):
            break
    _refine(count, wanted, counts)
    return min(counts, key=lambda size: abs(counts[size] - wanted), default=None)


def _nearer(found: int, before: int, wanted: int) -> bool:
    """Whether a larger size goes on towards `wanted`, and has not passed it."""
    return (before < found < wanted) or (before > found > wanted)


def _refine(count: Callable[[int], int | None], wanted: int, counts: dict[int, int]) -> None:
    """Adds sizes between the two that `wanted` lies between."""
    sizes = sorted(counts)
    between = [(a, b) for a, b in pairwise(sizes) if min(counts[a], counts[b]) <= wanted <= max(counts[a], counts[b])]
    low, high = between[0] if between else (0, 0)
    while high - low > 1 and (found := count((low + high) // 2)) is not None:
        middle = (low + high) // 2
        counts[middle] = found
        low, high = (middle, high) if (found < wanted) == (counts[low] < counts[high]) else (low, middle)
