"""Tokens of compared and judged answers and of prompts (`preferences.py`), by the rule of `tokens.py`.

    pair      p p p p c c c        chosen       prompt_ids: what both begin with; chosen_ids, rejected_ids: the rest
              p p p p r r          rejected
    judged    p p p p c c c        prompt_ids, completion_ids, label
    prompt    text or messages, as they are: the trainer lays them out itself, each time that it samples answers

`input_ids` and `labels` stand beside them: of an example that could be learned, a pair's better answer. Strategies that choose
channels on data read these.
"""

from __future__ import annotations

import json
from typing import Any

from datasets import Dataset
from pyarrow import ArrowException
from transformers import PreTrainedTokenizerBase

from s2ft.common.errors import S2FTError, first_line
from s2ft.data.examples import conversation, is_chat
from s2ft.data.mapped import mapped
from s2ft.data.template import chat_ids
from s2ft.data.tokens import FATE, IGNORED, PARTED, SOURCE, Tokens, check_tokenizer, encode, text_ids, usable

Row = dict[str, Any]

_WORST_FIRST = ("empty", "too long", "alike", "shortened", "endless", "whole")  # fates; a pair has the worse one


def tokenize_pairs(examples: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Tokens:
    """Tokens of pairs, two examples each; a pair is left out where one of its answers is, or where both are the same.

    Raises:
        S2FTError: as `tokenize`.
    """
    return usable(_paired(encode(examples, tokenizer, max_length)), max_length)


def tokenize_whole_pairs(examples: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Tokens:
    """As `tokenize_pairs`, without the pairs that have to be cut: a reward is read at the end of an answer.

    Raises:
        S2FTError: as `tokenize`.
    """
    rows = _paired(encode(examples, tokenizer, max_length))
    fates = ["too long" if fate == "shortened" else fate for fate in rows[FATE]]
    return usable(rows.remove_columns(FATE).add_column(FATE, fates), max_length)


def tokenize_judged(examples: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Tokens:
    """Tokens of judged answers.

    Raises:
        S2FTError: as `tokenize`.
    """
    rows = encode(examples, tokenizer, max_length)
    judged = zip(rows, examples["label"], strict=True)
    return usable(mapped({**row, **_answered(row), "label": label} for row, label in judged), max_length)


def tokenize_prompts(examples: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Tokens:
    """Prompts of at most `max_length` tokens, each with its record's other fields as columns: None where it lacks one.

    Raises:
        S2FTError: if a field does not fit into a column, or no prompt is left.
    """
    check_tokenizer(tokenizer, is_chat(examples))
    fates = ["whole" if _length(example, tokenizer) <= max_length else "too long" for example in examples]
    fields = [json.loads(example["fields"]) for example in examples]
    names = dict.fromkeys(name for more in fields for name in more)  # a table takes the first row's alone
    try:
        rows = Dataset.from_list(
            [
                {**{name: more.get(name) for name in names}, **_asked(example), FATE: fate, PARTED: False}
                for more, fate, example in zip(fields, fates, examples, strict=True)
            ]
        )
    except (ArrowException, TypeError, ValueError) as error:
        raise S2FTError(
            f"the fields beside the prompts do not make columns, each of one type, for rewards: {first_line(error)}"
        ) from error
    return usable(rows, max_length)


def _asked(example: Row) -> Row:
    """A prompt, text or messages, and the number of its source."""
    prompt = example["prompt"] if isinstance(example["prompt"], str) else conversation(example)[0]
    return {"prompt": prompt, **_source(example)}


def _paired(rows: Dataset) -> Dataset:
    """One row for each two."""
    each = iter(rows)
    return mapped(_pair(chosen, rejected) for chosen, rejected in zip(each, each, strict=True))


def _pair(chosen: Row, rejected: Row) -> Row:
    """One row of two."""
    length = min(_prompt_length(chosen), _prompt_length(rejected))
    same = chosen["input_ids"] == rejected["input_ids"]
    return {
        "input_ids": chosen["input_ids"],
        "labels": chosen["labels"],
        "prompt_ids": chosen["input_ids"][:length],
        "chosen_ids": chosen["input_ids"][length:],
        "rejected_ids": rejected["input_ids"][length:],
        FATE: min(chosen[FATE], rejected[FATE], "alike" if same else "whole", key=_WORST_FIRST.index),
        PARTED: chosen[PARTED] or rejected[PARTED],
        **_source(chosen),
    }


def _source(row: Row) -> Row:
    """The number of its source, where that is asked for."""
    return {SOURCE: row[SOURCE]} if SOURCE in row else {}


def _answered(row: Row) -> Row:
    length = _prompt_length(row)
    return {"prompt_ids": row["input_ids"][:length], "completion_ids": row["input_ids"][length:]}


def _prompt_length(row: Row) -> int:
    """Tokens before the answer; all of them where the answer was cut off."""
    labels: list[int] = row["labels"]
    return next((place for place, label in enumerate(labels) if label != IGNORED), len(labels))


def _length(example: Row, tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens of a prompt."""
    if isinstance(example["prompt"], str):
        return len(text_ids(tokenizer, example["prompt"]))
    return len(chat_ids(tokenizer, conversation(example)[0], ask=True))
