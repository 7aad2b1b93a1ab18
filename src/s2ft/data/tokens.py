"""Examples → token ids, with labels on the response only.

    prompt  p p p p p │ completion  c c c c  end        the token ids of prompt + completion, in one go
    labels  . . . . . │             c c c c  end        "." is -100: no loss

The same rule as TRL's SFTTrainer (a test compares the two, token by token). It is applied here because the calibration
data is needed before there is an adapter, hence before there is a trainer. Two things differ: special tokens that the text
already has are not added again, and examples of which a chat template would leave something out are refused.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from s2ft.common.errors import S2FTError, raise_by_place
from s2ft.data.chat import CALLS, REASONING, Message
from s2ft.data.examples import conversation, is_chat
from s2ft.data.template import RefusedTemplateError, chat_ids, left_out, turn_end

IGNORED = -100  # the label of tokens that the loss leaves out


@dataclass(frozen=True)
class Tokens:
    """Tokenised examples, and how many were left out."""

    dataset: Dataset  # columns input_ids, labels, and what other objectives read
    max_length: int
    empty: int  # had no response
    too_long: int  # had no token of the response within max_length
    shortened: int  # were cut to max_length, with some of the response left
    endless: int = 0  # are whole, but their response has no token that ends an answer
    parted: int = 0  # are chats whose prompt is rendered differently once the answer follows
    alike: int = 0  # had two answers to compare that are the same


def tokenize(examples: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Tokens:
    """Tokenises the examples and cuts them to `max_length`; drops those without a response to learn.

    Raises:
        S2FTError: if the tokenizer cannot end a text or lay out a chat, or no example is left.
    """
    return usable(encode(examples, tokenizer, max_length), max_length)


def usable(rows: Dataset, max_length: int) -> Tokens:
    """What is left of rows with their fates, as from `encode`.

    Raises:
        S2FTError: if nothing is.
    """
    fates = rows["fate"][:]
    count = Counter(fates)
    kept = rows.select([row for row, fate in enumerate(fates) if fate in ("whole", "shortened", "endless")])
    parted = sum(kept["parted"][:])
    kept = kept.select_columns([name for name in kept.column_names if name not in ("fate", "problems", "parted")])
    if not len(kept):
        same = f", {count['alike']} have the same answer twice" if count["alike"] else ""
        raise S2FTError(
            f"none of the {len(rows)} examples is left: {count['empty']} have no response{same}, and in "
            f"{count['too long']} it begins after max_length={max_length} tokens; raise max_length"
        )
    told = {name: count[name.replace("_", " ")] for name in ("empty", "too_long", "shortened", "endless", "alike")}
    return Tokens(kept, max_length, parted=parted, **told)


def encode(examples: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
    """The token ids of all examples, cut to `max_length`, as columns `input_ids` and `labels`; and the `fate` of each.

    Raises:
        S2FTError: as `tokenize`, but for examples that are left out.
    """
    check_tokenizer(tokenizer, is_chat(examples))
    ends = end_tokens(tokenizer)
    rows = examples.map(
        lambda example: _cut(example, tokenizer, max_length, ends),
        remove_columns=examples.column_names,
        keep_in_memory=True,
        desc="Tokenizing",
    )
    _check_laid_out(examples, rows["problems"][:])
    return rows


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


def end_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end an answer: the tokenizer's, and the chat template's end of a turn."""
    return list(dict.fromkeys(token for token in (tokenizer.eos_token_id, turn_end(tokenizer)) if token is not None))


