"""Which tasks there are, how they are named, and how their data becomes prompts: the very prompts of training."""

import json
import os
from pathlib import Path

import datasets
import pytest

from s2ft import S2FTError
from s2ft.data.examples import load_examples
from s2ft.data.prompts import alpaca_conversation, alpaca_prompt
from s2ft.data.tokens import IGNORED, token_example
from s2ft.evaluate.engines import prompt_ids
from s2ft.evaluate.mt_bench import NEED_REFERENCE, load_dialogues
from s2ft.evaluate.questions import load_questions
from s2ft.evaluate.tasks import TASKS, find_tasks, missing
from tiny_base import CHAT_TEMPLATE, byte_tokenizer

REAL = Path(os.environ.get("S2FT_DATA", Path(__file__).parents[3] / "shared" / "data"))
GSM8K, BOOLQ = TASKS["gsm8k"], TASKS["boolq"]
RECORDS = [
    {"instruction": "Add 2 and 3.", "input": "", "output": "\nA: 2 + 3 = 5.", "answer": "5.0"},
    {"instruction": "Add them.", "input": "20 and 3,000", "output": "3020", "answer": "3,020"},
]


def put(folder: Path, records: object, task=GSM8K, under: str = "dataset") -> str:
    path = folder / under / task.folder / "test.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(records))
    return str(folder)


def test_suites_hold_the_papers_tasks() -> None:
    suites = ("commonsense", "arithmetic", "instruction")
    sizes = {suite: [task.name for task in TASKS.values() if task.suite == suite] for suite in suites}
    assert [len(names) for names in sizes.values()] == [8, 7, 1]
    assert find_tasks(["arithmetic", "gsm8k", "svamp"]) == [TASKS[name] for name in sizes["arithmetic"]]


@pytest.mark.parametrize("name", ["social_i_qa", "SIQA", " siqa "])
def test_a_task_goes_by_its_folder_too(name) -> None:
    assert find_tasks([name]) == [TASKS["siqa"]]


def test_unknown_tasks_are_told_the_nearest() -> None:
    with pytest.raises(S2FTError, match="2 problems") as caught:
        find_tasks(["gsm8", "boolq", "arithmetics"])
    assert "task='gsm8' is unknown; did you mean gsm8k" in str(caught.value)
    assert "task='arithmetics' is unknown; did you mean arithmetic" in str(caught.value)
    with pytest.raises(S2FTError, match="there are boolq, piqa"):
        find_tasks(["xyzzy"])


@pytest.mark.parametrize("under", ["dataset", ".", "llm-adapters/dataset"])
def test_prompts_are_those_of_training(tmp_path, under) -> None:
    data = put(tmp_path, RECORDS, under=under)
    questions = load_questions(GSM8K, data)
    trained = load_examples(str(tmp_path / under / "gsm8k" / "test.json"))
    assert [question.prompt for question in questions] == trained["prompt"][:]
    assert [question.gold for question in questions] == ["5.0", "3020"]
    assert load_questions(GSM8K, data, limit=1) == questions[:1]
    tokenizer = byte_tokenizer()
    for question, example in zip(questions, trained, strict=True):
        row = token_example(example, tokenizer)
        start = sum(label == IGNORED for label in row["labels"])
        assert prompt_ids(tokenizer, question.prompt) == row["input_ids"][:start]


def test_chat_prompts_are_those_of_training(tmp_path) -> None:
    tokenizer = byte_tokenizer(CHAT_TEMPLATE)
    question = load_questions(GSM8K, put(tmp_path, RECORDS), prompts="chat")[1]
    assert question.prompt == [{"role": "user", "content": "Add them.\n\n20 and 3,000"}]
    row = token_example({"prompt": question.prompt, "completion": [{"role": "assistant", "content": "5"}]}, tokenizer)
    start = sum(label == IGNORED for label in row["labels"])
    assert prompt_ids(tokenizer, question.prompt) == row["input_ids"][:start]
    with pytest.raises(S2FTError, match="needs a tokenizer with a chat template"):
        prompt_ids(byte_tokenizer(), question.prompt)


