"""Completions and chats of a base whose tokenizer drops the first space of a text: what clients are told."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from live_server import Live
from metaspace import metaspace_tokenizer
from s2ft.demo import base_path
from s2ft.serve import scheduler
from s2ft.serve.model import prepared
from s2ft.serve.options import ServeOptions
from s2ft.serve.service import Service
from tiny_base import CHAT_TEMPLATE, tiny_model

ANSWER = ("▁Paris", ".", "<0xE2>", "<0x82>", "<0xAC>", "</s>")
TEXT, PROMPT = " Paris.€", "The capital of France is"


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    tokenizer = metaspace_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    options = ServeOptions.parse({"model": str(base_path())})
    found = Live(Service(options, prepared(tiny_model(len(tokenizer)), tokenizer)), [])
    assert 2 in found.service._scheduler._ends
    yield found
    found.stop()


@pytest.fixture(autouse=True)
def _scripted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model says ANSWER, whatever it is asked."""
    said = iter(metaspace_tokenizer().convert_tokens_to_ids(list(ANSWER)) * 9)
    monkeypatch.setattr(scheduler, "choose", lambda *_: torch.tensor([next(said)]))


def complete(server: Live, **how: Any) -> Any:
    asked = {"model": "base", "prompt": PROMPT, "temperature": 0, "logprobs": 1, **how}
    status, answer, _ = server.ask("POST", "/v1/completions", asked)
    assert status == 200
    return answer


def test_a_completion_goes_on_from_its_prompt(server: Live) -> None:
    ids = metaspace_tokenizer()(PROMPT)["input_ids"]
    for prompt in (PROMPT, ids):
        (choice,) = complete(server, prompt=prompt)["choices"]
        assert (choice["text"], choice["finish_reason"]) == (TEXT, "stop")
        assert choice["logprobs"]["tokens"][:2] == [" Paris", "."]
        assert choice["logprobs"]["text_offset"] == [0, 6, 7, 7, 7, 8]


@pytest.mark.parametrize("logprobs", [0, None])
def test_echo_is_the_prompt_as_it_was_sent(server: Live, logprobs: int | None) -> None:
    ids = metaspace_tokenizer()(PROMPT)["input_ids"]
    for prompt, said in (PROMPT, PROMPT), (f"<s> {PROMPT}", f"<s> {PROMPT}"), (ids, f"<s> {PROMPT}"):
        (choice,) = complete(server, prompt=prompt, echo=True, logprobs=logprobs)["choices"]
        assert choice["text"] == said + TEXT
        if choice["logprobs"]:
            place = choice["logprobs"]["tokens"].index(" Paris")
            assert choice["logprobs"]["text_offset"][place] == len(said)


def test_a_message_begins_a_text_of_its_own(server: Live) -> None:
    """Its template writes the space before it."""
    asked = {"model": "base", "messages": [{"role": "user", "content": "is"}], "logprobs": True}
    (choice,) = server.ask("POST", "/v1/chat/completions", asked)[1]["choices"]
    assert choice["message"]["content"] == TEXT.lstrip()
    told = choice["logprobs"]["content"]
    assert told[0]["token"] == "Paris"
    assert bytes(byte for one in told for byte in one["bytes"] or ()) == TEXT.lstrip().encode()
