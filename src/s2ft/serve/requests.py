"""What clients may ask: OpenAI's completions and chat completions, and `fuse`. What is not served is refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, field_validator, model_validator

from s2ft.serve.adapters import MOST_FUSED
from s2ft.serve.errors import ApiError

MOST_ANSWERS = 64  # of one request, over all its prompts
_WITHOUT_EFFECT = {
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "parallel_tool_calls",
}
_NEUTRAL: dict[str, tuple[Any, ...]] = {  # options that are taken only where they ask for nothing
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "best_of": (1,),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}

Kind = TypeVar("Kind", bound=BaseModel)
Number = Annotated[float, Field(allow_inf_nan=False)]
Stop = Annotated[str, StringConstraints(min_length=1, max_length=256)]
Tokens = Annotated[list[Annotated[int, Field(ge=0, strict=True)]], Field(min_length=1)]


class StreamOptions(BaseModel):
    """How to stream."""

    model_config = ConfigDict(extra="forbid")
    include_usage: bool = False
    include_obfuscation: bool = False  # has no effect


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    model: str
    fuse: dict[str, Number] | None = Field(None, min_length=1, max_length=MOST_FUSED)
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int = Field(1, ge=1, le=MOST_ANSWERS)
    max_tokens: int | None = Field(None, ge=0)
    temperature: Number = Field(1.0, ge=0, le=2)
    top_p: Number = Field(1.0, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: list[Stop] = Field([], max_length=16)

    @model_validator(mode="before")
    @classmethod
    def _leave_out_what_asks_for_nothing(cls, values: Any) -> Any:
        """What has no effect here, and null, which stands for the default."""
        if not isinstance(values, Mapping):
            return values
        return {name: value for name, value in values.items() if not _is_neutral(name, value)}

    @field_validator("stop", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the tokens that it took."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def is_limited(self) -> bool:
        """Whether the client sent a limit of its own."""
        return not self.model_fields_set.isdisjoint({"max_tokens", "max_completion_tokens"})


class CompletionRequest(_Request):
    """`POST /v1/completions`."""

    prompt: str | Tokens | list[str] | list[Tokens]
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=5)

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each of them."""
        several = isinstance(self.prompt, list) and not isinstance(self.prompt[0] if self.prompt else 0, int)
        return list(self.prompt) if several else [self.prompt]  # type: ignore[arg-type, list-item]

    @property
    def limit(self) -> int | None:
        """The tokens of an answer; OpenAI's default is 16."""
        return 16 if self.max_tokens is None else self.max_tokens

    @property
    def top_logprobs(self) -> int | None:
        """How many are told; None for no logprobs."""
        return self.logprobs


class TextPart(BaseModel):
    """A part of a message."""

    model_config = ConfigDict(extra="forbid")
    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(extra="forbid")
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    @property
    def plain(self) -> dict[str, str]:
        """As chat templates expect it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}

    @model_validator(mode="before")
    @classmethod
    def _leave_out_null(cls, values: Any) -> Any:
        return (
            {name: value for name, value in values.items() if value is not None} if isinstance(values, dict) else values
        )


class ChatRequest(_Request):
    """`POST /v1/chat/completions`."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs_: int | None = Field(None, ge=0, le=20, alias="top_logprobs")

    @model_validator(mode="after")
    def _logprobs_are_asked_for(self) -> ChatRequest:
        if self.top_logprobs_ is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs=true")
        return self

    @property
    def limit(self) -> int | None:
        """The tokens of an answer; None for as many as there is room for."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def top_logprobs(self) -> int | None:
        """How many are told; None for no logprobs."""
        return (self.top_logprobs_ or 0) if self.logprobs else None


def parsed(kind: type[Kind], body: bytes) -> Kind:
    """The request in a body.

    Raises:
        ApiError: with the first thing that is wrong with it; values are not repeated, since they may be a prompt.
    """
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise _as_api_error(error) from None


def _is_neutral(name: str, value: Any) -> bool:
    return (
        value is None or name in _WITHOUT_EFFECT or (name in _NEUTRAL and any(value == one for one in _NEUTRAL[name]))
    )


def _as_api_error(error: ValidationError) -> ApiError:
    first = error.errors(include_url=False, include_input=False)[0]
    names = [str(part) for part in first["loc"] if isinstance(part, int) or part.isidentifier()]
    param = ".".join(names[:1]) or None
    if first["type"] == "json_invalid":
        return ApiError(400, "the body is not JSON")
    if first["type"] == "extra_forbidden":
        place = ".".join(names)
        message = f"{place} is not served here; leave it out"
    elif first["type"] == "missing":
        message = f"{'.'.join(names)} is missing"
    else:
        text = first["msg"].removeprefix("Value error, ")
        message = f"{param}: {text[0].lower()}{text[1:]}" if param else text
    return ApiError(400, message, param=param)
