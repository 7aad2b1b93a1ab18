"""What writes the answers: token ids of prompts → texts. Two engines, one interface; prompts and scoring are the same.

transformers    in this process: prompts of similar length share a batch, padded on the left, with a key-value cache
vllm            vLLM, where it is installed; an adapter is merged into a copy of its base first

    · · · p p p p │ a a a end            positions and attention skip the padding "·", so an answer
    p p p p p p p │ a a a a a end        does not depend on what else is in the batch, except for rounding

The longest prompts come first: a lack of memory shows at once, and the estimate of the time left errs on the long side. Batches
are made of all prompts, those that are done already included, so that an interrupted run goes on in the same batches.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from s2ft.common.errors import S2FTError, first_line
from s2ft.data.template import chat_ids
from s2ft.data.tokens import end_tokens, text_ids
from s2ft.evaluate.questions import Prompt
from s2ft.evaluate.tasks import Decoding
from s2ft.evaluate.writing import STRETCH, written
from s2ft.runtime.failures import is_out_of_memory
from s2ft.runtime.models import positions

_CHUNK = 256  # prompts that vLLM gets at once: after each chunk the answers are kept


@dataclass(frozen=True)
class Answer:
    """The answer to a prompt: a text, or an error that says why there is none."""

    text: str | None
    truncated: bool = False  # cut off at the limit
    error: str | None = None


class Engine(Protocol):
    """Anything that answers prompts."""

    def answers(
        self, prompts: Sequence[list[int]], decoding: Decoding, done: Collection[int] = ()
    ) -> Iterator[list[tuple[int, Answer]]]:
        """Batches of (index of the prompt, its answer), in any order; those of `done` are left out."""


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """The token ids of a prompt, as training makes them, up to where the response begins.

    Raises:
        S2FTError: if a conversation is given, and the tokenizer cannot lay it out.
    """
    if isinstance(prompt, str):
        return text_ids(tokenizer, prompt)
    if not tokenizer.chat_template:
        raise S2FTError("prompt='chat' needs a tokenizer with a chat template, and the model's has none; take 'alpaca'")
    return chat_ids(tokenizer, prompt, ask=True)


def end_ids(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end an answer: those that training teaches, and those that the model names."""
    return all_ends(getattr(model, "generation_config", None), tokenizer)


