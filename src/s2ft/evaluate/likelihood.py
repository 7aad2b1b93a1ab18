"""How likely a model finds a text: answers chosen without writing them, and the perplexity of plain text.

    choice        argmax over the choices c of  log p(c | question) / bytes of c      the commonsense tasks
    perplexity    exp of the mean of  -log p(token | tokens before it)

A model that writes badly, or was never taught a task's wording, shows by its likelihoods what it knows all the same. The
length of a choice is divided out as in the lm-evaluation-harness's `acc_norm` (Gao et al., 2021).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from inspect import signature
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from s2ft.common.errors import S2FTError
from s2ft.data.tokens import text_ids
from s2ft.evaluate.engines import evaluating, pad_left, places_of
from s2ft.evaluate.questions import Prompt, load_questions
from s2ft.evaluate.tasks import Task
from s2ft.evaluate.writing import has_rows

_QUESTION = re.compile(r"question:\s*(.*?)(?:\n\n|$)|sentence:\s*(.*?)(?:\n\n|$)", re.IGNORECASE | re.DOTALL)
_NUMBERED = r"(?:answer|option|ending|solution)"
_CHOICE = re.compile(
    rf"\b{_NUMBERED}(\d):\s*(.*?)(?=\s+{_NUMBERED}(?:\d:|\s+format)|\n\n|$)", re.IGNORECASE | re.DOTALL
)
_YES_NO = {"true": "yes", "false": "no"}


@dataclass(frozen=True)
class Choice:
    """A question, what may be answered, and which of it is right."""

    question: str
    answers: tuple[str, ...]
    right: int  # index into `answers`


def load_choices(task: Task, data: str, limit: int | None = None) -> list[Choice]:
    """The questions of a commonsense task, taken apart into question and choices.

    Raises:
        S2FTError: if there is no such file, or a question names no choices.
    """
    found = load_questions(task, data, limit, prompts="chat")
    return [choice(_text(one.prompt), one.gold) for one in found]


def _text(prompt: Prompt) -> str:
    return prompt if isinstance(prompt, str) else prompt[0]["content"]


def choice(instruction: str, gold: str) -> Choice:
    """The choices in an instruction of LLM-Adapters' wording; where it has none, yes and no.

    Raises:
        S2FTError: if it holds no question, or `gold` is none of its choices.

    Example:
        >>> choice("Choose the correct answer to the question: Ice is? Answer1: warm Answer2: cold", "2").answers
        ('warm', 'cold')
    """
    match = _QUESTION.search(instruction)
    if match is None:
        raise S2FTError(f"no question in {instruction[:80]!r}: expected the words of LLM-Adapters, 'question: ...'")
    question = (match[1] or match[2]).strip()
    answers = {number: text.strip() for number, text in _CHOICE.findall(instruction)} or _YES_NO
    name = gold if gold in answers else gold[-1:]
    if name not in answers:
        raise S2FTError(f"answer {gold!r} is none of {', '.join(answers)} in {instruction[:80]!r}")
    return Choice(question, tuple(answers.values()), list(answers).index(name))


def accuracy(model: Any, tokenizer: Any, choices: Sequence[Choice], batch_size: int = 16) -> float:
    """The share of questions whose right answer is the likeliest, per byte of the answer."""
    pairs = [(f"Question: {one.question}\nAnswer:", f" {text}") for one in choices for text in one.answers]
    found = iter(log_likelihoods(model, tokenizer, pairs, batch_size))
    right = 0
    for one in choices:
        scores = [next(found) / len(text.encode()) for text in one.answers]
        right += scores.index(max(scores)) == one.right
    return right / max(1, len(choices))


def log_likelihoods(
    model: Any,
    tokenizer: Any,
    pairs: Sequence[tuple[str, str]],  # what is given, and what follows it
    batch_size: int = 16,
) -> list[float]:
    """Log p(what follows | what is given) of each pair, in nats; what several pairs have in common is read once.

    Args:
        batch_size: How many different texts are given at a time.
    """
    places: dict[str, list[int]] = {}  # what is given → its pairs
    for index, (text, _) in enumerate(pairs):
        places.setdefault(text, []).append(index)
    given = {text: text_ids(tokenizer, text) or [tokenizer.eos_token_id] for text in places}
    follows = [tokenizer(text, add_special_tokens=False).input_ids for _, text in pairs]
    order = sorted(given, key=lambda text: -len(given[text]))
    found = [0.0] * len(pairs)
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        own = [places[text] for text in batch]
        sums = _sums(model, [given[text] for text in batch], [[follows[index] for index in some] for some in own])
        for index, value in zip(chain.from_iterable(own), sums, strict=True):
            found[index] = value
    return found


def _sums(
    model: Any,
    given: Sequence[list[int]],  # token ids, at least one each
    follows: Sequence[Sequence[list[int]]],  # the texts that may follow each
) -> list[float]:
    """Log p of each text that may follow, in the order of `follows`."""
    owners = [owner for owner, texts in enumerate(follows) for _ in texts]
    rows = list(chain.from_iterable(follows))
    shared = _after_shared(model, given, owners, rows)
    if shared is None:
        shared = token_log_likelihoods(model, [given[owner] for owner in owners], rows)
    return [float(row.sum()) for row in shared]


@torch.no_grad()
def _after_shared(
    model: Any,
    given: Sequence[list[int]],
    owners: Sequence[int],  # of each row, an index into `given`
    rows: Sequence[list[int]],
) -> list[Tensor] | None:  # as `token_log_likelihoods`
    """Reads what is given once, and each row after the keys and values of its owner; None where the model cannot."""
    if not _takes_positions(model):
        return None
    tokens, mask = (part.to(model.device) for part in pad_left(given, 0))
    with evaluating(model):
        read = model(
            input_ids=tokens, attention_mask=mask, position_ids=places_of(mask), use_cache=True, logits_to_keep=1
        )
        cache = getattr(read, "past_key_values", None)
        if not has_rows(cache):
            return None
        owner = torch.tensor(owners, device=model.device)
        cache.batch_select_indices(owner)
        texts = pad_sequence([torch.tensor(row, dtype=torch.int64) for row in rows], batch_first=True).to(model.device)
        logits = [read.logits[owner, -1:]]
        if texts.shape[1] > 1:
            before = mask[owner]
            said = texts[:, :-1]
            output = model(
                input_ids=said,
                attention_mask=torch.cat([before, torch.ones_like(said)], 1),
                position_ids=before.sum(1, keepdim=True) + torch.arange(said.shape[1], device=model.device),
                past_key_values=cache,
            )
            logits.append(output.logits)
    scores = torch.cat(logits, 1).float().log_softmax(-1).gather(-1, texts[..., None])[..., 0]
    return [row[: len(text)].cpu() for row, text in zip(scores, rows, strict=True)]


def _takes_positions(model: Any) -> bool:
    """Whether rows of different lengths can be read after keys and values that are padded on the left."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "position_ids" in signature(base.forward).parameters


