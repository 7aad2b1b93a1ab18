"""From a request to its events: prompts are read, the adapter is chosen, jobs are given to the engine and followed."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from s2ft.common.errors import S2FTError
from s2ft.data.template import EndlessTemplateError, chat_ids
from s2ft.data.tokens import text_ids
from s2ft.serve.adapters import MOST_FUSED, Adapters, Chosen, TooManyError, UnknownModelError, label
from s2ft.serve.batch import Batch
from s2ft.serve.channels import channels
from s2ft.serve.errors import ApiError, failed, full, no_model, overflow
from s2ft.serve.job import End, Event, Failure, Job, Piece, Sampling
from s2ft.serve.metrics import Metrics
from s2ft.serve.model import Base
from s2ft.serve.options import ServeOptions
from s2ft.serve.requests import MOST_ANSWERS, ChatRequest, CompletionRequest
from s2ft.serve.scheduler import FullError, Scheduler, StoppingError
from s2ft.tuner.pool import AdapterPool

GIGABYTE = 10**9
_log = logging.getLogger("s2ft.serve")
Asked = CompletionRequest | ChatRequest


class Service:
    """A base, its adapters, and the engine that answers by them.

    Args:
        options: Limits and the adapters' folder.
        base: The base model; it is this service's own from now on.

    Raises:
        S2FTError: if an adapter has the base's name.
    """

    def __init__(self, options: ServeOptions, base: Base) -> None:
        self.options, self.base, self.metrics = options, base, Metrics()
        device_bytes, host_bytes = (int(size * GIGABYTE) for size in (options.adapter_gb, options.host_gb))
        pool = AdapterPool(base.tuner, {}, max(1, device_bytes), host_bytes)
        self._scheduler = Scheduler(
            *(Batch(base.tuner), pool, base.tokenizer, base.ends, options.rows, options.queue),
            *(self._deliver, self.metrics),
        )
        self.adapters = Adapters(options.base_name, options.adapters, self._scheduler.retire)
        self.created = int(time.time())
        self._readers, self._fusers = ThreadPoolExecutor(2, "s2ft reader"), ThreadPoolExecutor(1, "s2ft fuser")
        self._fusing: dict[str, asyncio.Task[None]] = {}  # by key: those that several ask for at once are made once
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def is_alive(self) -> bool:
        """Whether it answers."""
        return self._scheduler.is_alive

    def start(self) -> None:
        """Starts the engine; its events go to the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._scheduler.start()

    def stop(self) -> None:
        """Takes no more requests; those under way are told that the server stops."""
        self._scheduler.stop()

    async def close(self) -> None:
        """Ends the engine."""
        await asyncio.to_thread(self._scheduler.close)
        for pool in (self._readers, self._fusers):
            pool.shutdown(wait=False, cancel_futures=True)
        self.adapters.close()

    async def ask(self, asked: Asked) -> Asking:
        """Begins to answer.

        Raises:
            ApiError: if that cannot be done.
        """
        try:
            recipe = self.adapters.recipe(asked.model, asked.fuse)
            prompts = await self._read(asked)
            chosen = await self._chosen(recipe)
        except UnknownModelError:
            raise _unknown(asked) from None
        except TooManyError:
            raise ApiError(400, f"model: a fusion has at most {MOST_FUSED} adapters", "model") from None
        is_weighed = any(weight != 1 for weight in (asked.fuse or {}).values())
        asking = Asking(chosen, prompts, self._jobs(asked, prompts, chosen), is_weighed)
        try:
            self._scheduler.submit(asking.jobs)  # no `await` since `_chosen`: a fusion stays until its jobs are known
        except FullError:
            raise full() from None
        except StoppingError:
            raise failed("stopping") from None
        return asking

    async def channels(self, name: str) -> list[dict[str, Any]]:
        """What an adapter trains (`serve/channels.py`).

        Raises:
            ApiError: if there is no such adapter, or it cannot be read.
        """
        try:
            folder = self.adapters.place(name)
            return await asyncio.get_running_loop().run_in_executor(
                self._readers, channels, folder, self.base.tuner.model
            )
        except UnknownModelError:
            raise no_model(name) from None
        except S2FTError as error:
            _log.error("the channels of the adapter %r cannot be read: %s", name, error)
            raise failed("adapter") from None

    async def _chosen(self, recipe: dict[str, float]) -> Chosen:
        while (chosen := self.adapters.choose(recipe)) is None:
            key = self.adapters.fusion_key(recipe)
            if (fusing := self._fusing.get(key)) is None:
                fusing = self._fusing[key] = asyncio.create_task(self._fuse(recipe))
                fusing.add_done_callback(partial(self._fused, key))
            await asyncio.shield(fusing)  # it is kept, even if the client leaves
        return chosen

    def _fused(self, key: str, _: asyncio.Task[None]) -> None:
        del self._fusing[key]

    async def _fuse(self, recipe: dict[str, float]) -> None:
        try:
            key, folder = await asyncio.get_running_loop().run_in_executor(self._fusers, self.adapters.fused, recipe)
        except S2FTError as error:
            _log.error("the adapters %s cannot be fused: %s", label(recipe), error)  # it may name paths
            raise ApiError(400, "these adapters cannot be fused so; the server's log says why", "fuse") from None
        self.adapters.keep(recipe, key, folder)

    async def _read(self, asked: Asked) -> list[list[int]]:
        """The token ids of each prompt."""
        loop = asyncio.get_running_loop()
        prompts = await loop.run_in_executor(self._readers, self._token_ids, asked)
        most = min(MOST_ANSWERS, self.options.rows + self.options.queue)
        if len(prompts) * asked.n > most:
            raise ApiError(
                400, f"{len(prompts) * asked.n} answers are asked for; this server gives {most} at once", "n"
            )
        for prompt in prompts:
            self._check(prompt)
        return prompts

    def _token_ids(self, asked: Asked) -> list[list[int]]:
        return self._chat(asked) if isinstance(asked, ChatRequest) else self._texts(asked)

    def _chat(self, asked: ChatRequest) -> list[list[int]]:
        if not self.base.tokenizer.chat_template:
            raise ApiError(400, "the model has no chat template; use /v1/completions", "messages")
        try:
            return [chat_ids(self.base.tokenizer, [message.plain for message in asked.messages], ask=True)]
        except EndlessTemplateError as error:
            raise ApiError(500, str(error), "messages") from None
        except S2FTError as error:
            raise ApiError(400, str(error), "messages") from None

    def _texts(self, asked: CompletionRequest) -> list[list[int]]:
        read = self.base.tokenizer
        return [text_ids(read, one) if isinstance(one, str) else list(one) for one in asked.prompts]

    def _check(self, prompt: Sequence[int]) -> None:
        if not prompt:
            raise ApiError(400, "the prompt has no tokens", "prompt")
        if max(prompt) >= self.base.vocabulary:
            raise ApiError(400, f"token {max(prompt)} is none of the model's {self.base.vocabulary}", "prompt")
        most = min(self.options.max_prompt, (self.base.positions or 10**9) - 1)
        if len(prompt) > most:
            raise _too_long(f"the prompt has {len(prompt)} tokens; this server takes {most}", "prompt")

    def _jobs(self, asked: Asked, prompts: Sequence[Sequence[int]], chosen: Chosen) -> list[Job]:
        seed = secrets.randbits(62) if asked.seed is None else asked.seed
        deadline, inbox = time.monotonic() + self.options.timeout, asyncio.Queue[Any]()
        goes_on = isinstance(asked, CompletionRequest)
        sent = asked.prompts if isinstance(asked, CompletionRequest) else [None]
        tell_prompt = isinstance(asked, CompletionRequest) and asked.echo and asked.logprobs is not None
        jobs: list[Job] = []
        for prompt, one in zip(prompts, sent, strict=True):
            text = one if isinstance(one, str) else None
            room = self._room(asked, len(prompt))
            for number in range(asked.n):
                sampling = Sampling(room, asked.temperature, asked.top_p, seed + number, asked.top_logprobs)
                place = (chosen.folder, tuple(asked.stop), tell_prompt, len(jobs), deadline, inbox)
                jobs.append(Job(prompt, chosen.key, sampling, *place, text, goes_on=goes_on))
        return jobs

    def _room(self, asked: Asked, length: int) -> int:
        """How many tokens the answer to a prompt may have."""
        room = min(self.options.max_output, (self.base.positions or 10**9) - length)
        limit = room if asked.limit is None else asked.limit
        if limit > room and asked.is_limited:  # a default is no wish
            whole = f"the prompt has {length} tokens, and the answer may have {room} more"
            raise _too_long(f"max_tokens is {limit}; {whole}", "max_tokens")
        return min(limit, room)

    def _deliver(self, events: list[tuple[Job, Event]]) -> None:
        """From the engine's thread to those who wait, all events of a turn at once."""
        assert self._loop is not None
        self._loop.call_soon_threadsafe(_hand_out, events)


