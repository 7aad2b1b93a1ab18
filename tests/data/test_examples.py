"""Data files in every layout become prompt and completion, and what is wrong with them is said with file and line."""

import json
import os
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from s2ft import S2FTError
from s2ft.data.examples import data_digest, load_examples
from s2ft.data.prompts import alpaca_prompt
from s2ft.data.tokens import IGNORED, token_example, tokenize
from tiny_base import CHAT_TEMPLATE, byte_tokenizer

REAL = Path(os.environ.get("S2FT_DATA", Path(__file__).parents[3] / "shared" / "data")) / "llm-adapters"
ALPACA = {"instruction": "Add 2 and 3.", "input": "", "output": "5", "answer": "5.0"}
PAIR = {"prompt": "2+3=", "completion": "5"}
TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "2+3?"},
    {"role": "assistant", "content": "5"},
    {"role": "user", "content": "and 1 more?"},
    {"role": "assistant", "content": "6"},
]


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_json_jsonl_and_parquet_of_the_same_records_give_the_same_examples(tmp_path):
    records = [ALPACA, {**ALPACA, "input": "carefully", "output": "five"}]
    sources = [
        write(tmp_path / "a.json", json.dumps(records, indent=1)),
        write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, records)) + "\n\n"),
        str(tmp_path / "a.parquet"),
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), sources[2])
    loaded = [load_examples(source) for source in sources]
    assert loaded[0].to_list() == loaded[1].to_list() == loaded[2].to_list()
    assert loaded[0][0] == {"prompt": alpaca_prompt("Add 2 and 3."), "completion": "5"}
    assert "### Input:\ncarefully\n" in loaded[0][1]["prompt"]
    assert len({data_digest(dataset) for dataset in loaded}) == 1


def test_the_digest_follows_content_and_order():
    rows = [PAIR, {"prompt": "1+1=", "completion": "2"}]
    digest = data_digest(Dataset.from_list(rows))
    assert digest != data_digest(Dataset.from_list(rows[::-1]))
    assert digest != data_digest(Dataset.from_list([rows[0], {**rows[1], "completion": "3"}]))


def test_sources_are_joined_and_limited(tmp_path):
    one = write(tmp_path / "one.json", json.dumps([PAIR] * 3))
    two = write(tmp_path / "two.jsonl", json.dumps(ALPACA))
    assert len(load_examples([one, two])) == 4
    assert load_examples([two, one], limit=2)["completion"] == ["5", "5"]
    assert len(load_examples([one, two], limit=2)) == 2


def test_a_folder_gives_its_training_files(tmp_path):
    write(tmp_path / "train.json", json.dumps([PAIR]))
    write(tmp_path / "test.json", json.dumps([PAIR] * 5))
    assert len(load_examples(str(tmp_path))) == 1
    Dataset.from_list([PAIR] * 2).save_to_disk(tmp_path / "saved")
    assert len(load_examples(str(tmp_path / "saved"))) == 2


