"""Answers to keywords that `S2FTConfig` does not know, above all LoRA's."""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

from s2ft.common.errors import S2FTError

_SIZE = (
    "S²FT has no rank; how much is trained is `ratios` (fraction of heads and channels, such as "
    "{'o_proj': 0.05, 'down_proj': 0.02}) or `budget` (fraction of the model's parameters, 0.01 unless given)"
)
_SCALE = "there is no scale: the deltas are weights themselves, and the learning rate alone says how far they move"
_SHARES = "layers and projections share by `ratios` (one for each projection) and `allocation`"
INSTEAD = {
    "r": _SIZE,
    "rank": _SIZE,
    "lora_rank": _SIZE,
    "lora_alpha": _SCALE,
    "use_rslora": _SCALE,
    "lora_dropout": "there is no dropout: the deltas are part of the layer's own weights",
    "init_lora_weights": "give `init_weights`; deltas start at zero unless it is False",
    "rank_pattern": _SHARES,
    "alpha_pattern": _SHARES,
    "bias": "biases are not trained; name whole modules by `modules_to_save`",
    "lora_bias": "biases are not trained; name whole modules by `modules_to_save`",
    "fan_in_fan_out": "it is read off each layer",
    "use_dora": "there is no magnitude to train besides the weights",
}
T = TypeVar("T")


class UnknownKeywordError(S2FTError, TypeError):
    """A keyword that the config does not take; a TypeError, which PEFT expects for the keys of newer config files."""


def explain_unknown(cls: type[T]) -> type[T]:
    """Class decorator for a dataclass: its constructor explains the keywords that it refuses."""
    made: Any = cls
    known = [field.name for field in dataclasses.fields(made)]
    plain: Callable[..., None] = made.__init__

    @functools.wraps(plain)
    def explaining(self: T, *args: Any, **values: Any) -> None:
        unknown = {name: value for name, value in values.items() if name not in known}
        if unknown:
            raise UnknownKeywordError(_message(cls.__name__, unknown, known))
        plain(self, *args, **values)

    made.__init__ = explaining
    return cls


def _message(name: str, unknown: Mapping[str, Any], known: Collection[str]) -> str:
    """Begins like Python's own message, by which PEFT tells an unknown keyword from other TypeErrors."""
    start = f"{name} got an unexpected keyword argument"
    lines = [f"{key}={value!r}: {hint(key, known)}" for key, value in unknown.items()]
    if len(lines) == 1:
        return f"{start} {lines[0]}"
    return f"{start} more than once:\n" + "\n".join(f"  - {line}" for line in lines)


def hint(key: str, known: Collection[str], is_s2ft: bool = True) -> str:
    """What to give instead of `key`.

    Args:
        known: The options that there are.
        is_s2ft: False where they are another method's, so that the hints for those who come from LoRA do not apply.

    Example:
        >>> hint("fan_in_fan_out", ()), hint("ratio", ["ratios", "budget"])
        ('it is read off each layer', 'no such option; did you mean ratios?')
    """
    if is_s2ft and key in INSTEAD:
        return INSTEAD[key]
    near = difflib.get_close_matches(key, known, n=1)
    if near:
        return f"no such option; did you mean {near[0]}?"
    if not is_s2ft:
        return "no such option"
    from peft import LoraConfig  # here, since the command line asks before PEFT is loaded

    is_lora = key in {field.name for field in dataclasses.fields(LoraConfig)}
    return "an option of LoRA that S²FT does not have" if is_lora else "no such option"