def _cut(
    example: dict[str, Any], tokenizer: PreTrainedTokenizerBase, max_length: int, ends: list[int]
) -> dict[str, Any]:
    """The tokens of an example up to `max_length`, its fate (whole, shortened, ...), and why it cannot be used, if so."""
    prompt: list[int] = []
    whole: list[int] = []
    try:
        prompt, whole = _encode(example, tokenizer)
        problems = _lost(example, tokenizer)
    except RefusedTemplateError as error:
        problems = [str(error)]
    row = _labelled(prompt, whole)
    parted = not isinstance(example["prompt"], str) and whole[: len(prompt)] != prompt
    cut = {name: ids[:max_length] for name, ids in row.items()}
    if not _has_response(example):
        fate = "empty"
    elif all(label == IGNORED for label in cut["labels"]):
        fate = "too long"
    elif len(row["input_ids"]) > max_length:
        fate = "shortened"
    else:
        fate = "whole" if set(ends) & set(row["labels"]) else "endless"
    return {**cut, "fate": fate, "problems": problems, "parted": parted}


def _lost(example: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What the chat template would leave out of an example."""
    if isinstance(example["prompt"], str):
        return []
    prompt, completion, options = conversation(example)
    return [
        f"the model's chat template leaves out {name}, so it would be lost; leave it out yourself, or take a model whose "
        "template knows it"
        for name in left_out(tokenizer, [*prompt, *completion], options, len(prompt))
    ]


def _check_laid_out(examples: Dataset, problems: list[list[str]]) -> None:
    """Raises `S2FTError` for examples that cannot be used; a problem that turns of one conversation share is told once."""
    places = examples["place"][:] if "place" in examples.column_names else range(1, len(examples) + 1)
    raise_by_place(
        dict.fromkeys((str(place), problem) for place, found in zip(places, problems, strict=True) for problem in found)
    )


def token_example(example: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, list[int]]:
    """`input_ids` and `labels` of one example, uncut.

    The response begins where the tokens of the prompt and those of the whole part ways: a tokenizer may merge the prompt's last
    character with the response's first.
    """
    return _labelled(*_encode(example, tokenizer))


def _encode(example: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The tokens of the prompt, and those of the whole."""
    if isinstance(example["prompt"], str):
        prompt = text_ids(tokenizer, example["prompt"])
        whole = text_ids(tokenizer, example["prompt"] + example["completion"].removesuffix(tokenizer.eos_token))
        whole.append(tokenizer.eos_token_id)
    else:
        told, said, options = conversation(example)
        prompt = chat_ids(tokenizer, told, options, ask=True)
        whole = chat_ids(tokenizer, [*told, *said], options)
    return prompt, whole


def _labelled(prompt: list[int], whole: list[int]) -> dict[str, list[int]]:
    start = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(prompt, whole, strict=False)))
    return {"input_ids": whole, "labels": [IGNORED] * start + whole[start:]}


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The token ids of a text that goes on: with what the tokenizer puts before every text, without what it puts after it.

    A text that has the beginning already, as "<s>[INST] ...", does not get it twice.
    """
    plain: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    begin = _begin(tokenizer)
    if begin and plain[:1] == begin[-1:] == [tokenizer.bos_token_id]:
        begin.pop()
    return begin + plain


def _begin(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts before every text."""
    marked, plain = (list(tokenizer("a", add_special_tokens=add)["input_ids"]) for add in (True, False))
    starts = (start for start in range(len(marked)) if marked[start : start + len(plain)] == plain)
    return marked[: next(starts, int(marked[:1] == [tokenizer.bos_token_id]))]


def _has_response(example: dict[str, Any]) -> bool:
    if isinstance(example["completion"], str):
        return bool(example["completion"].strip())
    _, completion, _ = conversation(example)
    return any(map(_says_something, completion))


def _says_something(message: Message) -> bool:
    return bool(message["content"].strip()) or any(message.get(name) for name in (CALLS, *REASONING))


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, chat: bool) -> None:
    """Raises `S2FTError` if it cannot end a text, or lay out a chat where that is wanted."""
    if tokenizer.eos_token is None:
        raise S2FTError(
            "the model's tokenizer has no end-of-text token (eos_token), so responses could not end; set one"
        )
    if chat and not tokenizer.chat_template:
        raise S2FTError(
            "the data holds chat messages, but the model's tokenizer has no chat template; take an instruction-tuned model, "
            "or data with instruction and output, or prompt and completion as text"
        )
