"""The chat templates of real models that TRL brings along: plain chat passes, and what they drop of a call is noticed."""

import re
from pathlib import Path

import pytest
import trl
from trl.chat_template_utils import supports_tool_calling

from s2ft import S2FTError
from s2ft.data.template import left_out, turn_end
from tiny_base import byte_tokenizer

OF_PARTS = ("llava_next",)  # takes content in parts only
FILES = Path(trl.__file__).parent.glob("chat_templates/*.jinja")
TEMPLATES = sorted(path for path in FILES if "training" not in path.stem and path.stem not in OF_PARTS)
ENDS = {
    "qwen3": "<|im_end|>",
    "llama3_1": "<|eot_id|>",
    "gemma3": "<end_of_turn>",
    "phi3": "<|end|>",
    "gptoss": "<|return|>",
}
ENDS |= {"deepseekv3": "<｜end▁of▁sentence｜>", "glm4moe": None}  # the last ends a turn by beginning the next
USER = {"role": "user", "content": "one?"}
ANSWER = {"role": "assistant", "content": "two"}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Bonn"}}}
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "name": "weather", "content": "wet"}


def tokenizer_with(template: str):
    """A byte tokenizer that knows the template's control tokens."""
    tokens = set(re.findall(r"<[|｜][^<>]+[|｜]>|<[a-z_]+_of_turn>|<END[A-Z_]+>", template))
    tokenizer = byte_tokenizer(template, sorted(token for token in tokens if " " not in token))
    tokenizer.bos_token = "<pad>"
    return tokenizer


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_what_a_template_takes_and_what_it_drops(path) -> None:
    tokenizer = tokenizer_with(path.read_text(encoding="utf-8"))
    assert list(left_out(tokenizer, [USER, ANSWER, USER, {**ANSWER, "content": " three  "}], {}, 3)) == []
    try:
        lost = list(left_out(tokenizer, [USER, CALLING, RESULT, ANSWER], {}, 3))
    except S2FTError as error:
        lost = [str(error)]
    assert (lost == []) == supports_tool_calling(tokenizer), lost
    if path.stem in ENDS:
        end = turn_end(tokenizer)
        assert ENDS[path.stem] == (None if end is None else tokenizer.convert_ids_to_tokens(end))


def test_there_are_templates_to_try_and_those_whose_end_is_known_are_among_them() -> None:
    assert len(TEMPLATES) >= 40
    assert set(ENDS) <= {path.stem for path in TEMPLATES}


def test_a_text_beside_a_call_is_not_always_taken() -> None:
    takes = {}
    for name in ("llama3_1", "qwen3"):
        text = next(path for path in TEMPLATES if path.stem == name).read_text(encoding="utf-8")
        takes[name] = list(left_out(tokenizer_with(text), [USER, {**CALLING, "content": "Let me look."}], {}, 1))
    assert takes == {"llama3_1": ["content of message 2 (assistant)"], "qwen3": []}
