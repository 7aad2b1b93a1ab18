"""Answers in OpenAI's shapes: whole, and as chunks of a stream."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from s2ft.serve.job import Event, Job, Piece, Prompt, Told
from s2ft.serve.spelling import Offsets, Spelling


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
        jobs: The answers that are asked for, by their index.
    """

    prefix = whole = part = ""

    def __init__(
        self, model: str, tokenizer: Any, prompt_tokens: int, with_logprobs: bool, jobs: Sequence[Job] = ()
    ) -> None:
        self.tokenizer, self.spelling, self.with_logprobs = tokenizer, Spelling(tokenizer), with_logprobs
        self._prompt_tokens, self.jobs = prompt_tokens, jobs
        self._head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def response(self, answers: Sequence[Answer], generated: int) -> dict[str, Any]:
        """All answers, whole."""
        choices = [
            {"index": index, **self.body(index, one.text, one.tokens), "finish_reason": one.reason}
            for index, one in enumerate(answers)
        ]
        return {**self._head, "object": self.whole, "choices": choices, "usage": self.usage(generated)}

    def chunk(self, index: int, text: str, tokens: Sequence[Told], reason: str | None = None) -> dict[str, Any]:
        """A part of one answer."""
        choice = {"index": index, **self.delta(index, text, tokens), "finish_reason": reason}
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

    def body(self, index: int, text: str, tokens: Sequence[Told]) -> dict[str, Any]:
        """A whole answer."""
        raise NotImplementedError

    def delta(self, index: int, text: str, tokens: Sequence[Told]) -> dict[str, Any]:
        """A part of an answer, after those before."""
        return self.body(index, text, tokens)


class CompletionShape(Shape):
    """Of `/v1/completions`."""

    prefix, whole, part = "cmpl", "text_completion", "text_completion"

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self._offsets: dict[int, Offsets] = {}  # of each answer; those of a stream go on from part to part

    def body(self, index: int, text: str, tokens: Sequence[Told]) -> dict[str, Any]:
        """Text, and the older shape of logprobs."""
        return {"text": text, "logprobs": self._logprobs(index, tokens) if self.with_logprobs else None}

    def _logprobs(self, index: int, tokens: Sequence[Told]) -> dict[str, Any]:
        name = self.spelling.name
        if index not in self._offsets:
            self._offsets[index] = self._first_offsets(index)
        names, offsets = (list(map(how, (one.token for one in tokens))) for how in (name, self._offsets[index].add))
        tops = [
            None if told.logprob is None else {name(token): value for token, value in reversed(told.top)}
            for told in tokens
        ]
        return {
            "tokens": names,
            "token_logprobs": [told.logprob for told in tokens],
            "top_logprobs": tops,
            "text_offset": offsets,
        }

    def _first_offsets(self, index: int) -> Offsets:
        if index >= len(self.jobs) or not (job := self.jobs[index]).tell_prompt:
            return Offsets(self.spelling)
        return Offsets(self.spelling, job.prompt, prompt_text(job, self.tokenizer))


class ChatShape(Shape):
    """Of `/v1/chat/completions`."""

    prefix, whole, part = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self._begun: set[int] = set()  # answers whose first token is told

    def opening(self, index: int) -> Iterable[dict[str, Any]]:
        """Who speaks."""
        first = self.chunk(index, "", ())
        first["choices"][0]["delta"] = {"role": "assistant", "content": ""}
        return (first,)

    def body(self, index: int, text: str, tokens: Sequence[Told]) -> dict[str, Any]:
        """A message."""
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"message": message, "logprobs": self._logprobs(index, tokens)}

    def delta(self, index: int, text: str, tokens: Sequence[Told]) -> dict[str, Any]:
        """The rest of a message."""
        return {"delta": {"content": text} if text or tokens else {}, "logprobs": self._logprobs(index, tokens)}

    def _logprobs(self, index: int, tokens: Sequence[Told]) -> dict[str, Any] | None:
        if not self.with_logprobs or not tokens:
            return None
        begins = index not in self._begun
        self._begun.add(index)
        content = [self._with_top(one, begins and place == 0) for place, one in enumerate(tokens)]
        return {"content": content, "refusal": None}

    def _with_top(self, told: Told, is_first: bool) -> dict[str, Any]:
        tops = [self._named(token, value, is_first) for token, value in told.top]
        return {**self._named(told.token, told.logprob or 0.0, is_first), "top_logprobs": tops}

    def _named(self, token: int, logprob: float, is_first: bool) -> dict[str, Any]:
        """The token and its bytes; none for a special token, which has no part in the text."""
        data = None if self.spelling.is_silent(token) else list(self.spelling.data(token, is_first))
        return {"token": self.spelling.name(token, is_first), "logprob": logprob, "bytes": data}


def prompt_text(job: Job, tokenizer: Any) -> str:
    """The prompt as the client sent it; tokens as they are, with special ones."""
    return str(tokenizer.decode(list(job.prompt))) if job.text is None else job.text


def told(event: Event, job: Job, tokenizer: Any) -> tuple[str, tuple[Told, ...]]:
    """The text and the tokens that an event adds to the answer to a job."""
    if isinstance(event, Prompt):
        return prompt_text(job, tokenizer), event.tokens
    return (event.text, event.tokens) if isinstance(event, Piece) else ("", ())
