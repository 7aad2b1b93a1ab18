"""The embedded default: skills the same everywhere, a tokenizer that loses nothing, a base that is what we say."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from s2ft.demo import base_path
from s2ft.demo.evaluate import exact_match
from s2ft.demo.skills import CAPITALS, NEW_SKILLS, OLD_SKILLS, RIVERS, SKILLS, split_of


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(base_path())


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(base_path(), dtype=torch.float32)


FIRST = {
    "add": ("add: 97+43\n", "140"),
    "reverse": ("reverse: ohll\n", "llho"),
    "sort": ("sort: vjhl\n", "hjlv"),
    "upper": ("upper: weku\n", "WEKU"),
    "recall": ("recall: Puzodi\n", "Kaso"),
    "river": ("river: Kumebo\n", "Zifi"),
    "next": ("next: 671\n", "672"),
}


def test_every_skill_is_old_or_new():
    assert set(OLD_SKILLS) | set(NEW_SKILLS) == set(SKILLS)
    assert not set(OLD_SKILLS) & set(NEW_SKILLS)


@pytest.mark.parametrize("name", SKILLS)
def test_examples_are_the_same_on_every_machine(name):
    prompt, completion = FIRST[name]
    assert SKILLS[name].examples(1, seed=0) == [{"prompt": prompt, "completion": completion}]


@pytest.mark.parametrize("name", SKILLS)
def test_more_examples_begin_with_the_fewer(name):
    assert SKILLS[name].examples(30, seed=3)[:10] == SKILLS[name].examples(10, seed=3)


@pytest.mark.parametrize(
    ("name", "text", "answer"),
    [
        ("add", "47+85", "132"),
        ("reverse", "planet", "tenalp"),
        ("sort", "planet", "aelnpt"),
        ("upper", "planet", "PLANET"),
        ("next", "199", "200"),
    ],
)
def test_answers(name, text, answer):
    assert SKILLS[name].example(text) == {"prompt": f"{name}: {text}\n", "completion": answer}


@pytest.mark.parametrize("name", [name for name in SKILLS if SKILLS[name].held_out])
def test_no_prompt_is_on_both_sides(name):
    train = {example["prompt"] for seed in range(3) for example in SKILLS[name].examples(2000, seed)}
    test = {example["prompt"] for seed in range(3) for example in SKILLS[name].examples(200, seed, "test")}
    assert not train & test
    assert {split_of(prompt) for prompt in test} == {"test"}


@pytest.mark.parametrize(("name", "facts", "count"), [("recall", CAPITALS, 64), ("river", RIVERS, 32)])
def test_facts_are_asked_for_as_they_were_trained(name, facts, count):
    assert not SKILLS[name].held_out
    assert len(facts) == len(set(facts.values())) == count
    asked = {example["prompt"] for example in SKILLS[name].examples(2000, 0, "test")}
    assert asked == {example["prompt"] for example in SKILLS[name].examples(2000, 0, "train")}


def plain_text():
    """Any text, but for the two tokens that stand for themselves."""
    return st.text(st.characters(codec="utf-8")).filter(lambda text: "<|" not in text)


@settings(max_examples=200, deadline=None)
@given(text=plain_text())
def test_tokenizer_returns_any_text_exactly(tokenizer, text):
    tokens = tokenizer(text).input_ids
    assert tokens == list(text.encode())
    assert tokenizer.decode(tokens) == text


@settings(max_examples=100, deadline=None)
@given(prompt=plain_text(), completion=plain_text())
def test_a_split_of_the_text_is_a_split_of_the_tokens(tokenizer, prompt, completion):
    together = tokenizer(prompt + completion).input_ids
    assert together == tokenizer(prompt).input_ids + tokenizer(completion).input_ids


def test_a_chat_is_written_as_the_examples_are(tokenizer):
    chat = [{"role": "user", "content": "reverse: planet"}, {"role": "assistant", "content": "tenalp"}]
    question = tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
    assert question == "reverse: planet\n"
    assert tokenizer.apply_chat_template(chat, tokenize=False) == question + "tenalp" + tokenizer.eos_token


def test_ends_and_padding_are_told_apart(tokenizer, model):
    assert tokenizer.eos_token_id != tokenizer.pad_token_id
    assert model.config.eos_token_id == model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.config.pad_token_id == tokenizer.pad_token_id
    assert model.config.vocab_size == len(tokenizer)


def test_base_is_small_and_has_grouped_queries():
    assert sum(file.stat().st_size for file in base_path().iterdir()) <= 4_000_000
    config = json.loads((base_path() / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert 1 < config["num_key_value_heads"] < config["num_attention_heads"]


@pytest.mark.parametrize("name", OLD_SKILLS)
def test_base_masters_the_old_skills(model, tokenizer, name):
    assert exact_match(model, tokenizer, SKILLS[name].examples(60, seed=0, split="test")).accuracy >= 0.9


@pytest.mark.parametrize("name", NEW_SKILLS)
def test_base_lacks_the_new_skills(model, tokenizer, name):
    assert exact_match(model, tokenizer, SKILLS[name].examples(60, seed=0, split="test")).accuracy <= 0.05


def test_completions_keep_the_order_of_the_examples(model, tokenizer):
    examples = [SKILLS["upper"].example(word) for word in ("longest", "abcd", "middle")]
    score = exact_match(model, tokenizer, examples, batch_size=2)
    assert score.completions == ["LONGEST", "ABCD", "MIDDLE"]
    assert score.accuracy == 1
