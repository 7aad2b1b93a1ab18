"""Examples → token ids, with labels on the response only.

    prompt  p p p p p │ completion  c c c c  end        the token ids of prompt + completion, in one go
    labels  . . . . . │             c c c c  end        "." is -100: no loss

The same rule as TRL's SFTTrainer (a test compares the two, token by token). It is applied here because the calibration
data is needed before there is an adapter, hence before there is a trainer. Two things differ: special tokens that the text
already has are not added again, and examples of which a chat template would leave something out are refused.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from datasets import Dataset, Features, List, Value
from transformers import PreTrainedTokenizerBase
from trl.data_utils import common_prefix_length

from s2ft.common.errors import S2FTError, raise_by_place
from s2ft.data.cache import cache_options
from s2ft.data.chat import CALLS, REASONING, Example, Message
from s2ft.data.examples import conversation, is_chat
from s2ft.data.mapped import values
from s2ft.data.template import RefusedTemplateError, left_out, render, turn_end, watched

_LOST = (
    "the model's chat template leaves out {}, so it would be lost; leave it out yourself, or take a model whose "
    "template knows it"
)

IGNORED = -100  # the label of tokens that the loss leaves out
SOURCE = "s2ft source"  # a column of examples that are to be weighed: the number of their source
FATE, PROBLEMS, PARTED = "s2ft fate", "s2ft problems", "s2ft parted"  # columns until `usable`, beside the data's own
_COLUMNS = {  # of `encode`; lists that are empty in the first rows would say nothing of their type
    "input_ids": List(Value("int64")),
    "labels": List(Value("int64")),
    FATE: Value("string"),
    PROBLEMS: List(Value("string")),
    PARTED: Value("bool"),
}


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
    return usable(encode(examples, tokenizer, max_length, in_parts=True), max_length)


def usable(rows: Dataset, max_length: int) -> Tokens:
    """What is left of rows with their fates, as from `encode`.

    Raises:
        S2FTError: if nothing is.
    """
    fates = list(map(sys.intern, values(rows, FATE)))
    count = Counter(fates)
    kept = rows.select([row for row, fate in enumerate(fates) if fate in ("whole", "shortened", "endless")])
    parted = sum(values(kept, PARTED))
    kept = kept.select_columns([name for name in kept.column_names if name not in (FATE, PROBLEMS, PARTED)])
    if not len(kept):
        same = f", {count['alike']} have the same answer twice" if count["alike"] else ""
        raise S2FTError(
            f"none of the {len(rows)} examples is left: {count['empty']} have no response{same}, and in "
            f"{count['too long']} it begins after max_length={max_length} tokens; raise max_length"
        )
    told = {name: count[name.replace("_", " ")] for name in ("empty", "too_long", "shortened", "endless", "alike")}
    return Tokens(kept, max_length, parted=parted, **told)


def encode(examples: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, in_parts: bool = False) -> Dataset:
    """The token ids of all examples, cut to `max_length`, as columns `input_ids` and `labels`; and the `FATE` of each.

    Args:
        examples: From `load`.
        tokenizer: The model's.
        max_length: Of a row.
        in_parts: What is longer of a text without a prompt becomes further rows; else it is lost.

    Raises:
        S2FTError: as `tokenize`, but for examples that are left out.
    """
    check_tokenizer(tokenizer, is_chat(examples))
    sources = examples[SOURCE][:] if SOURCE in examples.column_names else None
    columns = _COLUMNS if sources is None else {**_COLUMNS, SOURCE: examples.features[SOURCE]}
    rows = examples.map(
        partial(_encode_batch, cut=_Cut(max_length, in_parts, frozenset(end_tokens(tokenizer))), tokenizer=tokenizer),
        batched=True,
        remove_columns=[name for name in examples.column_names if name != SOURCE],
        features=Features(columns),
        desc="Tokenizing",
        **cache_options(
            examples, tokenizer, max_length=max_length, in_parts=in_parts, sources=sources, names=[*columns]
        ),
    )
    if is_chat(examples):
        _check_laid_out(examples, rows)
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


def without(tokens: Tokens, taken: Dataset) -> Tokens:
    """The tokens without those rows that equal one of `taken`.

    Raises:
        S2FTError: if no example is left.
    """
    gone = {repr(row) for row in taken}
    rows = [number for number, row in enumerate(tokens.dataset) if repr(row) not in gone]
    if not rows:
        raise S2FTError(f"all {len(tokens.dataset)} examples are copies of {len(taken)}, which are held out")
    return replace(tokens, dataset=tokens.dataset.select(rows))


def weigh(tokens: Tokens, weights: Sequence[float], seed: int) -> Tokens:
    """Takes the examples of each source as often as its weight says: 2.5 takes all twice, and a random half once more.

    Args:
        tokens: With a column `SOURCE`, which is gone afterwards. Held-out examples have been taken out before, so that none of
            them stays in another copy.
        weights: One for each source.
        seed: Of what is drawn.

    Raises:
        S2FTError: if no example is left.
    """
    sources, generator = np.array(tokens.dataset[SOURCE]), np.random.default_rng(seed)
    rows: list[int] = []
    for source, weight in enumerate(weights):
        own = np.flatnonzero(sources == source)
        rows += own.tolist() * int(weight)
        rows += generator.choice(own, round((weight % 1) * len(own)), replace=False).tolist()
    if not rows:
        raise S2FTError(f"data_weights={list(weights)} leave no example; raise them")
    return replace(tokens, dataset=tokens.dataset.select(sorted(rows)).remove_columns(SOURCE))


def end_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end an answer: the tokenizer's, and the chat template's end of a turn."""
    return list(dict.fromkeys(token for token in (tokenizer.eos_token_id, turn_end(tokenizer)) if token is not None))