def test_every_turn_of_the_assistant_is_an_example_of_its_own(tmp_path):
    source = write(tmp_path / "chat.jsonl", json.dumps({"messages": TURNS}))
    dataset, place = load_examples(source), {"place": f"{source}:1"}
    assert dataset[0] == {"prompt": TURNS[:2], "completion": TURNS[2:3], **place}
    assert dataset[1] == {"prompt": TURNS[:4], "completion": TURNS[4:], **place}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "", "a.json' is an empty file"),
        ("a.json", "[]", "a.json' holds an empty array"),
        ("a.jsonl", "\n \n", "a.jsonl' is an empty file"),
        ("a.json", '"prompt"', "a.json:1: expected an array of objects"),
        ("a.json", '{"data": [\n]}', "a.json:1: expected an array of objects, [{...}, ...], or an object in each line"),
        ("a.json", '[{"prompt": "a",\n "completion": }]', "a.json:2: malformed JSON in column 16"),
        (
            "a.json",
            '[{"prompt": "a", "completion": "b"}\n{}]',
            "a.json:2: malformed JSON in column 1: expected ',' or ']'",
        ),
        ("a.json", '[{"prompt": "a", "completion": "b"},\n', "a.json:2: malformed JSON"),
        ("a.json", '[{"prompt": "a", "completion": "b"}]\n[]', "more text after the end of the array"),
        ("a.jsonl", '{"prompt": "a", "completion": "b"}\n{"prompt"', "a.jsonl:2: malformed JSON in column 10"),
        ("a.json", '[{"prompt": "a", "completion": "b"},\n 3]', "a.json:2: expected an object with instruction"),
        (
            "a.jsonl",
            '{"question": "a", "reply": "b"}',
            "a.jsonl:1: expected the fields instruction, output (and input); or",
        ),
        ("a.jsonl", '{"question": "a", "reply": "b"}', "found question, reply"),
        ("a.jsonl", '{"instruction": "a", "output": 5}', "a.jsonl:1: output is 5; it must be text"),
        ("a.jsonl", '{"messages": []}', "a.jsonl:1: messages is []; it must be a list of messages"),
        ("a.jsonl", '{"messages": [{"role": "user", "content": "a"}]}', "no turn with the role 'assistant'"),
        ("a.jsonl", '{"messages": [{"role": "user"}, {"role": "assistant", "content": "a"}]}', "messages[0] is"),
        (
            "a.jsonl",
            '{"messages": [{"role": "assistant", "content": "a"}]}',
            "messages only opens with a turn of the role",
        ),
        ("a.jsonl", '{"prompt": "a\\ud83d", "completion": "b"}', 'a.jsonl:1: prompt is "a\\ud83d"; it holds half of a'),
        ("a.json", '[{"messages": [{"role": "user", "content": "\\ud83d"}]}]', "it holds half of a surrogate pair"),
        ("a.jsonl", "\n" + "9" * 5000, "a.jsonl:2: JSON that cannot be read: an integer has too many digits"),
        ("a.json", "[\n" + "9" * 5000 + "]", "a.json:2: JSON that cannot be read: an integer has too many digits"),
        ("a.jsonl", "[" * 200_000, "a.jsonl:1: JSON that cannot be read: it is nested too deeply"),
        ("a.json", "[\n" + "[" * 200_000, "a.json:2: JSON that cannot be read: it is nested too deeply"),
        (
            "a.txt",
            "prompt,completion",
            "ends in '.txt'; known are .json, .jsonl, .csv, .tsv, .parquet, all but .parquet also",
        ),
        ("a.parquet", "no table", "is not a readable parquet file"),
    ],
)
def test_what_is_wrong_is_said_with_file_and_line(tmp_path, name, text, message):
    with pytest.raises(S2FTError) as caught:
        load_examples(write(tmp_path / name, text))
    assert message in str(caught.value)


def test_a_list_without_messages_is_one_problem(tmp_path):
    with pytest.raises(S2FTError) as caught:
        load_examples(write(tmp_path / "a.jsonl", '{"messages": []}'))
    assert "problems" not in str(caught.value)


def test_null_fields_are_as_if_not_there(tmp_path):
    source = write(tmp_path / "a.jsonl", json.dumps({"messages": None, **PAIR}))
    assert load_examples(source).to_list() == [PAIR]


@pytest.mark.parametrize("name", ["state.json", "dataset_dict.json"])
def test_a_folder_that_only_looks_saved_is_named(tmp_path, name):
    write(tmp_path / name, "{}")
    with pytest.raises(S2FTError, match="is no data set saved by"):
        load_examples(str(tmp_path))


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(S2FTError, match=r"nowhere\.json.*there is no such file"):
        load_examples(str(tmp_path / "nowhere.json"))
    with pytest.raises(S2FTError, match="is a folder without"):
        load_examples(str(tmp_path))


def test_ten_kinds_of_wrong_records_are_listed_and_the_rest_is_counted(tmp_path):
    with pytest.raises(S2FTError) as caught:
        load_examples(write(tmp_path / "a.jsonl", "".join(f'{{"x{n % 14}": 1}}\n' for n in range(200))))
    lines = str(caught.value).splitlines()
    assert lines[0] == "200 problems:"
    assert len(lines) == 12
    assert "a.jsonl:10:" in lines[10]
    assert lines[11].endswith(f"and {4 * 14} more")


def test_what_is_wrong_with_many_records_is_said_once(tmp_path):
    source = write(tmp_path / "a.jsonl", '{"x": 1}\n' * 200)
    with pytest.raises(S2FTError) as caught:
        load_examples([source, str(tmp_path / "b.jsonl")])
    lines = str(caught.value).splitlines()
    assert lines[0] == "201 problems:"
    assert lines[1].endswith("b.jsonl': there is no such file")
    assert lines[2].startswith(f"  - {source}:1: expected the fields instruction, output")
    assert lines[2].endswith(f"(also {source}:2, {source}:3, {source}:4 and 196 more)")
    assert len(lines) == 3