def all_ends(generation: GenerationConfig | None, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """As `end_ids`, of a model with this generation config."""
    named = getattr(generation, "eos_token_id", None)
    ids = [*end_tokens(tokenizer), *(named if isinstance(named, list) else [named])]
    return list(dict.fromkeys(token for token in ids if token is not None))


class VllmEngine:
    """vLLM on a model folder.

    Args:
        folder: The model, with its tokenizer; adapters merged.
        dtype: Of the weights: "bfloat16" or "float32".
        ends: The tokens that end an answer.
    """

    def __init__(self, folder: str, dtype: str, ends: Sequence[int]) -> None:
        check_vllm()
        from vllm import LLM

        self._llm, self._ends = LLM(model=folder, dtype=dtype), list(ends)

    def answers(
        self, prompts: Sequence[list[int]], decoding: Decoding, done: Collection[int] = ()
    ) -> Iterator[list[tuple[int, Answer]]]:
        """Answers in chunks, in order."""
        pending = [index for index in range(len(prompts)) if index not in set(done)]
        for start in range(0, len(pending), _CHUNK):
            chunk = pending[start : start + _CHUNK]
            write = self._beams if decoding.beams > 1 else self._greedy
            found = rescued(lambda some: write(some, decoding), [prompts[index] for index in chunk])  # noqa: B023
            yield list(zip(chunk, found, strict=True))

    def _greedy(self, prompts: list[list[int]], decoding: Decoding) -> list[Answer]:
        from vllm import SamplingParams

        settings = SamplingParams(temperature=0, max_tokens=decoding.max_new_tokens, stop_token_ids=self._ends)
        outputs = self._llm.generate(_as_vllm(prompts), settings, use_tqdm=False)
        best = [output.outputs[0] for output in outputs]
        return [Answer(one.text, truncated=one.finish_reason == "length") for one in best]

    def _beams(self, prompts: list[list[int]], decoding: Decoding) -> list[Answer]:
        from vllm.sampling_params import BeamSearchParams

        settings = BeamSearchParams(beam_width=decoding.beams, max_tokens=decoding.max_new_tokens)
        outputs = self._llm.beam_search(_as_vllm(prompts), settings)
        tokenizer, answers = self._llm.get_tokenizer(), []
        for prompt, output in zip(prompts, outputs, strict=True):
            new = output.sequences[0].tokens[len(prompt) :]  # its text would repeat the prompt
            end = next((place for place, token in enumerate(new) if token in self._ends), None)
            answers.append(Answer(tokenizer.decode(new[:end], skip_special_tokens=True), truncated=end is None))
        return answers


def rescued(write: Callable[[list[list[int]]], list[Answer]], prompts: list[list[int]]) -> list[Answer]:
    """What `write` makes of the prompts; of their halves, if it fails; an error for a prompt that fails alone.

    A lack of memory ends with a smaller batch, and one bad prompt does not take the others along. No failure counts as a
    wrong answer.
    """
    try:
        return write(prompts)
    except Exception as error:  # libraries raise many kinds of errors here
        reason = "out of memory" if is_out_of_memory(error) else in_words(error)
    if torch.cuda.is_available():  # outside of `except`, which holds on to the failed batch
        torch.cuda.empty_cache()
    if len(prompts) == 1:
        return [Answer(None, error=reason)]
    half = len(prompts) // 2
    return rescued(write, prompts[:half]) + rescued(write, prompts[half:])


def check_vllm() -> None:
    """Raises `S2FTError` if vLLM is not installed."""
    try:
        import vllm  # noqa: F401
    except ImportError as error:
        raise S2FTError(
            f"engine='vllm' needs vLLM, which is not installed ({error}): pip install vllm; or take engine='transformers'"
        ) from None


def in_words(error: BaseException) -> str:
    """The kind of an error and its first line."""
    kind, said = type(error).__name__, first_line(error)
    return kind if said == kind else f"{kind}: {said}"


def _as_vllm(prompts: list[list[int]]) -> list[dict[str, list[int]]]:
    return [{"prompt_token_ids": ids} for ids in prompts]


class TransformersEngine:
    """A causal language model in this process, a PEFT model too.

    Args:
        model: The model, on its device.
        tokenizer: Its tokenizer.
        batch_size: Prompts that go through the model at once.
    """

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase, batch_size: int = 8) -> None:
        self._model, self._tokenizer, self._batch_size = model, tokenizer, batch_size
        self._base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._ends = end_ids(self._base, tokenizer)
        self._longest = positions(self._base)

    def answers(
        self, prompts: Sequence[list[int]], decoding: Decoding, done: Collection[int] = ()
    ) -> Iterator[list[tuple[int, Answer]]]:
        """Batches of (index of the prompt, its answer), longest prompts first.

        A prompt that leaves no room for an answer within the model's positions gets an error; one that leaves less than
        `decoding.max_new_tokens` gets what room there is.
        """
        rooms = [self._room(len(ids), decoding) for ids in prompts]
        for batch in batches([len(ids) for ids in prompts], rooms, self._batch_size):
            if not set(batch) <= set(done):
                found = zip(
                    batch, self._batch([prompts[index] for index in batch], rooms[batch[0]], decoding), strict=True
                )
                yield [(index, answer) for index, answer in found if index not in done]

    def _room(self, length: int, decoding: Decoding) -> int:
        """How many tokens the answer to a prompt of `length` may have."""
        wanted = decoding.max_new_tokens
        return wanted if self._longest is None else max(0, min(wanted, self._longest - length))

    def _batch(self, prompts: list[list[int]], room: int, decoding: Decoding) -> list[Answer]:
        if not room:
            text = "the prompt has {} tokens; the model has room for {}, answer included"
            return [Answer(None, error=text.format(len(ids), self._longest)) for ids in prompts]
        return rescued(lambda some: self._generate(some, room, decoding.beams), prompts)

    def _generate(self, prompts: list[list[int]], room: int, beams: int) -> list[Answer]:
        pad = self._tokenizer.pad_token_id
        pad = (self._ends or [0])[0] if pad is None else pad
        tokens, mask = pad_left(prompts, pad)
        settings = GenerationConfig(
            max_new_tokens=room, num_beams=beams, do_sample=False, pad_token_id=pad, eos_token_id=self._ends or None
        )
        tokens, mask = tokens.to(self._model.device), mask.to(self._model.device)
        stretch = STRETCH if beams == 1 else room
        with _only(self._base, settings), evaluating(self._model):
            rows = written(self._model, tokens, mask, room, self._ends, stretch)
        return [self._answer(row) for row in rows]

    def _answer(self, new: list[int]) -> Answer:
        end = next((place for place, token in enumerate(new) if token in self._ends), None)
        return Answer(self._tokenizer.decode(new[:end], skip_special_tokens=True), truncated=end is None)


def batches(lengths: Sequence[int], rooms: Sequence[int], batch_size: int) -> list[list[int]]:
    """Indices in batches, longest first; all of a batch have the same room for an answer.

    Example:
        >>> batches([5, 9, 6, 1], [8, 3, 8, 8], batch_size=2)
        [[1], [2, 0], [3]]
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    found = []
    for _, group in groupby(order, key=lambda index: rooms[index]):
        alike = list(group)
        found += [alike[start : start + batch_size] for start in range(0, len(alike), batch_size)]
    return found


def pad_left(
    rows: Sequence[list[int]],  # token ids, of several lengths
    pad: int,
) -> tuple[Tensor, Tensor]:  # tokens and mask, int64, [rows, longest] each
    """A batch whose prompts end together, where the answers begin.

    Example:
        >>> pad_left([[5, 6], [7]], pad=0)
        (tensor([[5, 6],
                [0, 7]]), tensor([[1, 1],
                [0, 1]]))
    """
    longest = max(map(len, rows))
    tokens = torch.tensor([[pad] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return tokens, mask


def places_of(
    mask: Tensor,  # [rows, length], of rows that are padded on the left
) -> Tensor:  # [rows, length], int64
    """The position of each token in its row, which does not count the padding.

    Example:
        >>> places_of(torch.tensor([[0, 0, 1, 1]]))
        tensor([[0, 0, 0, 1]])
    """
    return (mask.cumsum(-1) - 1).clamp(min=0)


@contextmanager
def _only(model: Any, settings: GenerationConfig) -> Iterator[None]:
    """Generates with `settings` alone: a model's own (a repetition penalty, say) would change the protocol."""
    own, model.generation_config = model.generation_config, settings
    try:
        yield
    finally:
        model.generation_config = own


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Without dropout; afterwards the model is in the mode that it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
