"""Responses as their answers are written: whole, or as a stream of server-sent events; given up when the client leaves."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable
from contextlib import aclosing
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from s2ft.serve.errors import ApiError
from s2ft.serve.job import End, Told
from s2ft.serve.logs import NOTES
from s2ft.serve.requests import ChatRequest, CompletionRequest
from s2ft.serve.responses import Answer, ChatShape, CompletionShape, Shape, prompt_text, told
from s2ft.serve.service import Asked, Asking, Service

GONE = 499  # the status, in the log, of a response that nobody was there to read
Part = tuple[int, str, tuple[Told, ...], str | None]  # which answer, its text, its tokens, why it ends
Parts = AsyncGenerator[Part, None]
Made = TypeVar("Made")


async def answer(service: Service, asked: Asked, request: Request) -> Response:
    """The response to a request for answers.

    Raises:
        ApiError: if there is none.
    """
    asking = await service.ask(asked)
    kind = ChatShape if isinstance(asked, ChatRequest) else CompletionShape
    shape = kind(
        asking.chosen.label, service.base.tokenizer, asking.prompt_tokens, asked.top_logprobs is not None, asking.jobs
    )
    parts = _counted(_parts(service, asked, asking), asking, service, request.scope[NOTES])
    if not asked.stream:
        return await _unless_gone(request, _whole(parts, asking, shape)) or Response(status_code=GONE)
    first = await _unless_gone(request, anext(parts))  # what fails at once fails with a status
    if first is None:
        return Response(status_code=GONE)
    lines = _lines(_chained(first, parts), asking, shape, asked.include_usage)
    return StreamingResponse(lines, media_type="text/event-stream", headers={"Cache-Control": "no-store"})


async def _parts(service: Service, asked: Asked, asking: Asking) -> Parts:
    """The answers' parts; with `echo`, each begins with its prompt."""
    echo = isinstance(asked, CompletionRequest) and asked.echo
    if echo and not asking.jobs[0].tell_prompt:
        for job in asking.jobs:
            yield job.index, prompt_text(job, service.base.tokenizer), (), None
    async with aclosing(asking.events()) as events:
        async for index, event in events:
            text, tokens = told(event, asking.jobs[index], service.base.tokenizer)
            yield index, text, tokens, event.reason if isinstance(event, End) else None


async def _counted(parts: Parts, asking: Asking, service: Service, notes: dict[str, Any]) -> Parts:
    """The parts; when they end, or nobody wants more, the tokens are counted."""
    notes |= {"model": asking.chosen.label, "prompt_tokens": asking.prompt_tokens}
    try:
        async with aclosing(parts):
            async for part in parts:
                yield part
    finally:
        asking.cancel()
        notes["answer_tokens"] = asking.generated
        service.metrics.tokens(asking.prompt_tokens, asking.generated)


async def _whole(parts: Parts, asking: Asking, shape: Shape) -> Response:
    answers = [Answer() for _ in asking.jobs]
    async with aclosing(parts):
        async for index, text, tokens, reason in parts:
            one = answers[index]
            one.text, one.reason = one.text + text, reason or one.reason
            one.tokens += tokens
    return JSONResponse(shape.response(answers, asking.generated))


async def _unless_gone(request: Request, work: Awaitable[Made]) -> Made | None:
    """What `work` returns; when the client leaves, it is given up, and there is nothing."""
    working, leaving = asyncio.ensure_future(work), asyncio.create_task(_gone(request))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _chained(first: Part, rest: Parts) -> Parts:
    async with aclosing(rest):
        yield first
        async for part in rest:
            yield part


async def _lines(parts: Parts, asking: Asking, shape: Shape, usage: bool) -> AsyncGenerator[str, None]:
    """Server-sent events; the last one is [DONE]."""
    try:
        async with aclosing(parts):
            for job in asking.jobs:
                for chunk in shape.opening(job.index):
                    yield _line(chunk)
            async for index, text, tokens, reason in parts:
                if text or reason or (tokens and shape.with_logprobs):  # an end token by itself says nothing
                    yield _line(shape.chunk(index, text, tokens, reason))
        if usage:
            yield _line(shape.usage_chunk(asking.generated))
    except ApiError as error:
        yield _line(error.body)
    yield "data: [DONE]\n\n"


def _line(value: Any) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"
