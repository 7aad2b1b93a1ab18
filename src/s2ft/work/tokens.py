"""Examples → token ids, with labels on the response only.

    prompt  p p p p p │ completion  c c c c  end        the token ids of prompt + completion, in one go
    labels  . . . . . │             c c c c  end        "." is -100: no loss

The same rule as TRL's SFTTrainer (a test compares the two, token by token). It is applied here because the calibration
data must be tokens before there is an adapter, hence before there is a trainer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from s2ft.errors import S2FTError
from s2ft.work.data import is_chat

IGNORED = -100  # the label that no loss falls on


@dataclass(frozen=True)
class Tokens:
    """Tokenised examples, and how many were left out."""

    dataset: Dataset  # columns input_ids, labels
    max_length: int
    empty: int  # had no response
    too_long: int  # had no token of the response within max_length
    shortened: int  # were cut to max_length, with some of the response left


def tokenize(examples: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Tokens:
    """Tokenises the examples and cuts them to `max_length`; drops those without a response to learn.

    Raises:
        S2FTError: if the tokenizer cannot end a text or lay out a chat, or no example is left.
    """
    _check_tokenizer(tokenizer, is_chat(examples))
    rows = examples.map(
        lambda example: _cut(example, tokenizer, max_length),
        remove_columns=examples.column_names,
        keep_in_memory=True,
        desc="Tokenizing",
    )
    fates = rows["fate"][:]
    count = Counter(fates)
    kept = rows.select([row for row, fate in enumerate(fates) if fate in ("whole", "shortened")]).remove_columns("fate")
    if not len(kept):
        raise S2FTError(
            f"none of the {len(rows)} examples is left: {count['empty']} have no response, and in {count['too long']} "
            f"it begins after max_length={max_length} tokens; raise max_length"
        )
    return Tokens(kept, max_length, count["empty"], count["too long"], count["shortened"])


def hold_out(tokens: Tokens, count: int | None, seed: int) -> tuple[Tokens, Dataset | None]:
    """Takes `count` examples out of the others: always the same for the same tokens and seed; None takes none.

    Raises:
        S2FTError: if no example would be left to train on.
    """
    if count is None:
        return tokens, None
    usable = len(tokens.dataset)
    if count >= usable:
        raise S2FTError(f"holdout={count} leaves nothing to train on: {usable} examples are usable; hold out fewer")
    parts = tokens.dataset.train_test_split(test_size=count, seed=seed, keep_in_memory=True)
    return replace(tokens, dataset=parts["train"]), parts["test"]


def _cut(example: dict[str, Any], tokenizer: PreTrainedTokenizerBase, max_length: int) -> dict[str, Any]:
    """The tokens of an example up to `max_length`, and what became of it."""
    row = token_example(example, tokenizer)
    cut = {name: ids[:max_length] for name, ids in row.items()}
    if not _has_response(example):
        fate = "empty"
    elif all(label == IGNORED for label in cut["labels"]):
        fate = "too long"
    else:
        fate = "whole" if len(row["input_ids"]) <= max_length else "shortened"
    return {**cut, "fate": fate}


def token_example(example: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, list[int]]:
    """`input_ids` and `labels` of one example, uncut.

    The response begins where the tokens of the prompt and those of the whole part ways: a tokenizer may merge the prompt's last
    character with the response's first.
    """
    if isinstance(example["prompt"], str):
        prompt = tokenizer(example["prompt"])["input_ids"]
        end = "" if example["completion"].endswith(tokenizer.eos_token) else tokenizer.eos_token
        whole = tokenizer(example["prompt"] + example["completion"] + end)["input_ids"]
    else:
        prompt = _chat_ids(tokenizer, example["prompt"], add_generation_prompt=True)
        whole = _chat_ids(tokenizer, example["prompt"] + example["completion"])
    start = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(prompt, whole, strict=False)))
    return {"input_ids": whole, "labels": [IGNORED] * start + whole[start:]}


def _chat_ids(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]], **options: Any) -> list[int]:
    try:
        encoded = tokenizer.apply_chat_template(list(messages), tokenize=True, return_dict=True, **options)
    except Exception as error:  # a template is a program: it raises what it likes, such as "roles must alternate"
        roles = ", ".join(message["role"] for message in messages)
        raise S2FTError(f"the model's chat template refuses a conversation of {roles}: {error}") from error
    ids: list[int] = encoded["input_ids"]
    return ids


def _has_response(example: dict[str, Any]) -> bool:
    completion = example["completion"]
    texts = [completion] if isinstance(completion, str) else [message["content"] for message in completion]
    return any(text.strip() for text in texts)


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase, chat: bool) -> None:
    if tokenizer.eos_token is None:
        raise S2FTError(
            "the model's tokenizer has no end-of-text token (eos_token), so responses could not end; set one"
        )
    if chat and not tokenizer.chat_template:
        raise S2FTError(
            "the data holds chat messages, but the model's tokenizer has no chat template; take an instruction-tuned model, "
            "or data with instruction and output, or prompt and completion as text"
        )