def test_a_tokenizer_that_ends_every_text_does_not_end_a_prompt() -> None:
    plain, ending = byte_tokenizer(), byte_tokenizer(None, [], "$A <eos>")
    assert ending("ab")["input_ids"] == [*plain("ab")["input_ids"], plain.eos_token_id]
    assert prompt_ids(ending, "ab") == plain("ab")["input_ids"]


def test_missing_files_and_folders_are_named(tmp_path) -> None:
    data = put(tmp_path, RECORDS)
    assert missing([GSM8K, BOOLQ, TASKS["mt-bench"]], data) == [
        f"data={data!r} has nothing on boolq: there is no dataset/boolq/test.json",
        f"data={data!r} has nothing on mt-bench: there is no question.jsonl",
    ]
    with pytest.raises(S2FTError, match="there is no such folder"):
        load_questions(GSM8K, str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ({"instruction": "x", "answer": "maybe"}, r"answer='maybe' must be one of true, false \(boolq\)"),
        ({"instruction": "x"}, "answer=None must be one of true, false"),
        ({"question": "x", "answer": "true"}, "expected an object with instruction"),
        ({"instruction": "x", "input": 3, "answer": "true"}, "input=3 must be text"),
        ("text", "expected an object"),
    ],
)
def test_a_record_that_is_no_question_is_refused_with_its_line(tmp_path, record, problem) -> None:
    data = put(tmp_path, [{"instruction": "x", "answer": "true"}, record], BOOLQ)
    with pytest.raises(S2FTError, match=rf"test\.json:1: {problem}"):
        load_questions(BOOLQ, data)


def test_a_data_set_on_the_hub_is_laid_out_alike(monkeypatch) -> None:
    asked = []

    def load_dataset(name, data_files, split):
        asked.append((name, data_files, split))
        if data_files["test"].startswith("gsm8k"):
            raise FileNotFoundError("no such file")
        return datasets.Dataset.from_list(RECORDS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    questions = load_questions(GSM8K, "somebody/tests")
    assert asked == [("somebody/tests", {"test": f"{place}gsm8k/test.json"}, "test") for place in ("", "dataset/")]
    assert [question.gold for question in questions] == ["5.0", "3020"]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: 1 / 0)
    with pytest.raises(S2FTError, match=r"data='somebody/tests' is no folder here, and gsm8k/test\.json or dataset"):
        load_questions(GSM8K, "somebody/tests")


@pytest.mark.parametrize("name", [name for name, task in TASKS.items() if task.rule is not None])
def test_the_real_test_sets_have_the_papers_sizes(name) -> None:
    task = TASKS[name]
    if missing([task], str(REAL)):
        pytest.skip(f"the data of {name} is not here")
    questions = load_questions(task, str(REAL))
    assert len(questions) == task.size
    assert all(question.prompt.endswith("\n\n### Response:\n") for question in questions)


def test_the_real_mt_bench_has_80_questions_of_8_categories() -> None:
    if missing([TASKS["mt-bench"]], str(REAL)):
        pytest.skip("the data of MT-Bench is not here")
    dialogues = load_dialogues(str(REAL))
    assert len(dialogues) == 80
    assert len({dialogue.category for dialogue in dialogues}) == 8
    assert sum(dialogue.category in NEED_REFERENCE for dialogue in dialogues) == 30
    assert all(len(dialogue.references) == 2 for dialogue in dialogues if dialogue.category in NEED_REFERENCE)


def test_a_second_turn_builds_on_the_first() -> None:
    first = alpaca_prompt("Name a river.")
    assert alpaca_conversation([], "Name a river.") == first
    text = alpaca_conversation([("Name a river.", "Rhine")], "Another.")
    assert text == f"{first}Rhine\n\n### Instruction:\nAnother.\n\n### Response:\n"
