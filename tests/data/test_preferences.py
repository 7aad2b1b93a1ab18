"""Records of pairs, judged answers and prompts: how they are read, what is refused, and their tokens beside TRL's own."""

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from trl import DPOTrainer
from trl.data_utils import extract_prompt

from s2ft import S2FTError
from s2ft.data.examples import data_digest, load, load_examples
from s2ft.data.preference_tokens import tokenize_judged, tokenize_pairs, tokenize_prompts, tokenize_whole_pairs
from s2ft.data.preferences import KINDS
from s2ft.data.tokens import SOURCE, weigh
from tiny_base import CHAT_TEMPLATE, byte_tokenizer

USER, GOOD, BAD = (
    {"role": role, "content": text} for role, text in (("user", "?"), ("assistant", "yes"), ("assistant", "no"))
)


def written(folder: Path, *records: Any) -> str:
    path = folder / "data.json"
    path.write_text(json.dumps(records))
    return str(path)


def loaded(kind: str, folder: Path, *records: Any) -> list[tuple[Any, Any]]:
    examples = load_examples(written(folder, *records), kind=KINDS[kind])
    return [(example["prompt"], example["completion"]) for example in examples]


@pytest.mark.parametrize(
    ("record", "prompt", "chosen", "rejected"),
    [
        ({"prompt": "a b", "chosen": " c", "rejected": " d"}, "a b", " c", " d"),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, [USER], [GOOD], [BAD]),
        ({"prompt": [USER], "chosen": GOOD, "rejected": BAD}, [USER], [GOOD], [BAD]),
        ({"chosen": [USER, GOOD], "rejected": [USER, BAD]}, [USER], [GOOD], [BAD]),
        ({"prompt": "?", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, [USER], [GOOD], [BAD]),
        ({"chosen": "Q: why? A: because", "rejected": "Q: why? A: before"}, "Q: why? A:", " because", " before"),
    ],
    ids=["text", "messages", "one message each", "a conversation each", "and its prompt as text", "a text each"],
)
def test_a_pair_is_read_in_every_layout(
    record: dict[str, Any], prompt: Any, chosen: Any, rejected: Any, tmp_path: Path
) -> None:
    assert loaded("pair", tmp_path, record) == [(prompt, chosen), (prompt, rejected)]
    if "prompt" not in record and isinstance(chosen, list):
        assert extract_prompt(record) == {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def test_an_instruction_becomes_the_alpaca_prompt(tmp_path: Path) -> None:
    ((prompt, chosen), _) = loaded(
        "pair", tmp_path, {"instruction": "Add.", "input": "2", "chosen": "x", "rejected": "y"}
    )
    ((asked, _),) = loaded("prompt", tmp_path, {"instruction": "Add.", "input": "2"})
    assert prompt == asked
    assert "### Instruction:\nAdd.\n\n### Input:\n2" in prompt
    assert chosen == "x"


def test_a_pair_is_two_judged_answers(tmp_path: Path) -> None:
    records = {"prompt": "a", "completion": "b", "label": 0}, {"prompt": "a", "chosen": "c", "rejected": "d"}
    examples = load_examples(written(tmp_path, *records), kind=KINDS["judged"])
    assert list(zip(examples["completion"], examples["label"], strict=True)) == [
        ("b", False),
        ("c", True),
        ("d", False),
    ]
    other = load_examples(written(tmp_path, {**records[0], "label": 1}, records[1]), kind=KINDS["judged"])
    assert data_digest(other) != data_digest(examples)


def test_a_limit_counts_pairs(tmp_path: Path) -> None:
    records = [{"prompt": "a", "chosen": str(n), "rejected": "d"} for n in range(3)]
    assert len(load_examples(written(tmp_path, *records), limit=2, kind=KINDS["pair"])) == 4


@pytest.mark.parametrize(
    ("kind", "record", "message"),
    [
        ("pair", {"prompt": "a", "chosen": "b"}, r"expected .* with prompt .*, chosen and rejected; found prompt, chosen"),
        ("pair", {"chosen": "b", "rejected": "c"}, "prompt is missing, and chosen and rejected do not begin alike"),
        ("pair", {"question": "?", "chosen": "the answer is a", "rejected": "the answer is b"}, r"--map prompt=question"),
        ("judged", {"query": "?", "chosen": "the answer is a", "rejected": "the answer is b"}, r"but query: say that"),
        ("pair", {"prompt": "a", "chosen": "b", "rejected": 5}, "rejected is 5; it must be text"),
        ("pair", {"prompt": [USER], "chosen": [USER], "rejected": [BAD]}, "chosen has no turn with the role 'assistant'"),
        ("pair", {"prompt": [USER], "chosen": [GOOD, USER], "rejected": [BAD]}, "chosen ends with a turn of the role 'user'"),
        ("pair", [1], r"expected an object .*; found \[1\]"),
        ("judged", {"prompt": "a", "completion": "b"}, "completion and label, or .*; found prompt, completion"),
        ("judged", {"prompt": "a", "completion": "b", "label": "good"}, 'label is "good"; it must be true'),
        ("prompt", {"question": "a"}, r"expected an object with prompt .*; found question"),
        ("prompt", {"prompt": [USER, GOOD]}, "prompt ends with a turn of the role 'assistant', so nothing is asked"),
        ("prompt", {"prompt": [USER], "tools": [{"name": "f"}]}, "tools is .*the chat template gets the messages alone"),
    ],
)  # fmt: skip
def test_a_record_without_its_fields_is_refused_by_name(kind: str, record: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(S2FTError, match=message) as refused:
        load_examples(written(tmp_path, record), kind=KINDS[kind])
    assert str(refused.value).startswith(str(tmp_path / "data.json:1"))


@pytest.mark.parametrize("chat", [True, False])
def test_tokens_are_those_of_trls_own_preparation(chat: bool, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(CHAT_TEMPLATE)
    record = {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}
    record = record if chat else {"prompt": "ab", "chosen": "cd", "rejected": "ce"}
    tokens = tokenize_pairs(load_examples(written(tmp_path, record), kind=KINDS["pair"]), tokenizer, 512)

    class Bare(DPOTrainer):
        def __init__(self) -> None:
            self._tokenizer = tokenizer

    class Args:
        dataset_num_proc, max_length = None, None

    theirs = Bare()._prepare_dataset(Dataset.from_list([record]), tokenizer, Args(), "train")
    for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
        assert tokens.dataset[name][:] == theirs[name][:]


def test_pairs_that_cannot_be_compared_are_left_out_and_counted(tmp_path: Path) -> None:
    answers = [("abc", "d"), ("abc", "abc"), ("abc", " "), ("abcdefghijkl", "d")]
    records = [{"prompt": "pq", "chosen": chosen, "rejected": rejected} for chosen, rejected in answers]
    long = {"prompt": "p" * 9, "chosen": "a", "rejected": "b"}
    examples = load_examples(written(tmp_path, *records, long), kind=KINDS["pair"])
    tokens = tokenize_pairs(examples, byte_tokenizer(), 8)
    assert (len(tokens.dataset), tokens.alike, tokens.empty, tokens.shortened, tokens.too_long) == (2, 1, 1, 1, 1)
    assert max(map(len, tokens.dataset["input_ids"])) == 8
    whole = tokenize_whole_pairs(examples, byte_tokenizer(), 8)
    assert (len(whole.dataset), whole.too_long, whole.shortened) == (1, 2, 0)
    with pytest.raises(S2FTError, match=r"none of the 1 examples is left.*1 have the same answer twice"):
        tokenize_pairs(load_examples(written(tmp_path, records[1]), kind=KINDS["pair"]), byte_tokenizer(), 8)


def test_judged_answers_and_prompts_keep_what_stands_beside_them(tmp_path: Path) -> None:
    judged = load_examples(written(tmp_path, {"prompt": "ab", "completion": "c", "label": False}), kind=KINDS["judged"])
    (row,) = tokenize_judged(judged, byte_tokenizer(), 8).dataset
    assert (len(row["prompt_ids"]), len(row["completion_ids"]), row["label"]) == (2, 2, False)  # and the end
    asked = [{"prompt": "ab", "answer": 3, "steps": ["x"]}, {"prompt": "a" * 9, "answer": 4, "steps": []}]
    prompts = tokenize_prompts(load_examples(written(tmp_path, *asked), kind=KINDS["prompt"]), byte_tokenizer(), 8)
    assert list(prompts.dataset) == [asked[0]]
    assert prompts.too_long == 1
    mixed = [{"prompt": "ab", "answer": 3}, {"prompt": "ab", "answer": "x"}]
    with pytest.raises(S2FTError, match="the fields beside the prompts do not make columns"):
        tokenize_prompts(load_examples(written(tmp_path, *mixed), kind=KINDS["prompt"]), byte_tokenizer(), 8)


def test_a_field_that_some_prompts_lack_is_none_there(tmp_path: Path) -> None:
    asked = [{"prompt": "a", "answer": None}, {"prompt": "b", "answer": 3}, {"prompt": "c", "hint": "x"}]
    prompts = tokenize_prompts(load_examples(written(tmp_path, *asked), kind=KINDS["prompt"]), byte_tokenizer(), 8)
    given = [(None, None), (3, None), (None, "x")]
    assert [(row["answer"], row["hint"]) for row in prompts.dataset] == given


def test_fields_of_prompts_keep_their_names_and_values(tmp_path: Path) -> None:
    """Also those that a column of ours might have, with weights and without."""
    asked = {"prompt": "a", "source": "a book", "fate": "sealed", "parted": "yes", "problems": ["x"], "labels": [1]}
    loaded = load([written(tmp_path, asked)], kind=KINDS["prompt"])
    assert list(tokenize_prompts(loaded.examples, byte_tokenizer(), 8).dataset) == [asked]
    numbered = loaded.examples.add_column(SOURCE, loaded.sources)
    assert list(weigh(tokenize_prompts(numbered, byte_tokenizer(), 8), [2], seed=0).dataset) == [asked, asked]


def test_a_pair_without_its_objective_is_told_of_it(tmp_path):
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"prompt": "1+1=", "chosen": "2", "rejected": "3"}))
    with pytest.raises(
        S2FTError, match=r"found prompt, chosen, rejected; .* another objective: dpo, kto, orpo or reward"
    ):
        load_examples(str(tmp_path / "pairs.jsonl"))
