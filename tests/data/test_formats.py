"""Data in every file and layout that people have it in, odd files among them, and what is said of those."""

import bz2
import csv
import gzip
import io
import json
import random
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset, DatasetDict

from s2ft import S2FTError
from s2ft.data import records
from s2ft.data.examples import conversation, load, load_examples
from s2ft.data.preference_tokens import tokenize_judged, tokenize_prompts
from s2ft.data.preferences import KINDS
from s2ft.data.prompts import alpaca_prompt
from s2ft.data.sources import COMPRESSED, check_source
from s2ft.data.tokens import IGNORED, SOURCE, hold_out, token_example, tokenize, weigh
from tiny_base import CHAT_TEMPLATE, byte_tokenizer

RECORDS = [
    {"instruction": 'Say "a, b"', "input": "", "output": "first line\nsecond; ünïcode \t tab"},
    {"instruction": "Add 2 and 3.", "input": "carefully", "output": "5"},
]
TALK = [
    {"from": "system", "value": "Be brief."},
    {"from": "human", "value": "2+3?"},
    {"from": "gpt", "value": "5"},
]
MEANT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "2+3?"},
    {"role": "assistant", "content": "5"},
]

CUT_SHORT = gzip.compress(random.Random(0).randbytes(9000))[:800]


def write(path: Path, data: str | bytes) -> str:
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return str(path)


def jsonl(*values: object) -> str:
    return "".join(json.dumps(value) + "\n" for value in values)


def table(rows: list[dict[str, str]], delimiter: str) -> str:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def packed(suffix: str, data: bytes) -> bytes:
    if suffix == ".gz":
        return gzip.compress(data[:20]) + gzip.compress(data[20:])  # two members, as `cat a.gz b.gz` makes
    if suffix == ".bz2":
        return bz2.compress(data)
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, {".zst": "zstd", ".lz4": "lz4"}[suffix]) as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


def refused(source: str, **how: object) -> str:
    with pytest.raises(S2FTError) as caught:
        load_examples(source, **how)
    return str(caught.value)