class Asking:
    """The answers to one request, as they are written.

    Args:
        chosen: What answers.
        prompts: Their tokens.
        jobs: One for each answer; their events come into one inbox.
        is_weighed: Whether the client chose the weights of a fusion.
    """

    def __init__(
        self, chosen: Chosen, prompts: Sequence[Sequence[int]], jobs: list[Job], is_weighed: bool = False
    ) -> None:
        self.chosen, self.jobs, self.generated, self._is_weighed = chosen, jobs, 0, is_weighed
        self.prompt_tokens = sum(map(len, prompts))

    async def events(self) -> AsyncGenerator[tuple[int, Event], None]:
        """(Which answer, what happened), until all have their end.

        Raises:
            ApiError: if one of them fails; the others are given up.
        """
        open_ends = len(self.jobs)
        try:
            while open_ends:
                index, event = await self.jobs[0].inbox.get()
                if isinstance(event, Failure):
                    raise self._error(event)
                if isinstance(event, Piece):
                    self.generated += len(event.tokens)  # at once: an answer that is cut short has no end
                elif isinstance(event, End):
                    open_ends -= 1
                yield index, event
        finally:
            self.cancel()

    def _error(self, failure: Failure) -> ApiError:
        is_weights = failure.kind == "overflow" and self._is_weighed
        return overflow(self.chosen.label) if is_weights else failed(failure.kind, self.chosen.label)

    def cancel(self) -> None:
        """Nobody waits any more."""
        for job in self.jobs:
            job.is_cancelled = True


def _hand_out(events: list[tuple[Job, Event]]) -> None:
    for job, event in events:
        job.inbox.put_nowait((job.index, event))


def _unknown(asked: Asked) -> ApiError:
    return no_model(asked.model if asked.fuse is None else "+".join(asked.fuse))


def _too_long(message: str, param: str) -> ApiError:
    return ApiError(400, message, param, "context_length_exceeded")
