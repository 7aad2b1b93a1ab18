"""Answers in OpenAI's shapes: whole, and as chunks of a stream."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from s2ft.serve.job import Event, Piece, Prompt, Told
from s2ft.serve.text import HALF


@dataclass
class Answer:
    """One answer, as far as it is written."""

    text: str = ""
    tokens: list[Told] = field(default_factory=list)
    reason: str | None = None


class Shape:
    """How the answers to one request look.

    Args:
        model: What the client is told that answered.
        tokenizer: For the names of tokens.
        prompt_tokens: Over all prompts.
        with_logprobs: Whether they are told.
    """

    prefix = whole = part = ""

    def __init__(self, model: str, tokenizer: Any, prompt_tokens: int, with_logprobs: bool) -> None:
        self.tokenizer, self.with_logprobs = tokenizer, with_logprobs
        self._prompt_tokens = prompt_tokens
        self._head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def response(self, answers: Sequence[Answer], generated: int) -> dict[str, Any]:
        """All answers, whole."""
        choices = [
            {"index": index, **self.body(one.text, one.tokens), "finish_reason": one.reason}
            for index, one in enumerate(answers)
        ]
        return {**self._head, "object": self.whole, "choices": choices, "usage": self.usage(generated)}

    def chunk(self, index: int, text: str, tokens: Sequence[Told], reason: str | None = None) -> dict[str, Any]:
        """A part of one answer."""
        choice = {"index": index, **self.delta(text, tokens), "finish_reason": reason}
        return {**self._head, "object": self.part, "choices": [choice]}

    def usage_chunk(self, generated: int) -> dict[str, Any]:
        """The last chunk, where it is asked for."""
        return {**self._head, "object": self.part, "choices": [], "usage": self.usage(generated)}

    def usage(self, generated: int) -> dict[str, int]:
        """Tokens that the request took."""
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": generated,
            "total_tokens": self._prompt_tokens + generated,
        }

    def opening(self, index: int) -> Iterable[dict[str, Any]]:
        """What a stream begins with."""
        return ()

    def body(self, text: str, tokens: Sequence[Told]) -> dict[str, Any]:
        """A whole answer."""
        raise NotImplementedError

    def delta(self, text: str, tokens: Sequence[Told]) -> dict[str, Any]:
        """A part of an answer."""
        return self.body(text, tokens)

    def token(self, token: int) -> str:
        """A token as text; half a character by the name that the tokenizer has for it."""
        text = str(self.tokenizer.decode([token]))
        return str(self.tokenizer.convert_ids_to_tokens(token)) if HALF in text else text


class CompletionShape(Shape):
    """Of `/v1/completions`."""

    prefix, whole, part = "cmpl", "text_completion", "text_completion"

    def body(self, text: str, tokens: Sequence[Told]) -> dict[str, Any]:
        """Text, and the older shape of logprobs."""
        return {"text": text, "logprobs": self._logprobs(tokens) if self.with_logprobs else None}

    def _logprobs(self, tokens: Sequence[Told]) -> dict[str, Any]:
        names = [self.token(told.token) for told in tokens]
        offsets = [sum(map(len, names[:place])) for place in range(len(names))]
        tops = [
            None if told.logprob is None else {self.token(token): value for token, value in reversed(told.top)}
            for told in tokens
        ]
        return {
            "tokens": names,
            "token_logprobs": [told.logprob for told in tokens],
            "top_logprobs": tops,
            "text_offset": offsets,
        }


class ChatShape(Shape):
    """Of `/v1/chat/completions`."""

    prefix, whole, part = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def opening(self, index: int) -> Iterable[dict[str, Any]]:
        """Who speaks."""
        first = self.chunk(index, "", ())
        first["choices"][0]["delta"] = {"role": "assistant", "content": ""}
        return (first,)

    def body(self, text: str, tokens: Sequence[Told]) -> dict[str, Any]:
        """A message."""
        return {"message": {"role": "assistant", "content": text, "refusal": None}, "logprobs": self._logprobs(tokens)}

    def delta(self, text: str, tokens: Sequence[Told]) -> dict[str, Any]:
        """The rest of a message."""
        return {"delta": {"content": text} if text or tokens else {}, "logprobs": self._logprobs(tokens)}

    def _logprobs(self, tokens: Sequence[Told]) -> dict[str, Any] | None:
        if not self.with_logprobs or not tokens:
            return None
        content = [
            {
                **self._named(told.token, told.logprob or 0.0),
                "top_logprobs": [self._named(token, value) for token, value in told.top],
            }
            for told in tokens
        ]
        return {"content": content, "refusal": None}

    def _named(self, token: int, logprob: float) -> dict[str, Any]:
        name = self.token(token)
        return {"token": name, "logprob": logprob, "bytes": list(name.encode())}


def told(event: Event, tokenizer: Any) -> tuple[str, tuple[Told, ...]]:
    """The text and the tokens that an event adds to an answer."""
    if isinstance(event, Prompt):
        return str(tokenizer.decode([one.token for one in event.tokens])), event.tokens
    return (event.text, event.tokens) if isinstance(event, Piece) else ("", ())