def perplexity(model: Any, tokenizer: Any, text: str, window: int = 512, limit: int = 8192) -> float:
    """Of the first `limit` tokens of a text, read in windows that do not overlap.

    Raises:
        S2FTError: if the text has less than two tokens.
    """
    ids = tokenizer(text, add_special_tokens=False).input_ids[:limit]
    if len(ids) < 2:
        raise S2FTError(f"a text of {len(ids)} tokens has no perplexity; give it two at least")
    windows = [ids[start : start + window] for start in range(0, len(ids) - 1, window)]
    rows = [
        token_log_likelihoods(model, [part[:1]], [part[1:]])[0] for part in windows if len(part) > 1
    ]  # one at a time: the logits of a window are its length times the vocabulary
    values = torch.cat(rows)
    return math.exp(-float(values.mean()))


@torch.no_grad()
def token_log_likelihoods(
    model: Any,
    given: Sequence[list[int]],  # token ids, at least one each
    follows: Sequence[list[int]],
) -> list[Tensor]:  # of each row [len(follows)], float32
    """Log p of each token that follows.

    Rows are padded on the right, where a causal model does not see it: every token keeps the position that it has alone.
    """
    rows = [torch.tensor([*before, *after]) for before, after in zip(given, follows, strict=True)]
    tokens = pad_sequence(rows, batch_first=True).to(model.device)  # [rows, longest]
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True).to(model.device)
    first = min(map(len, given)) - 1  # the head is asked from here on
    with evaluating(model):
        logits = model(input_ids=tokens, attention_mask=mask, logits_to_keep=tokens.shape[1] - first).logits
    scores = logits[:, :-1].float().log_softmax(-1).gather(-1, tokens[:, first + 1 :, None])[..., 0]
    starts = [len(before) - 1 - first for before in given]
    return [row[start : start + len(after)].cpu() for row, start, after in zip(scores, starts, follows, strict=True)]