@dataclass(frozen=True)
class _Cut:
    """How the tokens of an example become rows."""

    max_length: int
    in_parts: bool
    ends: frozenset[int]

    def rows(self, example: Example, prompt: list[int], whole: list[int]) -> Iterator[Example]:
        """The rows of one example, with their fate (whole, shortened, ...)."""
        row = _labelled(prompt, whole)
        size = self.max_length
        many = self.in_parts and example["prompt"] == "" and len(whole) > size and _has_response(example)
        for start in range(0, len(whole) if many else 1, size):
            cut = {name: ids[start : start + size] for name, ids in row.items()}
            yield {**cut, FATE: "whole" if many else self._fate(example, row, cut)}

    def _fate(self, example: Example, row: dict[str, list[int]], cut: dict[str, list[int]]) -> str:
        if not _has_response(example):
            return "empty"
        if all(label == IGNORED for label in cut["labels"]):
            return "too long"
        if len(row["input_ids"]) > self.max_length:
            return "shortened"
        return "whole" if self.ends & set(row["labels"]) else "endless"


def _encode_batch(batch: dict[str, list[Any]], cut: _Cut, tokenizer: PreTrainedTokenizerBase) -> dict[str, list[Any]]:
    """The rows of a batch of examples; its texts are tokenised together, which a fast tokenizer does in parallel."""
    examples = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
    rows = []
    for example, (prompt, whole, problems) in zip(examples, _encode(examples, tokenizer), strict=True):
        parted = not isinstance(example["prompt"], str) and whole[: len(prompt)] != prompt
        more = {PROBLEMS: problems, PARTED: parted, **({SOURCE: example[SOURCE]} if SOURCE in example else {})}
        rows += [{**row, **more} for row in cut.rows(example, prompt, whole)]
    return {name: [row[name] for row in rows] for name in rows[0]}


def _check_laid_out(examples: Dataset, rows: Dataset) -> None:
    """Raises `S2FTError` for examples that cannot be used; a problem that turns of one conversation share is told once."""
    places = values(examples, "place") if "place" in examples.column_names else range(1, len(examples) + 1)
    told = zip(places, values(rows, PROBLEMS), strict=True)
    raise_by_place(dict.fromkeys((str(place), problem) for place, found in told for problem in found))


def token_example(example: Example, tokenizer: PreTrainedTokenizerBase) -> dict[str, list[int]]:
    """`input_ids` and `labels` of one example, uncut.

    The response begins where the tokens of the prompt and those of the whole part ways: a tokenizer may merge the prompt's last
    character with the response's first.

    Raises:
        RefusedTemplateError: if the model's chat template refuses the example.
    """
    ((prompt, whole, problems),) = _encode([example], tokenizer, is_checked=False)
    if problems:
        raise RefusedTemplateError(problems[0])
    return _labelled(prompt, whole)


def _encode(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, is_checked: bool = True
) -> Iterator[tuple[list[int], list[int], list[str]]]:
    """The tokens of each prompt, those of the whole, and why it cannot be used, if so.

    Args:
        examples: All text, or all chat.
        tokenizer: The model's.
        is_checked: Whether to look for what a chat template leaves out.
    """
    if not isinstance(examples[0]["prompt"], str):
        laid_out = watched(lambda: [_laid_out(example, tokenizer, is_checked) for example in examples])
        ids = _plain_ids(tokenizer, [text for prompt, whole, _ in laid_out for text in (prompt, whole)])
        yield from zip(ids[::2], ids[1::2], (problems for _, _, problems in laid_out), strict=True)
        return
    end = tokenizer.eos_token
    texts = [(one["prompt"], one["prompt"] + one["completion"].removesuffix(end)) for one in examples]
    ids = texts_ids(tokenizer, [text for both in texts for text in both])
    yield from (
        (prompt, [*whole, tokenizer.eos_token_id], []) for prompt, whole in zip(ids[::2], ids[1::2], strict=True)
    )


def _laid_out(example: Example, tokenizer: PreTrainedTokenizerBase, is_checked: bool) -> tuple[str, str, list[str]]:
    """The prompt of a chat, the whole, and why it cannot be used: the template refuses it, or would leave something out."""
    told, said, options = conversation(example)
    try:
        prompt, whole = render(tokenizer, told, options, ask=True), render(tokenizer, [*told, *said], options)
        lost = left_out(tokenizer, [*told, *said], options, len(told), whole) if is_checked else ()
        return prompt, whole, [_LOST.format(name) for name in lost]
    except RefusedTemplateError as error:
        return "", "", [str(error)]


def _labelled(prompt: list[int], whole: list[int]) -> dict[str, list[int]]:
    start = common_prefix_length(prompt, whole)
    return {"input_ids": whole, "labels": [IGNORED] * start + whole[start:]}


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The token ids of one text, as `texts_ids` gives them."""
    return texts_ids(tokenizer, [text])[0]


def texts_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """The token ids of texts that go on: with what the tokenizer puts before every text, without what it puts after it.

    A text that has the beginning already, as "<s>[INST] ...", does not get it twice.
    """
    begin = _begin(tokenizer)
    without_bos = begin[:-1] if begin[-1:] == [tokenizer.bos_token_id] else begin

    def has_bos(ids: list[int]) -> bool:
        return bool(begin) and ids[:1] == begin[-1:] == [tokenizer.bos_token_id]

    return [(without_bos if has_bos(ids) else begin) + ids for ids in _plain_ids(tokenizer, texts)]


def _plain_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]
    return ids


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