def test_text_and_chat_do_not_mix(tmp_path):
    source = write(tmp_path / "a.json", json.dumps([PAIR, {"messages": TURNS}]))
    with pytest.raises(S2FTError, match="mixes text and chat"):
        load_examples(source)


def test_not_utf8_is_said_with_the_line(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"prompt": "a", "completion": "b"}\n"\xff"')
    with pytest.raises(S2FTError, match=r"a\.jsonl:2: not UTF-8"):
        load_examples(str(tmp_path / "a.jsonl"))


def learned(row: dict[str, list[int]], tokenizer) -> str:
    """The text that the loss falls on; every other label is ignored."""
    return tokenizer.decode([label for label in row["labels"] if label != IGNORED])


def test_the_loss_falls_on_the_response_only():
    tokenizer = byte_tokenizer()
    row = token_example(PAIR, tokenizer)
    assert tokenizer.decode(row["input_ids"]) == "2+3=5<eos>"
    assert row["labels"] == [IGNORED] * 4 + row["input_ids"][4:]
    assert learned(row, tokenizer) == "5<eos>"


def test_the_loss_falls_on_every_turn_of_the_assistant(tmp_path):
    tokenizer = byte_tokenizer(CHAT_TEMPLATE)
    dataset = load_examples(write(tmp_path / "chat.jsonl", json.dumps({"messages": TURNS})))
    rows = [token_example(example, tokenizer) for example in dataset]
    assert [learned(row, tokenizer) for row in rows] == ["5<eos>", "6<eos>"]
    assert tokenizer.decode(rows[1]["input_ids"]).endswith("<assistant>5<eos><user>and 1 more?<assistant>6<eos>")


@pytest.mark.parametrize("chat", [False, True])
def test_tokens_and_labels_are_those_of_trl(tmp_path, chat):
    tokenizer = byte_tokenizer(CHAT_TEMPLATE)
    examples = [{"messages": TURNS}] if chat else [ALPACA, PAIR]
    dataset = load_examples(write(tmp_path / "a.json", json.dumps(examples)))
    ours = tokenize(dataset, tokenizer, max_length=200).dataset
    theirs = prepared_by_trl(dataset, tokenizer, 200)
    assert ours["input_ids"][:] == theirs["input_ids"][:]
    assert ours["labels"][:] == theirs["labels"][:]


def prepared_by_trl(dataset, tokenizer, max_length):
    class Stand:  # what SFTTrainer._prepare_dataset reads of a trainer
        _tokenizer, chat_template, completion_only_loss = tokenizer, None, True

    args = SFTConfig(max_length=max_length, report_to="none", bf16=False)
    return SFTTrainer._prepare_dataset(Stand(), dataset, tokenizer, args, False, None, "train")


def test_examples_without_a_response_are_left_out_and_counted():
    pairs = [("2+3=", "5"), ("1+1=", " "), ("x" * 30, "y"), ("a", "b" * 40)]
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in pairs]
    tokens = tokenize(Dataset.from_list(rows), byte_tokenizer(), max_length=20)
    assert (len(tokens.dataset), tokens.empty, tokens.too_long, tokens.shortened) == (2, 1, 1, 1)
    with pytest.raises(S2FTError, match=r"none of the 1 examples is left.*raise max_length"):
        tokenize(Dataset.from_list(rows[2:3]), byte_tokenizer(), max_length=20)


def test_chat_needs_a_chat_template():
    dataset = Dataset.from_list([{"prompt": TURNS[:2], "completion": TURNS[2:3]}])
    with pytest.raises(S2FTError, match="no chat template"):
        tokenize(dataset, byte_tokenizer(), max_length=20)


@pytest.mark.skipif(not REAL.is_dir(), reason="the LLM-Adapters data is not here")
def test_the_real_training_sets_load():
    assert len(load_examples(str(REAL / "ft-training_set" / "math_data.json"))) == 3260
    commonsense = sorted(str(path) for path in REAL.glob("dataset/*/train.json"))
    assert len(commonsense) == 4
    assert len(load_examples(commonsense)) > 15_000
