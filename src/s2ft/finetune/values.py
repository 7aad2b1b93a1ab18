"""Kinds of option values: how each is read from text, and which values are refused.

The command line hands over the text that was typed, a YAML file numbers and lists; both come out the same.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator
from pydantic.fields import FieldInfo

AUTO_RATE = "auto"  # the learning rate that short runs find
_EXPONENT = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")


class Options(BaseModel):
    """A group of options: no other names, no infinite numbers, and `true` is no 1."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_boolean(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuses true and false where pydantic would read them as 1 and 0."""
        annotation = cls.model_fields[str(info.field_name)].annotation
        if annotation is not bool and "Any" not in str(annotation) and _holds_boolean(value):
            wanted = "a number" if any(kind in str(annotation) for kind in ("int", "float")) else "text"
            raise ValueError(f"{wanted} is wanted, not true/false")
        return value


def _holds_boolean(value: Any) -> bool:
    members = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
    return any(isinstance(member, bool) for member in members)


def _words(value: Any) -> Any:
    """Reads "a, b" as ["a", "b"]."""
    return [word.strip() for word in value.split(",") if word.strip()] if isinstance(value, str) else value


def _one_or_many(value: Any) -> Any:
    """Reads "a" as ["a"]."""
    return [value] if isinstance(value, str) else value


def _word_or_words(value: Any) -> Any:
    """Reads "a, b" as ["a", "b"]; a single word stays a text."""
    return _words(value) if isinstance(value, str) and "," in value else value


def _ratios(value: Any) -> Any:
    """Reads "o_proj=0.05,down_proj=0.02" as a mapping, "0.05" as a number."""
    if not isinstance(value, str):
        return value
    return _pairs(value, "give each projection one ratio") if "=" in value else _number(value)


def _columns(value: Any) -> Any:
    """Reads "instruction=question,output=answer" as a mapping."""
    if not isinstance(value, str):
        return value
    if not all("=" in word for word in _words(value)) or not value.strip():
        raise ValueError("must be pairs of a name and the data's column, such as instruction=question,output=answer")
    return _pairs(value, "take each from one column")


def _pairs(text: str, advice: str) -> dict[str, str]:
    """Reads "a=1,b=2" as {"a": "1", "b": "2"}."""
    pairs = [word.partition("=") for word in _words(text)]
    names = [name.strip() for name, _, _ in pairs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"names {', '.join(twice)} more than once; {advice}")
    return {name: item.strip() for name, (_, _, item) in zip(names, pairs, strict=True)}


def _number(value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise ValueError("must be a fraction such as 0.05, or one per projection: o_proj=0.05,down_proj=0.02") from None


def _rate(value: Any) -> Any:
    """Refuses text that is neither a number nor "auto"."""
    if isinstance(value, str) and value != AUTO_RATE:
        try:
            float(value)
        except ValueError:
            raise ValueError(f"must be a number such as 2e-3, or {AUTO_RATE}") from None
    return value


def config_keys(value: Any) -> Any:
    """Reads "r=8,bias=all" and "{r: 8, bias: all}" as mappings; the values as YAML reads them."""
    if not isinstance(value, str):
        return value
    text = value.strip()
    if not text.startswith("{"):
        pairs = [word.partition("=") for word in re.split(r",(?![^\[]*\])", text)]  # no comma inside of [ ]
        if not all(equals for _, equals, _ in pairs):
            raise ValueError("must be key=value, joined by commas, or a YAML mapping: {r: 8}")
        text = "{" + ", ".join(f"{key.strip()}: {rest}" for key, _, rest in pairs) + "}"
    try:
        return _numbers_read(yaml.safe_load(text))
    except yaml.YAMLError as error:
        raise ValueError(f"is no YAML: {getattr(error, 'problem', error)}") from None


def _numbers_read(value: Any) -> Any:
    """With 1e-7 as a number, which PyYAML takes for text unless it has a point."""
    if isinstance(value, dict):
        return {key: _numbers_read(item) for key, item in value.items()}
    if isinstance(value, list):
        return [*map(_numbers_read, value)]
    return float(value) if isinstance(value, str) and _EXPONENT.fullmatch(value) else value


def _layers(value: Any) -> Any:
    """Reads "3" as 3 and "1,2" as [1, 2]; ranges such as "8-15" and "last:50%" stay text."""
    if not isinstance(value, str):
        return value
    numbers = [int(word) for word in _words(value) if word.lstrip("-").isdigit()]
    if not numbers or len(numbers) != len(_words(value)):
        return value
    return numbers if "," in value else numbers[0]


def _both_named(value: Any) -> Any:
    """Refuses a mapping with an empty name on either side."""
    if value is not None and not all(text.strip() for pair in value.items() for text in pair):
        raise ValueError("must have a name on both sides of each =")
    return value


def _named(value: Any) -> Any:
    """Refuses empty names, which a path would read as the current folder, and NUL, which no path can hold."""
    names = [value] if isinstance(value, str) else value
    if names is not None and (not names or not all(name.strip() for name in names)):
        raise ValueError("must not be empty")
    return _without_nul(value)


def _without_nul(value: Any) -> Any:
    if value is not None and any("\0" in name for name in value):
        raise ValueError("must not hold the character NUL")
    return value


Positive = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
Rate = Annotated[PositiveFloat | Literal["auto"] | None, BeforeValidator(_rate)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Name = Annotated[str, AfterValidator(_named)]
Names = Annotated[list[str], BeforeValidator(_one_or_many), AfterValidator(_named)]
CommaNames = Annotated[list[str], BeforeValidator(_words), AfterValidator(_named)]
Columns = Annotated[dict[str, str] | None, BeforeValidator(_columns), AfterValidator(_both_named)]
Weights = Annotated[list[PositiveFloat] | None, BeforeValidator(_words)]
Ratios = Annotated[float | dict[str, float] | None, BeforeValidator(_ratios)]
ConfigKeys = Annotated[dict[str, Any] | None, BeforeValidator(config_keys)]
Layers = Annotated[int | list[int] | str | None, BeforeValidator(_layers)]
Avoided = Annotated[list[str] | None, BeforeValidator(_words), AfterValidator(_without_nul)]
Targets = Annotated[str | list[str] | None, BeforeValidator(_word_or_words), AfterValidator(_named)]


def repeats(field: FieldInfo) -> bool:
    """Whether an option is given once more for each further value (`Names`, and lists as they are), not with commas between."""
    notes = [
        *field.metadata,
        *(note for kind in get_args(field.annotation) for note in getattr(kind, "__metadata__", ())),
    ]
    readers = [note.func for note in notes if isinstance(note, BeforeValidator)]
    return _one_or_many in readers or (field.annotation == list[str] and not readers)
