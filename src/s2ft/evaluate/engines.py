"""What writes the answers: token ids of prompts → texts. Two engines, one interface; prompts and scoring are the same.

transformers    batches of like length in this process (`generation.py`)
vllm            vLLM, where it is installed; an adapter is merged into a copy of its base first
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import PreTrainedTokenizerBase

from s2ft.common.errors import S2FTError, first_line
from s2ft.data.template import chat_ids
from s2ft.data.tokens import end_tokens, text_ids
from s2ft.evaluate.questions import Prompt
from s2ft.evaluate.tasks import Decoding
from s2ft.runtime.failures import is_out_of_memory

_CHUNK = 256  # prompts that vLLM gets at once: after each chunk the answers are kept


@dataclass(frozen=True)
class Answer:
    """What came of a prompt: a text, or an error that says why there is none."""

    text: str | None
    truncated: bool = False  # it had not ended when it reached the limit
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
    named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
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
    except Exception as error:  # the libraries raise whatever they like
        reason = "out of memory" if is_out_of_memory(error) else in_words(error)
    if torch.cuda.is_available():  # outside of `except`: only here the failed batch is let go
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
