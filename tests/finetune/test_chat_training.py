"""Training on chat: where answers end is taught, said, and handed on to whoever loads the result."""

import json
import logging

import pytest
from transformers import GenerationConfig

from s2ft import S2FTError
from s2ft.finetune.options import parse_options
from templates import ENDLESS_TURNS
from tiny_base import CHAT_TEMPLATE, CHATML, CHATML_TOKENS, save_tiny_base
from tiny_runs import train

pytestmark = pytest.mark.usefixtures("one_thread")

TURN_END = 259


@pytest.fixture
def run(tmp_path):
    """Trains for two short steps on chat, under a chat template."""

    def call(template: str = CHATML, **options):
        base = save_tiny_base(tmp_path / "base", template, CHATML_TOKENS)
        chat = {"messages": [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]}
        (tmp_path / "chat.json").write_text(json.dumps([chat] * 4))
        settings = {"model": str(base), "data": str(tmp_path / "chat.json"), "output": str(tmp_path / "out")}
        settings |= {"max_steps": 2, "gradient_accumulation": 1, "batch_size": 2, "precision": "fp32"}
        return train(parse_options({**settings, **options}))

    return call


@pytest.mark.parametrize(
    ("method", "targets"), [("s2ft", "lm_head"), ("s2ft", "o_proj,lm_head"), ("lora", ".*_head"), ("dora", "lm_head")]
)
def test_an_adapter_on_the_output_layer_is_refused(run, tmp_path, method, targets) -> None:
    with pytest.raises(S2FTError, match=r"target_modules=.*head.* matches lm_head, the output layer"):
        run(method=method, target_modules=targets, **({"ratios": 0.25} if method == "s2ft" else {}))
    assert not (tmp_path / "out").exists()


def test_an_end_of_its_own_is_said_and_stands_in_the_model_card(run, caplog) -> None:
    caplog.set_level(logging.INFO, "s2ft")
    output = run(ratios=0.25).output
    assert "answers end with <|im_end|>, as the chat template writes it, not with the tokenizer's <eos>" in caplog.text
    assert "eos_token_id=tokenizer.convert_tokens_to_ids('<|im_end|>')" in (output / "README.md").read_text()


def test_a_model_is_left_with_the_end_in_its_generation_config(run) -> None:
    output = run(method="full").output
    assert GenerationConfig.from_pretrained(output).eos_token_id == [TURN_END, 1]
    assert "eos_token_id" not in (output / "README.md").read_text()


def test_the_usual_end_needs_no_word(run, caplog) -> None:
    caplog.set_level(logging.INFO, "s2ft")
    output = run(CHAT_TEMPLATE, ratios=0.25).output
    assert "answers end" not in caplog.text
    assert "laid out differently" not in caplog.text
    assert "eos_token_id" not in (output / "README.md").read_text()


def test_a_prompt_that_changes_once_it_is_answered_is_warned_of(run, caplog) -> None:
    run(CHATML.replace("<|im_start|>assistant\n", "<|im_start|>assistant\n<think>"), ratios=0.25)
    assert "4 of 4 prompts are laid out differently by the chat template once the answer follows" in caplog.text


def test_a_template_that_ends_no_turn_is_warned_of(run, caplog) -> None:
    card = run(ENDLESS_TURNS, ratios=0.25).card
    assert "4 of 4 responses hold no token that ends an answer, so the model will not learn to stop" in caplog.text
    assert card["data"]["without_end"] == 4
