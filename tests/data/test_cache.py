"""Tokens of many examples are kept on the disk, and found again by what they depend on."""

import pytest
from datasets import Dataset, config

from s2ft.data import cache, tokens
from s2ft.data.cache import cache_key
from s2ft.data.tokens import SOURCE, encode
from tiny_base import CHAT_TEMPLATE, byte_tokenizer

ROWS = [{"prompt": f"{n}+1=", "completion": str(n + 1)} for n in range(6)]


@pytest.fixture(autouse=True)
def few(monkeypatch, tmp_path):
    monkeypatch.setattr(cache, "FEWEST", len(ROWS))
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path)


def test_the_same_content_is_tokenised_once(monkeypatch, tmp_path):
    first = encode(Dataset.from_list(ROWS), byte_tokenizer(), 32)
    assert len(list((tmp_path / "s2ft").glob("*.arrow"))) == 1
    assert first.cache_files
    monkeypatch.setattr(tokens, "_encode_batch", lambda *_, **__: pytest.fail("tokenised again"))
    again = encode(Dataset.from_list(ROWS), byte_tokenizer(), 32)
    assert again.to_list() == first.to_list()


def test_few_examples_are_not_kept(tmp_path):
    assert not encode(Dataset.from_list(ROWS[1:]), byte_tokenizer(), 32).cache_files
    assert not (tmp_path / "s2ft").exists()


def test_all_that_tokens_depend_on_is_in_the_key():
    tokenizer, other = byte_tokenizer(), byte_tokenizer(CHAT_TEMPLATE)
    examples, changed = Dataset.from_list(ROWS), Dataset.from_list([*ROWS[:-1], {"prompt": "5+1=", "completion": "7"}])
    keys = [
        cache_key(examples, tokenizer, max_length=32, sources=None),
        cache_key(changed, tokenizer, max_length=32, sources=None),
        cache_key(examples, other, max_length=32, sources=None),
        cache_key(examples, tokenizer, max_length=33, sources=None),
        cache_key(examples, tokenizer, max_length=32, sources=[0] * 6),
    ]
    assert len(set(keys)) == len(keys)
    assert keys[0] == cache_key(Dataset.from_list(ROWS), byte_tokenizer(), max_length=32, sources=None)


def test_tokens_that_were_kept_under_other_names_are_not_taken(monkeypatch):
    encode(Dataset.from_list(ROWS), byte_tokenizer(), 32)
    renamed = {tokens.FATE: "another", **{name: name for name in tokens._COLUMNS if name != tokens.FATE}}
    monkeypatch.setattr(tokens, "_COLUMNS", {renamed[name]: kind for name, kind in tokens._COLUMNS.items()})
    monkeypatch.setattr(tokens, "FATE", "another")
    assert set(encode(Dataset.from_list(ROWS), byte_tokenizer(), 32).column_names) == set(renamed.values())


def test_the_source_of_an_example_is_kept_with_its_tokens():
    weighed = [Dataset.from_list(ROWS).add_column(SOURCE, [number] * 6) for number in (0, 1)]
    assert [set(encode(one, byte_tokenizer(), 32)[SOURCE]) for one in weighed] == [{0}, {1}]