class TestFiles:
    def test_every_kind_of_file_gives_the_same_examples(self, tmp_path):
        lines = jsonl(*RECORDS)
        sources = [
            write(tmp_path / "a.json", json.dumps(RECORDS, indent=2)),
            write(tmp_path / "lines.json", "\ufeff" + lines),
            write(tmp_path / "blank.json", "\n" * 99 + lines),
            write(tmp_path / "comma.csv", table(RECORDS, ",")),
            write(tmp_path / "semicolon.csv", "\ufeff" + table(RECORDS, ";")),
            write(tmp_path / "a.tsv", table(RECORDS, "\t")),
            *(write(tmp_path / f"a.jsonl{end}", packed(end, lines.encode())) for end in COMPRESSED),
            write(tmp_path / "a.csv.gz", gzip.compress(table(RECORDS, ",").encode())),
            write(tmp_path / "b.json.gz", gzip.compress(json.dumps(RECORDS).encode())),
            str(tmp_path / "a.parquet"),
            str(tmp_path / "saved"),
            str(tmp_path / "splits"),
        ]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS), tmp_path / "a.parquet")
        Dataset.from_list(RECORDS).save_to_disk(tmp_path / "saved")
        DatasetDict(train=Dataset.from_list(RECORDS), test=Dataset.from_list(RECORDS[:1])).save_to_disk(
            tmp_path / "splits"
        )
        expected = [
            {"prompt": alpaca_prompt(one["instruction"], one["input"]), "completion": one["output"]} for one in RECORDS
        ]
        for source in sources:
            assert load_examples(source).to_list() == expected, source

    @pytest.mark.parametrize("name", ["a.tsv", "a.tsv.gz"])
    @pytest.mark.parametrize("data", [b"text\none, two; three\n", b"text\tx, y, z\none, two; three\t\n"])
    def test_cells_of_a_tsv_are_parted_by_tabs_alone(self, tmp_path, name, data):
        source = write(tmp_path / name, gzip.compress(data) if name.endswith(".gz") else data)
        assert load_examples(source)["completion"] == ["one, two; three"]

    def test_a_folder_joins_files_of_all_kinds(self, tmp_path):
        write(tmp_path / "a.csv", table(RECORDS, ","))
        write(tmp_path / "b.jsonl.gz", gzip.compress(jsonl(RECORDS[1]).encode()))
        write(tmp_path / "notes.txt", "not data")
        assert len(load_examples(str(tmp_path))) == 3

    def test_a_place_is_the_line_of_the_file_even_below_cells_of_several_lines(self, tmp_path):
        text = 'prompt,completion\n"two\nlines",x\n\na,b,c\n'
        assert "a.csv:5: 3 cells in a table of 2: prompt, completion" in refused(write(tmp_path / "a.csv", text))

    @pytest.mark.parametrize(
        ("name", "data", "message"),
        [
            ("a.csv", "", "a.csv' is an empty file"),
            ("a.csv", "prompt,completion\n", "a.csv' has no rows"),
            (
                "a.csv",
                "prompt,prompt\na,b\n",
                "a.csv:1: the columns are 'prompt', 'prompt'; each needs a name of its own",
            ),
            ("a.csv", "prompt,\na,b\n", "a.csv:1: the columns are 'prompt', ''"),
            ("a.csv", 'prompt,completion\na,"b\n', "a.csv:2: malformed CSV: unexpected end of data"),
            (
                "a.csv",
                "prompt,completion\na,b\n\xff,c\n".encode("latin-1"),
                "a.csv:3: not UTF-8 text: invalid start byte",
            ),
            (
                "a.csv",
                "prompt,completion\na,b\n".encode("utf-16"),
                "a.csv:1: not UTF-8 text: it looks like UTF-16; save",
            ),
            (
                "a.json",
                "[{}]".encode("utf-16"),
                "a.json:1: not UTF-8 text: it looks like UTF-16; save the file as UTF-8",
            ),
            ("a.csv", b"prompt,completion\ra,b\r", "a.csv:1: malformed CSV: new-line character seen in unquoted field"),
            ("a.json.gz", b"no gzip", "a.json.gz' cannot be read as its name says"),
            (
                "a.json.gz",
                gzip.compress(b"[{}]" + b" " * 99, mtime=0)[:-9],
                "a.json.gz' cannot be read as its name says",
            ),
            ("a.csv", "title,body\na,b\n", "a.csv:2: expected the fields instruction, output"),
            ("a.jsonl.gz", b"no gzip", "a.jsonl.gz' cannot be read as its name says"),
            (
                "a.jsonl.gz",
                gzip.compress(random.Random(0).randbytes(9000), mtime=0)[:800],
                "a.jsonl.gz' cannot be read as its name says",
            ),
            ("a.jsonl.gz", gzip.compress(b"", mtime=0), "a.jsonl.gz' is an empty file"),
            ("a.parquet.gz", b"", "a.parquet.gz' ends in '.gz'; known are"),
            ("a.jsonl.xz", b"", "a.jsonl.xz' ends in '.xz'; known are"),
            ("a.jsonl", "3\n", "a.jsonl:1: expected an object with instruction"),
        ],
    )
    def test_odd_files_are_refused_by_name(self, tmp_path, name, data, message):
        assert message in refused(write(tmp_path / name, data))

    def test_a_table_without_rows_is_refused(self, monkeypatch):
        monkeypatch.setattr(records, "load_dataset", lambda *_, **__: Dataset.from_dict({"text": []}))
        assert "org/set' has no rows" in refused("org/set")

    def test_a_name_on_the_hub_says_config_and_split_and_a_part_is_streamed(self, monkeypatch):
        asked = []

        def load_dataset(*args, **kwargs):
            asked.append((args, kwargs))
            return Dataset.from_list([{"question": "2+3?", "answer": "5"}] * 3)

        monkeypatch.setattr(records, "load_dataset", load_dataset)
        assert len(load_examples("openai/gsm8k:main", limit=2)) == 2
        assert len(load_examples("openai/gsm8k::test")) == 3
        assert asked == [
            (("openai/gsm8k", "main"), {"split": "train", "streaming": True}),
            (("openai/gsm8k", None), {"split": "test", "streaming": False}),
        ]

    def test_a_slice_on_the_hub_is_not_streamed(self, monkeypatch):
        def load_dataset(*_, split, streaming):
            if streaming and "[" in split:
                raise ValueError(f"Bad split: {split}. Available splits: ['train']")  # as `datasets` says
            return Dataset.from_list([{"text": "a"}] * 3)

        monkeypatch.setattr(records, "load_dataset", load_dataset)
        assert len(load_examples("org/set::train[:10%]", limit=2)) == 2

    def test_a_stream_that_breaks_off_is_an_error(self, monkeypatch):
        def rows():
            yield {"text": "a"}
            raise ConnectionError("reset by peer")

        monkeypatch.setattr(records, "load_dataset", lambda *_, **__: rows())
        assert "org/set' could not be read to its end: reset by peer" in refused("org/set")

    def test_what_is_compressed_and_not_there_is_no_name_on_the_hub(self):
        with pytest.raises(S2FTError, match="there is no such file"):
            check_source("data/train.jsonl.gz")


