"""Options as pydantic models that report every problem at once, each as `name=value must be ...`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from s2ft.common.errors import raise_together


def _at_least_one(value: int) -> int:
    if value < 1:
        raise ValueError("must be 1 or more")
    return value


def one_of(*known: str) -> AfterValidator:
    """The values that a text may have."""

    def check(value: str) -> str:
        if value not in known:
            raise ValueError(f"is unknown; choose from {', '.join(known)}")
        return value

    return AfterValidator(check)


Count = Annotated[int, AfterValidator(_at_least_one)]


class Options(BaseModel):
    """All options of a command; their descriptions are its help.

    Example:
        >>> class Some(Options):
        ...     model: str
        ...     limit: Count = 8
        >>> Some.parse({"limit": 0})
        Traceback (most recent call last):
            ...
        s2ft.common.errors.S2FTError: 2 problems:
          - model is missing
          - limit=0 must be 1 or more
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> Self:
        """The options from values, which may all be text.

        Raises:
            S2FTError: with everything that is wrong with the values, and with the files and folders that they name.
        """
        options, problems = cls._read(values)
        raise_together([*problems, *options.input_problems()])
        return options

    @classmethod
    def _read(cls, values: Mapping[str, Any]) -> tuple[Self, list[str]]:
        """The options, and what is wrong with the values; an option whose value is wrong or missing is `None` there."""
        try:
            return cls.model_validate(dict(values)), []
        except ValidationError as error:
            problems = _problems(error, cls)
            return cls.model_construct(**{**values, **dict.fromkeys(problems)}), list(problems.values())

    def input_problems(self) -> list[str]:
        """What is wrong with the files and folders that are named, and with options beside each other.

        An option whose own value is wrong is `None` here.
        """
        return []


def _problems(error: ValidationError, model: type[BaseModel]) -> dict[str, str]:
    """Option → what is wrong with it; of a union's alternatives, the first."""
    found: dict[str, str] = {}
    for item in error.errors():
        name = str(item["loc"][0])
        found.setdefault(name, _problem(name, item["type"], item["msg"], item["input"], model))
    return found


def _problem(name: str, kind: str, message: str, value: Any, model: type[BaseModel]) -> str:
    if kind == "missing":
        meant = model.model_fields[name].description
        return f"{name} is missing{f': {meant}' if meant else ''}"
    if kind == "extra_forbidden":
        return f"{name}={value!r} is no option here; there are {', '.join(model.model_fields)}"
    if kind == "value_error":
        return f"{name}={value!r} {message.removeprefix('Value error, ')}"
    return f"{name}={value!r}: {message[0].lower()}{message[1:]}"
