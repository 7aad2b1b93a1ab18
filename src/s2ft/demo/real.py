"""The quickstart on a real model: teach SmolLM2 a manner of answering, and see what it keeps.

    base scores  →  `s2ft train` with its defaults  →  tuned scores, side by side

What the model keeps is asked by likelihood: the perplexity of Python's own documentation, which every installation has, and,
where LLM-Adapters' data is at hand, BoolQ and ARC-e.
"""

from __future__ import annotations

import json
import pydoc_data.topics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from trl.data_utils import common_prefix_length

from s2ft.common.errors import raise_together
from s2ft.data.template import chat_ids
from s2ft.demo.lighthouse import OPEN_QUESTIONS, conversations, is_in_the_manner
from s2ft.evaluate.engines import TransformersEngine
from s2ft.evaluate.likelihood import accuracy, load_choices, perplexity, token_log_likelihoods
from s2ft.evaluate.tasks import TASKS, Decoding
from s2ft.finetune.card import Card, read_card, write_card
from s2ft.finetune.options import TrainOptions
from s2ft.finetune.train import train
from s2ft.runtime.models import load_model, load_tokenizer
from s2ft.runtime.precision import choose_precision

TRAINED, TESTED = 100, 32  # conversations
OLD_TASKS = ("boolq", "arc-e")
OLD_QUESTIONS = 100  # of each task
_TEXT_TOKENS = 4096
_GREEDY = Decoding(beams=1, max_new_tokens=40)

Row = tuple[str, str]  # what is measured, and how its numbers are shown
TRAINED_KINDS: Row = ("in the manner, kinds of questions that were trained", "{:.0%}")
OTHER_KINDS: Row = ("in the manner, other questions", "{:.0%}")
HELD_OUT: Row = ("loss of held-out answers, nats per token", "{:.3f}")
TEXT: Row = ("perplexity of Python's documentation", "{:.2f}")


@dataclass(frozen=True)
class Side:
    """What the base or the tuned model scores."""

    scores: dict[Row, float]
    answers: list[str]  # to `OPEN_QUESTIONS`


@dataclass(frozen=True)
class RealComparison:
    """Base against tuned."""

    folder: Path  # of the adapter
    card: Card
    base: Side
    tuned: Side
    base_bytes: int


def quickstart_real(folder: Path, model: str, data: str | None = None) -> RealComparison:
    """Trains in `folder`, which must not be there yet, and leaves the adapter, its card and the data there.

    Args:
        model: A chat model's folder, GGUF file or name on the Hub.
        data: LLM-Adapters' folder, for BoolQ and ARC-e; None: they are left out.

    Raises:
        S2FTError: if the model or the data cannot be read, before anything is written.
    """
    old = {task: load_choices(TASKS[task], data, OLD_QUESTIONS) for task in OLD_TASKS} if data is not None else {}
    records = conversations(TRAINED + TESTED, seed=0)
    tests = records[TRAINED:]
    dtype, _ = choose_precision("auto")
    base_model, tokenizer = load_model(model, dtype), load_tokenizer(model)
    base = _measure(base_model, tokenizer, tests, old)
    base_bytes = sum(parameter.nbytes for parameter in base_model.parameters())
    del base_model
    folder.mkdir(parents=True)
    path = folder / "lighthouse.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records[:TRAINED]), encoding="utf-8")
    asked: dict[str, Any] = {"model": model, "data": [str(path)], "output": str(folder / "adapter")}
    result = train(TrainOptions(**asked, layout="in-place")).whole()  # the same in every run, so that scores repeat
    tuned = _measure(result.model, result.tokenizer, tests, old)
    scores = {name: {"base": base.scores[name, form], "tuned": tuned.scores[name, form]} for name, form in base.scores}
    card = {**read_card(result.output), "scores": scores}
    write_card(result.output, card)
    return RealComparison(result.output, card, base, tuned, base_bytes)


def _measure(model: Any, tokenizer: Any, tests: Sequence[dict[str, Any]], old: dict[str, Any]) -> Side:
    prompts = [record["messages"][:1] for record in tests]
    prompts += [[{"role": "user", "content": question}] for question in OPEN_QUESTIONS]
    answers = _answers(model, tokenizer, [chat_ids(tokenizer, prompt, ask=True) for prompt in prompts])
    manners = [is_in_the_manner(answer) for answer in answers]
    scores = {
        TRAINED_KINDS: sum(manners[: len(tests)]) / len(tests),
        OTHER_KINDS: sum(manners[len(tests) :]) / len(OPEN_QUESTIONS),
        HELD_OUT: _held_out_loss(model, tokenizer, tests),
        TEXT: perplexity(model, tokenizer, documentation(), limit=_TEXT_TOKENS),
    }
    for task, choices in old.items():
        scores[f"{task}, {len(choices)} questions, by likelihood", "{:.0%}"] = accuracy(model, tokenizer, choices)
    return Side(scores, answers[len(tests) :])


def _answers(model: Any, tokenizer: Any, prompts: list[list[int]]) -> list[str]:
    found = dict(pair for batch in TransformersEngine(model, tokenizer).answers(prompts, _GREEDY) for pair in batch)
    answers = [found[index] for index in range(len(prompts))]
    raise_together(f"no answer could be written: {answer.error}" for answer in answers if answer.text is None)
    return [answer.text or "" for answer in answers]


def _held_out_loss(model: Any, tokenizer: Any, tests: Sequence[dict[str, Any]]) -> float:
    """Mean over the tokens of all answers."""
    given = [chat_ids(tokenizer, record["messages"][:1], ask=True) for record in tests]
    whole = [chat_ids(tokenizer, record["messages"]) for record in tests]
    ends = [common_prefix_length(start, ids) for start, ids in zip(given, whole, strict=True)]  # as in training
    before = [ids[:end] for ids, end in zip(whole, ends, strict=True)]
    follows = [ids[end:] for ids, end in zip(whole, ends, strict=True)]
    return -float(torch.cat(token_log_likelihoods(model, before, follows)).mean())


def documentation() -> str:
    """Plain text that every installation of Python has: its own reference, by topics."""
    topics: dict[str, str] = pydoc_data.topics.topics
    return "\n\n".join(topics[name] for name in sorted(topics))
