"""Answers written in stretches, by rows that leave, against a loop that writes one by one without a cache."""

import pytest
import torch
from transformers import GenerationConfig

from families import VOCABULARY, build, hybrid
from s2ft.evaluate.engines import pad_left
from s2ft.evaluate.writing import has_rows, written

ENDS = (2, *range(40, VOCABULARY))  # a third of all tokens: rows end at different times


@torch.no_grad()
def one_by_one(model, prompt: list[int], room: int) -> list[int]:
    ids = list(prompt)
    for _ in range(room):
        ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        if ids[-1] in ENDS:
            break
    return ids[len(prompt) :]


def up_to_the_end(tokens: list[int]) -> list[int]:
    end = next((place for place, token in enumerate(tokens) if token in ENDS), len(tokens))
    return tokens[: end + 1]


def write(model, prompts: list[list[int]], room: int, stretch: int) -> list[list[int]]:
    model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0, eos_token_id=list(ENDS))
    rows = written(model, *pad_left(prompts, 0), room, ENDS, stretch)
    assert max(map(len, rows)) <= room
    return [up_to_the_end(row) for row in rows]


@pytest.mark.parametrize("stretch", [1, 3, 50])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "gemma3"])  # the last two slide a window of 5
def test_rows_that_leave_change_nothing_for_the_others(family, stretch) -> None:
    model = build(family)
    prompts = [torch.randint(3, 40, (length,)).tolist() for length in (1, 9, 4, 12, 7, 7)]
    assert write(model, prompts, 11, stretch) == [one_by_one(model, prompt, 11) for prompt in prompts]


def test_a_cache_of_another_kind_is_made_anew(monkeypatch) -> None:
    model = hybrid()
    with torch.no_grad():
        model.lm_head.weight[list(ENDS)] *= 0.01  # never the likeliest in all rows: some go on
    assert not has_rows(model(input_ids=torch.tensor([[3]]), use_cache=True).past_key_values)
    prompts = torch.randint(3, 40, (5, 6)).tolist()
    generate, asked = model.generate, []

    def noting(**inputs):
        asked.append(inputs["max_new_tokens"])
        return generate(**inputs)

    monkeypatch.setattr(model, "generate", noting)
    assert write(model, prompts, 10, 3) == [one_by_one(model, prompt, 10) for prompt in prompts]
    assert asked == [3, 7]


def test_only_rows_that_have_not_ended_are_under_way(monkeypatch) -> None:
    model = build("llama")
    prompts = [torch.randint(3, 40, (length,)).tolist() for length in (3, 8, 5, 6, 2)]
    wanted = [len(one_by_one(model, prompt, 12)) for prompt in prompts]
    generate, sizes = model.generate, []

    def noting(**inputs):
        sizes.append(len(inputs["input_ids"]))
        return generate(**inputs)

    monkeypatch.setattr(model, "generate", noting)
    found = write(model, prompts, 12, 2)
    assert sizes == [sum(length > done for length in wanted) for done in range(0, max(wanted), 2)]
    assert list(map(len, found)) == wanted
