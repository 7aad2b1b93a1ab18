"""Text as it comes: whole characters, no part of a stop string, and all in all what the tokens say."""

import random
from typing import Any

import pytest

from metaspace import metaspace_tokenizer
from s2ft.serve.spelling import Spelling
from s2ft.serve.text import Text
from tiny_base import byte_tokenizer

TEXTS = ["größer als 3 €", "naïve 😀😀 end", "日本語のテキスト", "plain", " spaces  at both ends "]


def pieces(tokens: list[int], stop: tuple[str, ...] = ()) -> tuple[list[str], Text]:
    text, found = Text(byte_tokenizer(), stop), []
    for token in tokens:
        found.append(text.add(token))
        if text.is_stopped:
            return found, text
    return [*found, text.end()], text


@pytest.mark.parametrize("wanted", TEXTS)
def test_pieces_are_whole_characters_and_together_the_text(wanted: str) -> None:
    tokens = byte_tokenizer()(wanted)["input_ids"]
    found, _ = pieces(tokens)
    assert "".join(found) == wanted
    assert not any("\ufffd" in piece for piece in found)
    assert len([piece for piece in found if piece]) == len(wanted)


def test_a_half_character_at_the_end_shows_as_one() -> None:
    tokens = byte_tokenizer()("a€")["input_ids"][:-1]
    assert "".join(pieces(tokens)[0]) == byte_tokenizer().decode(tokens)


@pytest.mark.parametrize("wanted", TEXTS)
def test_it_ends_before_the_first_stop_string_and_tells_no_part_of_it(wanted: str) -> None:
    for _ in range(20):
        start = random.randrange(len(wanted))
        stop = wanted[start : start + random.randrange(1, 4)]
        found, text = pieces(byte_tokenizer()(wanted)["input_ids"], ("not there", stop, wanted[start:] + "more"))
        assert "".join(found) == wanted[: wanted.index(stop)]
        assert text.is_stopped


def test_what_only_begins_like_a_stop_string_is_told_in_the_end() -> None:
    found, text = pieces(byte_tokenizer()("one EN")["input_ids"], ("END",))
    assert (found[-3:], text.is_stopped) == (["", "", "EN"], False)


@pytest.mark.parametrize("make", [byte_tokenizer, metaspace_tokenizer])
@pytest.mark.parametrize("wanted", [*TEXTS, "The capital of France is Paris.", "€€€😀€€€€", "is \ufffd\ufffd Paris"])
def test_a_text_goes_on_from_its_prompt_wherever_that_ends(make: Any, wanted: str) -> None:
    """A character that the prompt only begins is told whole."""
    tokenizer = make()
    tokens = tokenizer(wanted)["input_ids"]
    for cut in range(1, len(tokens) + 1):
        text = Text(tokenizer, (), tokens[:cut])
        found = "".join(map(text.add, tokens[cut:])) + text.end()
        begun = Spelling(tokenizer).begun(tokens[:cut])
        before = tokenizer.decode(tokens[: cut - begun], skip_special_tokens=True)
        assert before + found == (wanted if cut < len(tokens) else before)


def test_special_tokens_before_it_do_not_make_it_begin_anew() -> None:
    tokenizer = metaspace_tokenizer()
    is_, paris = tokenizer.convert_tokens_to_ids(["▁is", "▁Paris"])
    for prompt, wanted in ([is_, *[2] * 20], " Paris"), ([1], "Paris"), ([], "Paris"):
        assert Text(tokenizer, (), prompt).add(paris) == wanted
    stopping = Text(tokenizer, (" Paris",), [1, is_])
    assert (stopping.add(paris), stopping.is_stopped) == ("", True)
