"""The server as OpenAI's own client meets it: answers, streams, errors; and whose answers they are."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from openai import AsyncOpenAI, OpenAI

from live_server import Live, live
from s2ft import fuse
from s2ft.demo import base_path
from s2ft.runtime.models import load_model, load_tokenizer
from s2ft.serve import scheduler
from s2ft.serve.requests import ChatRequest, CompletionRequest
from served import greedy

pytestmark = pytest.mark.usefixtures("one_thread")
PROMPTS = ("reverse: planet\n", "add: 12+34\n", "sort: queue\n", "x", "reverse: an\n")
TOKENS = 8


@pytest.fixture(scope="module")
def server(root: Path) -> Iterator[Live]:
    with live(root, name="mother", rows=6) as found:
        yield found


@pytest.fixture(scope="module")
def client(server: Live) -> Iterator[OpenAI]:
    with server.client() as found:
        yield found


@pytest.fixture(scope="module")
def alone(root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], str]:
    """(model, prompt) → what `generate` writes by itself."""
    base, tokenizer = load_model(str(base_path()), torch.float32), load_tokenizer(str(base_path()))
    both, part = (tmp_path_factory.mktemp("fused") / name for name in ("both", "part"))
    fuse([root / "user0", root / "user1"], output=both)
    fuse([root / "user1", root / "user0"], [0.5, -0.25], output=part)
    folders = {"mother": None, "user0": root / "user0", "user1": root / "user1", "user0+user1": both, "part": part}
    return {
        (name, prompt): tokenizer.decode(
            greedy(base, folder, tokenizer(prompt)["input_ids"], TOKENS), skip_special_tokens=True
        )
        for name, folder in folders.items()
        for prompt in PROMPTS
    }


def complete(client: OpenAI, model: str, prompt: Any, **how: Any) -> Any:
    return client.completions.create(model=model, prompt=prompt, **{"temperature": 0, "max_tokens": TOKENS, **how})


def chat(client: OpenAI, model: str, text: str, **how: Any) -> Any:
    messages: Any = [{"role": "user", "content": text}]
    return client.chat.completions.create(
        model=model, messages=messages, **{"temperature": 0, "max_tokens": TOKENS, **how}
    )


def test_models_are_the_base_and_its_adapters(client: OpenAI) -> None:
    found: dict[str, Any] = {model.id: model.model_dump()["parent"] for model in client.models.list()}
    assert found == {"mother": None, "user0": "mother", "user1": "mother"}
    assert client.models.retrieve("user1").id == "user1"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("user9")


def test_the_model_name_chooses_the_adapter(client: OpenAI, alone: dict[tuple[str, str], str]) -> None:
    for name in ("mother", "user0", "user1"):
        answer = complete(client, name, list(PROMPTS))
        assert [choice.text for choice in answer.choices] == [alone[name, prompt] for prompt in PROMPTS]
        assert answer.model == name
    assert len(set(alone.values())) > len(PROMPTS)


def test_a_fusion_made_on_the_fly_is_the_one_of_s2ft_fuse(client: OpenAI, alone: dict[tuple[str, str], str]) -> None:
    together = complete(client, "user0+user1", list(PROMPTS))
    assert [choice.text for choice in together.choices] == [alone["user0+user1", prompt] for prompt in PROMPTS]
    how = {"extra_body": {"fuse": {"user1": 0.5, "user0": -0.25}}}
    weighted = complete(client, "mother", list(PROMPTS), **how)
    assert [choice.text for choice in weighted.choices] == [alone["part", prompt] for prompt in PROMPTS]
    assert weighted.model == "0.5*user1+-0.25*user0"


def test_a_name_of_too_many_adapters_is_refused(client: OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("s2ft.serve.adapters.MOST_FUSED", 1)
    with pytest.raises(openai.BadRequestError, match="a fusion has at most"):
        complete(client, "user1+user0", ["reverse: planet\n"])


def test_a_fusion_has_the_very_bytes_of_s2ft_fuse(server: Live, root: Path, tmp_path: Path) -> None:
    recipe = {"user1": 0.7, "user0": 1.3}
    _, made = server.service.adapters.fused(recipe)
    fuse([root / name for name in recipe], list(recipe.values()), output=tmp_path / "same")
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (made / file).read_bytes() == (tmp_path / "same" / file).read_bytes()


def test_what_is_not_asked_for_is_openais_default() -> None:
    completion = CompletionRequest.model_validate({"model": "m", "prompt": "p"})
    chat = ChatRequest.model_validate({"model": "m", "messages": [{"role": "user", "content": "p"}]})
    assert (completion.limit, chat.limit) == (16, None), "a chat has all the room there is"
    for request in (completion, chat):
        assert (request.temperature, request.top_p, request.n, request.stream) == (1, 1, 1, False)


async def _all_at_once(server: Live, asked: list[tuple[str, str]]) -> list[str]:
    async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        calls = (
            client.completions.create(model=model, prompt=prompt, temperature=0, max_tokens=TOKENS)
            for model, prompt in asked
        )
        return [answer.choices[0].text for answer in await asyncio.gather(*calls)]


def test_requests_at_once_get_what_each_would_get_alone(server: Live, alone: dict[tuple[str, str], str]) -> None:
    asked = [(model, prompt) for model, prompt in alone if model != "part"] * 2
    before = _rows(server)
    assert asyncio.run(_all_at_once(server, asked)) == [alone[one] for one in asked]
    rows, steps = (after - earlier for after, earlier in zip(_rows(server), before, strict=True))
    assert rows > 1.5 * steps, "requests share a batch"


def _rows(server: Live) -> tuple[float, float]:
    """Of all steps so far, the rows in their batches, and their number."""
    told = dict(line.rsplit(" ", 1) for line in server.ask("GET", "/metrics")[1].splitlines() if line[:1] != "#")
    return float(told["s2ft_batch_rows_sum"]), float(told["s2ft_batch_rows_count"])


class TestStreams:
    def test_a_chat_streams_what_it_says_whole(self, client: OpenAI) -> None:
        whole = chat(client, "user0", "reverse: planet", logprobs=True, top_logprobs=2)
        options: Any = {"include_usage": True}
        *chunks, last = chat(
            client, "user0", "reverse: planet", logprobs=True, top_logprobs=2, stream=True, stream_options=options
        )
        assert chunks[0].choices[0].delta.role == "assistant"
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert text == whole.choices[0].message.content
        assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
        assert last.usage == whole.usage
        told = [token for chunk in chunks if (found := chunk.choices[0].logprobs) for token in found.content]
        assert [token.token for token in told] == [token.token for token in whole.choices[0].logprobs.content]
        assert next(one.token for one in told[0].top_logprobs) == told[0].token

    def test_a_completion_streams_what_it_says_whole(self, client: OpenAI) -> None:
        for how in ({}, {"stop": ["a"]}, {"echo": True}, {"n": 3, "temperature": 1.5, "seed": 5}):
            whole = complete(client, "mother", "reverse: planet\n", **how)
            texts = dict.fromkeys(range(len(whole.choices)), "")
            for chunk in complete(client, "mother", "reverse: planet\n", stream=True, **how):
                texts[chunk.choices[0].index] += chunk.choices[0].text
            assert texts == {choice.index: choice.text for choice in whole.choices}


class TestOptions:
    def test_stop_ends_before_the_string(self, client: OpenAI) -> None:
        answer = complete(client, "mother", "reverse: planet\n", stop=["na", "zz"])
        assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("te", "stop")

    def test_a_limit_is_the_reason_of_an_end(self, client: OpenAI) -> None:
        answer = complete(client, "mother", "reverse: planet\n", max_tokens=3)
        assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("ten", "length")
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (16, 3)
        assert chat(client, "mother", "x", max_tokens=None, max_completion_tokens=2).usage.completion_tokens == 2

    def test_where_none_was_sent_a_limit_is_what_there_is_room_for(self, client: OpenAI) -> None:
        answer: Any = client.completions.create(model="mother", prompt=[0] * 2040)
        assert 1 <= answer.usage.completion_tokens <= 8

    def test_a_seed_repeats_and_answers_of_one_request_differ(self, client: OpenAI) -> None:
        how = {"temperature": 2.0, "n": 4, "max_tokens": 12}
        first, again, other = (
            [choice.text for choice in complete(client, "user1", "x", seed=seed, **how).choices] for seed in (3, 3, 99)
        )
        assert first == again != other
        assert len(set(first)) > 1
        assert complete(client, "user1", "x", seed=-(2**62), **how).choices

    def test_the_logprobs_of_a_prompt_are_told_with_echo(self, client: OpenAI) -> None:
        """As evaluation by likelihood asks for it."""
        text = "reverse: planet\ntenalp"
        answer = complete(client, "mother", text, echo=True, logprobs=1, max_tokens=1)
        told = answer.choices[0].logprobs
        assert "".join(told.tokens[:-1]) == text
        assert told.text_offset[:3] == [0, 1, 2]
        assert told.token_logprobs[0] is None
        assert sum(told.token_logprobs[-7:-1]) > -0.1  # what the base was trained to say
        assert [max(top, key=top.get) for top in told.top_logprobs[-7:-1]] == list("tenalp")

    def test_token_ids_are_prompts_too(self, client: OpenAI, alone: dict[tuple[str, str], str]) -> None:
        ids = load_tokenizer(str(base_path()))(list(PROMPTS))["input_ids"]
        answer = complete(client, "user0", ids)
        assert [choice.text for choice in answer.choices] == [alone["user0", prompt] for prompt in PROMPTS]
        assert complete(client, "user0", ids[0]).choices[0].text == alone["user0", PROMPTS[0]]


@pytest.mark.parametrize(
    ("how", "kind", "said"),
    [
        ({"model": "user7"}, openai.NotFoundError, "there is no model 'user7'"),
        ({"model": "user0+user7"}, openai.NotFoundError, "there is no model 'user0.user7'"),
        ({"model": "user0+user0"}, openai.NotFoundError, "there is no model"),
        ({"model": "../adapters/user0"}, openai.NotFoundError, "there is no model"),
        ({"model": "/etc"}, openai.NotFoundError, "there is no model"),
        ({"model": ""}, openai.NotFoundError, "there is no model"),
        ({"extra_body": {"fuse": {"user7": 1}}}, openai.NotFoundError, "there is no model 'user7'"),
        ({"model": "user0", "extra_body": {"fuse": {"user1": 1}}}, openai.NotFoundError, "there is no model"),
        ({"extra_body": {"fuse": {"user1": 1e39}}}, openai.BadRequestError, "cannot be fused"),
        (
            {"extra_body": {"fuse": {"user0": 1e38, "user1": 1}}},
            openai.BadRequestError,
            "not finite; take smaller weights",
        ),
        ({"extra_body": {"fuse": {}}}, openai.BadRequestError, "fuse: "),
        ({"temperature": 3}, openai.BadRequestError, "temperature: .* 2"),
        ({"top_p": 0}, openai.BadRequestError, "top_p: "),
        ({"n": 0}, openai.BadRequestError, "n: "),
        ({"n": 60, "prompt": ["a", "b"]}, openai.BadRequestError, "120 answers are asked for"),
        ({"stop": [""]}, openai.BadRequestError, "stop: "),
        ({"logprobs": 9}, openai.BadRequestError, "logprobs: "),
        ({"seed": 2**70}, openai.BadRequestError, "seed: "),
        ({"max_tokens": 5000}, openai.BadRequestError, "max_tokens is 5000; the prompt has 1 tokens, .* 1024 more"),
        ({"presence_penalty": 1}, openai.BadRequestError, "presence_penalty is not served here"),
        ({"extra_body": {"top_k": 3}}, openai.BadRequestError, "top_k is not served here"),
        ({"prompt": []}, openai.BadRequestError, "prompt"),
        ({"prompt": [[]]}, openai.BadRequestError, "prompt"),
        ({"prompt": ""}, openai.BadRequestError, "the prompt has no tokens"),
        ({"prompt": [-1]}, openai.BadRequestError, "prompt"),
        ({"prompt": [258]}, openai.BadRequestError, "token 258 is none of the model's 258"),
        ({"prompt": [0] * 2048}, openai.BadRequestError, "has 2048 tokens; this server takes 2047"),
        ({"prompt": [0] * 2040, "max_tokens": 9}, openai.BadRequestError, "the answer may have 8 more"),
    ],
)
def test_what_cannot_be_done_is_said(
    client: OpenAI, how: dict[str, Any], kind: type[openai.APIStatusError], said: str
) -> None:
    with pytest.raises(kind, match=said) as caught:
        client.completions.create(**{"model": "mother", "prompt": "x", "max_tokens": 2, **how})
    assert set(caught.value.response.json()["error"]) == {"message", "type", "param", "code"}


def test_a_model_whose_logits_are_not_finite_is_named(client: OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "are_finite", lambda logits: torch.zeros(logits.shape[:-1], dtype=torch.bool))
    for how in {}, {"extra_body": {"fuse": {"user1": 1}}, "model": "mother"}:
        with pytest.raises(openai.InternalServerError, match="'user1': the logits are not finite"):
            complete(client, **{"model": "user1", "prompt": "x", **how})


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"messages": []}, "messages: "),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages: "),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools is not served here"),
        ({"response_format": {"type": "json_object"}}, "response_format is not served here"),
        ({"top_logprobs": 3}, "top_logprobs needs logprobs=true"),
    ],
)
def test_a_chat_that_cannot_be_had_is_refused(client: OpenAI, how: dict[str, Any], said: str) -> None:
    messages = [{"role": "user", "content": "x"}]
    with pytest.raises(openai.BadRequestError, match=said):
        client.chat.completions.create(**{"model": "mother", "messages": messages, "max_tokens": 2, **how})


def test_options_that_ask_for_nothing_are_taken(client: OpenAI) -> None:
    how: Any = {"user": "me", "presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "tools": []}
    how |= {"response_format": {"type": "text"}, "store": False, "parallel_tool_calls": True}
    parts: Any = [{"role": "developer", "content": "a"}, {"role": "user", "content": [{"type": "text", "text": "b"}]}]
    answer = client.chat.completions.create(model="mother", messages=parts, max_tokens=2, **how)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 4