class TestLayouts:
    def one(self, tmp_path, value, **how):
        return load_examples(write(tmp_path / "a.jsonl", jsonl(value)), **how)

    def test_questions_and_answers_are_asked_in_alpacas_words(self, tmp_path):
        (example,) = self.one(tmp_path, {"question": "2+3?", "answer": "5", "id": 1})
        assert example == {"prompt": alpaca_prompt("2+3?"), "completion": "5"}

    def test_a_text_beside_a_prompt_does_not_take_its_place(self, tmp_path):
        record = {"prompt": "2+3?", "text": "a book"}
        (asked,) = self.one(tmp_path, record, kind=KINDS["prompt"])
        assert asked["prompt"] == "2+3?"
        with pytest.raises(S2FTError, match="found prompt, text"):
            self.one(tmp_path, record)

    @pytest.mark.parametrize("messages", [TALK, MEANT, json.dumps(TALK)])
    def test_sharegpt_is_chat_in_other_words(self, tmp_path, messages):
        (example,) = self.one(tmp_path, {"conversations": messages})
        prompt, completion, _ = conversation(example)
        assert [*prompt, *completion] == MEANT

    def test_sharegpts_calls_of_tools_are_calls(self, tmp_path):
        call = {"name": "add", "arguments": {"a": 2}}
        talk = [
            {"from": "human", "value": "2+3?"},
            {"from": "function_call", "value": json.dumps(call)},
            {"from": "observation", "value": "5"},
            {"from": "gpt", "value": "It is 5."},
        ]
        first, second = self.one(tmp_path, {"conversations": talk, "tools": [{"name": "add"}], "system": "Add."})
        assert conversation(first)[1] == [{"role": "assistant", "content": "", "tool_calls": [call]}]
        assert [message["role"] for message in conversation(second)[0]] == ["system", "user", "assistant", "tool"]

    @pytest.mark.parametrize(
        ("value", "message"),
        [
            ({"conversations": []}, "a.jsonl:1: messages is []; it must be a list of messages"),
            ({"conversations": "hello"}, 'a.jsonl:1: messages is "hello"; it must be a list of messages'),
            ({"conversations": [{"from": "human"}]}, "a.jsonl:1: messages[0] is"),
            (
                {"conversations": [*TALK[:2], {"from": "function_call", "value": "add 2"}]},
                'tool_calls is "add 2"; it must',
            ),
            ({"conversations": TALK[:2]}, "no turn with the role 'assistant'"),
            ({"text": 5}, "a.jsonl:1: completion is 5; it must be text"),
            ({"question": "a"}, "found question; --map gives columns these names"),
            ({}, "found none; --map gives columns these names"),
        ],
    )
    def test_odd_records_are_refused_by_place(self, tmp_path, value, message):
        with pytest.raises(S2FTError) as caught:
            self.one(tmp_path, value)
        assert message in str(caught.value)

    def test_all_of_a_text_is_learned_and_what_is_longer_goes_on_in_the_next_row(self, tmp_path):
        tokenizer, text = byte_tokenizer(), "Once upon a time there was nothing more."
        examples = self.one(tmp_path, {"text": text})
        row = token_example(examples[0], tokenizer)
        assert row["labels"] == row["input_ids"]
        assert tokenizer.decode(row["input_ids"]) == text + "<eos>"
        parts = tokenize(examples, tokenizer, max_length=16)
        assert [token for part in parts.dataset["input_ids"] for token in part] == row["input_ids"]
        assert parts.dataset["labels"][:] == parts.dataset["input_ids"][:]
        assert list(map(len, parts.dataset["input_ids"])) == [16, 16, 9]
        assert (parts.empty, parts.too_long, parts.shortened) == (0, 0, 0)

    def test_text_and_chat_of_several_sources_do_not_mix(self, tmp_path):
        text = write(tmp_path / "a.jsonl", jsonl({"text": "a"}))
        chat = write(tmp_path / "b.jsonl", jsonl({"conversations": TALK}))
        with pytest.raises(S2FTError, match="mixes text and chat"):
            load_examples([text, chat])

    def test_it_says_what_was_taken_for_what(self, tmp_path):
        values = [{"question": "a", "answer": "b"}, {"question": "c", "answer": "d"}, {"text": "e"}]
        source = write(tmp_path / "a.jsonl", jsonl(*values))
        (reading,) = load([source]).readings
        assert list(reading.lines()) == [
            f"{source}: 2 records with question, answer, taken as question and answer: "
            "Alpaca's prompt, and the answer is learned",
            f"{source}: 1 records with text, taken as text: all of it is learned",
        ]


