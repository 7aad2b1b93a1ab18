"""How tokens are spelt: their bytes are those of the text, and their places are in the text that the client has."""

from typing import Any

import pytest

from metaspace import metaspace_tokenizer
from s2ft.serve.job import Job, Sampling, Told
from s2ft.serve.responses import ChatShape, CompletionShape
from s2ft.serve.spelling import Offsets, Spelling
from tiny_base import byte_tokenizer

TEXTS = ["The capital of France is Paris.", "é", "€ 日本 😀", "is  Paris", " is", "Paris \ufffd."]


@pytest.mark.parametrize("make", [byte_tokenizer, metaspace_tokenizer])
@pytest.mark.parametrize("text", TEXTS)
def test_the_bytes_of_all_tokens_are_those_of_the_text(make: Any, text: str) -> None:
    tokenizer = make()
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    shape = ChatShape("m", tokenizer, 1, True)
    parts = [
        shape.chunk(0, "", [Told(token, -1.0, ((token, -1.0),)) for token in some]) for some in (tokens[:2], tokens[2:])
    ]
    told = [one for part in parts if (found := part["choices"][0]["logprobs"]) for one in found["content"]]
    for found in (told, [one["top_logprobs"][0] for one in told]):
        assert bytes(byte for one in found for byte in one["bytes"]) == text.encode()
    (end,) = shape.chunk(0, "", [Told(tokenizer.eos_token_id, -1.0)])["choices"][0]["logprobs"]["content"]
    assert end["bytes"] is None


@pytest.mark.parametrize("make", [byte_tokenizer, metaspace_tokenizer])
def test_a_token_is_where_it_stands_in_the_whole_text(make: Any) -> None:
    """After a prompt that is told, and on from part to part; the beginning that the tokenizer adds has no place of its own."""
    tokenizer = make()
    prompt, answer = "The € capital", " is € Paris"
    whole = prompt + answer
    tokens = tokenizer(whole)["input_ids"]
    count = len(tokenizer(prompt)["input_ids"])
    job = Job(tokens[:count], "a", Sampling(9), tell_prompt=True, text=prompt, goes_on=True)
    shape, names, places = CompletionShape("m", tokenizer, 1, True, [job]), list[str](), list[int]()
    for part in (tokens[:count], tokens[count : count + 2], tokens[count + 2 :]):
        found = shape.chunk(0, "", [Told(token, -1.0) for token in part])["choices"][0]["logprobs"]
        names, places = names + found["tokens"], places + found["text_offset"]
    assert places == sorted(places)
    assert places[0] == 0
    said = [(name, place) for name, place in zip(names, places, strict=True) if name.strip() in whole and place > 0]
    assert len(said) >= 4
    for name, place in said:
        assert whole[place:].startswith(name)
    once = CompletionShape("m", tokenizer, 1, True, [job]).body(0, whole, [Told(token, -1.0) for token in tokens])
    assert once["logprobs"]["text_offset"] == places


def test_special_tokens_of_an_answer_take_no_place() -> None:
    tokenizer = metaspace_tokenizer()
    offsets = Offsets(Spelling(tokenizer))
    is_, paris, dot = tokenizer.convert_tokens_to_ids(["▁is", "▁Paris", "."])
    assert [offsets.add(token) for token in (is_, 2, paris, dot)] == [0, 3, 3, 9]


def test_two_tokens_that_differ_in_a_space_have_two_names() -> None:
    tokenizer = metaspace_tokenizer()
    ids = tokenizer.convert_tokens_to_ids(["▁Paris", "Paris"])
    told = CompletionShape("m", tokenizer, 1, True).body(0, "", [Told(ids[0], -1.0, tuple((one, -1.0) for one in ids))])
    assert told["logprobs"]["top_logprobs"] == [{"Paris": -1.0, " Paris": -1.0}]
