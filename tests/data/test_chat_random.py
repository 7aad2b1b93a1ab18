"""Random chat records under several templates: every word reaches the model or is refused, and only answers are learned."""

import json
import random

import pyarrow
import pyarrow.parquet
import pytest
import torch

from s2ft import S2FTError
from s2ft.data.examples import conversation, load_examples
from s2ft.data.tokens import IGNORED, tokenize
from templates import LLAMA3, WITHOUT_CALLS, WITHOUT_CONTENT, WITHOUT_TOOL_TURNS
from tiny_base import CHAT_TEMPLATE, CHATML, CHATML_TOKENS, byte_tokenizer

TEMPLATES = (CHATML, WITHOUT_CALLS, WITHOUT_CONTENT, WITHOUT_TOOL_TURNS, CHAT_TEMPLATE, LLAMA3)
MARKS = {"weight": (0, 1), "train": (False, True)}


class Words:
    """Words that occur once; `said` keeps which message, and which field, each is of."""

    def __init__(self, rng: random.Random) -> None:
        self.rng, self.count = rng, 0

    def one(self) -> str:
        self.count += 1
        return f"word{self.count:04d}."

    def call(self) -> dict:
        function = {"name": self.one(), "arguments": {"x": self.one(), "n": None}}
        if self.rng.random() < 0.5:
            function["arguments"] = json.dumps(function["arguments"])
        return {"type": "function", "function": function}

    def answer(self) -> dict:
        message = {"role": "assistant", "content": self.one()}
        if self.rng.random() < 0.3:
            message["tool_calls"] = [self.call() for _ in range(self.rng.choice((1, 2)))]
            message["content"] = self.rng.choice((message["content"], "", None))
        if self.rng.random() < 0.2:
            message["reasoning_content"] = self.one()
        if self.rng.random() < 0.2:
            name = self.rng.choice(tuple(MARKS))
            message[name] = self.rng.choice(MARKS[name])
        return message

    def record(self) -> dict:
        system = [{"role": "system", "content": self.one()}] * (self.rng.random() < 0.3)
        messages = [*system]
        for _ in range(self.rng.choice((1, 1, 2, 3))):
            messages.append({"role": "user", "content": self.one()})
            messages.append(self.answer())
            if "tool_calls" in messages[-1]:
                messages.append({"role": "tool", "content": self.one()})
        record = {"messages": messages}
        if self.rng.random() < 0.4:
            cut = self.rng.randrange(len(system) + 1, len(messages))
            record = {"prompt": messages[:cut], "completion": messages[cut:]}
        if not system and self.rng.random() < 0.3:
            record["system"] = self.one()
        if self.rng.random() < 0.3:
            record["tools"] = [{"type": "function", "function": {"name": self.one()}}]
        return record


def words_in(value) -> set[str]:
    text = value if isinstance(value, str) else json.dumps(value)
    return {f"word{part[:4]}." for part in text.split("word")[1:]}


def learned_turns(record: dict) -> list[tuple[dict, set[str]]]:
    """By the plainest reading: each turn of the assistant that is not switched off, and the words that it must know."""
    prompt, rest = record.get("prompt", []), record.get("completion", record.get("messages"))
    found, before = [], words_in([record.get("system", ""), record.get("tools", ""), *map(strip, prompt)])
    for place, message in enumerate(rest):
        answers_something = bool(prompt) or place > 0 or "system" in record
        on = message.get("weight", 1) and message.get("train", True)
        if message["role"] == "assistant" and on and answers_something:
            found.append((message, set(before)))
        before |= words_in(strip(message))
    return found


def strip(message: dict) -> dict:
    """Templates may leave out the reasoning of earlier turns."""
    return {key: value for key, value in message.items() if key != "reasoning_content"}


def taken_whole(template: str, record: dict) -> bool:
    """Whether a template takes all that a record says."""
    text = json.dumps(record)
    return template == CHATML or not any(
        f'"{name}"' in text for name in ("tool_calls", "tools", "reasoning_content", "tool")
    )


@pytest.mark.soak
def test_nothing_is_lost_and_only_answers_are_learned(tmp_path, tries) -> None:
    rng = random.Random(int(torch.randint(2**31, ())))
    path = tmp_path / "chat.jsonl"
    tokenizers = [byte_tokenizer(template, CHATML_TOKENS, "<|im_start|> $A <eos>") for template in TEMPLATES]
    refused = 0
    for _ in range(tries(80, 5_000)):
        tokenizer, record = rng.choice(tokenizers), Words(rng).record()
        path.write_text(json.dumps(record))
        wanted = learned_turns(record)
        try:
            rows = tokenize(load_examples(str(path)), tokenizer, 10_000).dataset.to_list()
        except S2FTError as error:
            rows, said = None, str(error)
        if rows is None:
            refused += 1
            nothing = not wanted or "no turn with the role" in said
            assert nothing or (f"{path}:1: " in said and not taken_whole(tokenizer.chat_template, record)), record
            continue
        assert len(rows) == len(wanted), record
        for row, (message, before) in zip(rows, wanted, strict=True):
            text = tokenizer.decode(row["input_ids"])
            learned = tokenizer.decode([label for label in row["labels"] if label != IGNORED])
            assert words_in(learned) == words_in(message), record
            assert words_in(text) >= before | words_in(message), record
    assert refused > 0


def test_tables_give_calls_no_arguments_that_they_had_not(tmp_path) -> None:
    calls = [{"function": {"name": "f", "arguments": arguments}} for arguments in ({"city": "Bonn"}, {"days": 3})]
    record = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": calls}]}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([record]), tmp_path / "chat.parquet")
    _, completion, _ = conversation(load_examples(str(tmp_path / "chat.parquet"))[0])
    assert completion[0]["tool_calls"] == calls