class TestOtherObjectives:
    def test_preferences_come_from_every_file_by_every_name(self, tmp_path):
        rows = [{"prompt": "2+3=", "chosen": "5", "rejected": "6"}]
        other = [{"question": "2+3=", "good": "5", "bad": "6"}]
        columns = {"prompt": "question", "chosen": "good", "rejected": "bad"}
        expected = load_examples(write(tmp_path / "a.jsonl", jsonl(*rows)), kind=KINDS["pair"]).to_list()
        table_of_rows = write(tmp_path / "a.csv", table(rows, ","))
        named = write(tmp_path / "b.csv.gz", gzip.compress(table(other, ";").encode()))
        assert [one["completion"] for one in expected] == ["5", "6"]
        assert load_examples(table_of_rows, kind=KINDS["pair"]).to_list() == expected
        assert load_examples(named, kind=KINDS["pair"], columns=columns).to_list() == expected

    def test_sharegpts_preferences_answer_their_conversation(self, tmp_path):
        value = {"conversations": TALK[:2], "chosen": TALK[2], "rejected": {"from": "gpt", "value": "6"}}
        pair = load_examples(write(tmp_path / "a.jsonl", jsonl(value)), kind=KINDS["pair"])
        assert [conversation(one)[:2] for one in pair] == [
            (MEANT[:2], [MEANT[2]]),
            (MEANT[:2], [{"role": "assistant", "content": "6"}]),
        ]

    def test_judged_answers_and_prompts_can_be_weighed(self, tmp_path):
        source = write(
            tmp_path / "a.jsonl", jsonl(*({"prompt": f"{n}=", "completion": "5", "label": True} for n in "123"))
        )
        for kind, tokens_of in (("judged", tokenize_judged), ("prompt", tokenize_prompts)):
            loaded = load([source], kind=KINDS[kind])
            tokens = tokens_of(loaded.examples.add_column(SOURCE, loaded.sources), byte_tokenizer(), 32)
            assert len(weigh(tokens, [2], seed=0).dataset) == 6


class TestMap:
    def test_columns_go_by_other_names(self, tmp_path):
        source = write(tmp_path / "a.csv", "query,context,reply,output\n2+3?,in words,five,x\n")
        columns = {"instruction": "query", "input": "context", "output": "reply"}
        assert load_examples(source, columns=columns)[0] == {
            "prompt": alpaca_prompt("2+3?", "in words"),
            "completion": "five",
        }

    def test_a_map_decides_between_layouts(self, tmp_path):
        source = write(tmp_path / "a.jsonl", jsonl({"question": "2+3=", "answer": "5"}))
        mapped = load_examples(source, columns={"prompt": "question", "completion": "answer"})
        assert mapped.to_list() == [{"prompt": "2+3=", "completion": "5"}]

    def test_it_serves_several_sources_of_which_each_has_its_own_names(self, tmp_path):
        one = write(tmp_path / "a.jsonl", jsonl({"q": "2", "output": "5"}))
        two = write(tmp_path / "b.jsonl", jsonl({"instruction": "3", "output": "6"}))
        assert load_examples([one, two], columns={"instruction": "q"})["completion"] == ["5", "6"]

    def test_a_column_that_is_nowhere_is_named(self, tmp_path):
        source = write(tmp_path / "a.jsonl", jsonl({"q": "2", "output": "5"}))
        message = refused(source, columns={"instruction": "q", "input": "contxt"})
        assert message == "map: input=contxt names a column that no record has"


class TestWeights:
    def test_each_source_is_taken_as_often_as_its_weight_says(self, tmp_path):
        sources = [
            write(tmp_path / f"{name}.jsonl", jsonl(*({"prompt": name, "completion": str(n)} for n in range(20))))
            for name in "abc"
        ]
        loaded, tokenizer = load(sources), byte_tokenizer()
        examples = loaded.examples.add_column(SOURCE, loaded.sources)
        left, apart = hold_out(tokenize(examples, tokenizer, 32), 12, seed=1)
        weighed = weigh(left, [1, 0.5, 2], seed=1).dataset
        texts = [tokenizer.decode(row) for row in weighed["input_ids"]]
        kept = [tokenizer.decode(row) for row in left.dataset["input_ids"]]
        by_source = {name: [text for text in texts if text.startswith(name)] for name in "abc"}
        all_of = {name: [text for text in kept if text.startswith(name)] for name in "abc"}
        assert by_source["a"] == all_of["a"]
        assert len(by_source["b"]) == round(len(all_of["b"]) / 2) == len(set(by_source["b"]))
        assert sorted(by_source["c"]) == sorted(2 * all_of["c"])
        assert not {tokenizer.decode(row) for row in apart["input_ids"]} & set(texts)
        assert weighed.column_names == ["input_ids", "labels"]
        assert weigh(left, [1, 0.5, 2], seed=1).dataset["input_ids"][:] == weighed["input_ids"][:]

    def test_weights_that_leave_nothing_are_refused(self, tmp_path):
        loaded = load([write(tmp_path / "a.jsonl", jsonl({"text": "a"}))])
        tokens = tokenize(loaded.examples.add_column(SOURCE, loaded.sources), byte_tokenizer(), 32)
        with pytest.raises(S2FTError, match=r"data_weights=\[0.1\] leave no example"):
            weigh(tokens, [0.1], seed=0)


def test_sharegpt_is_learned_turn_by_turn(tmp_path):
    tokenizer = byte_tokenizer(CHAT_TEMPLATE)
    (example,) = load_examples(write(tmp_path / "a.jsonl", jsonl({"conversations": TALK})))
    row = token_example(example, tokenizer)
    assert tokenizer.decode([label for label in row["labels"] if label != IGNORED]) == "5<eos>"
