"""Chat records of every kind: what is learned of them, what the template is given, and what is refused by its line."""

import json
import threading

import pytest

from s2ft import S2FTError
from s2ft.data import template
from s2ft.data.examples import conversation, data_digest, load_examples
from s2ft.data.template import turn_end
from s2ft.data.tokens import IGNORED, end_tokens, token_example, tokenize
from templates import (
    CALL,
    CALLING,
    ENDLESS_TURNS,
    LLAMA3,
    PAIR,
    RESULT,
    TOOLS,
    WITHOUT_CALLS,
    WITHOUT_CONTENT,
    WITHOUT_TOOL_TURNS,
)
from tiny_base import CHAT_TEMPLATE, CHATML, CHATML_TOKENS, byte_tokenizer

USER, ANSWER = {"role": "user", "content": "Rain in Bonn?"}, {"role": "assistant", "content": "Yes, rain."}


def chatml(chat_template=CHATML):
    return byte_tokenizer(chat_template, CHATML_TOKENS)


def load(tmp_path, *records):
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return load_examples(str(path))


def learned(tmp_path, *records, tokenizer=None):
    """The texts that the loss falls on, one for each example."""
    tokenizer = tokenizer or chatml()
    rows = tokenize(load(tmp_path, *records), tokenizer, max_length=2000).dataset["labels"][:]
    return [tokenizer.decode([label for label in row if label != IGNORED]) for row in rows]


def refusal(tmp_path, *records, tokenizer=None):
    with pytest.raises(S2FTError) as caught:
        learned(tmp_path, *records, tokenizer=tokenizer)
    return str(caught.value).replace(str(tmp_path), "")


class TestCalls:
    def test_a_call_is_learned_with_the_text_beside_it(self, tmp_path) -> None:
        told = learned(tmp_path, {"messages": [USER, CALLING, RESULT, ANSWER]})
        written = json.dumps({"name": "weather", "arguments": {"city": "Bonn", "days": None}})
        assert told == [f"Let me look.<call>{written}</call><|im_end|>\n", "Yes, rain.<|im_end|>\n"]

    def test_a_call_without_text_is_a_response(self, tmp_path) -> None:
        for content in ({"content": ""}, {"content": None}, {}):
            alone = {"role": "assistant", "tool_calls": [CALL], **content}
            assert len(learned(tmp_path, {"messages": [USER, alone]})) == 1

    def test_arguments_as_text_are_not_written_as_a_text_in_json(self, tmp_path) -> None:
        function = {"name": "weather", "arguments": json.dumps(CALL["function"]["arguments"])}
        openai = {**CALLING, "tool_calls": [{**CALL, "id": "call_1", "function": function}]}
        assert learned(tmp_path, {"messages": [USER, openai]}) == learned(tmp_path, {"messages": [USER, CALLING]})

    def test_a_template_that_joins_arguments_to_text_gets_them_as_text(self, tmp_path) -> None:
        joins = CHATML.replace("call.function | tojson", "call.function.name + call.function.arguments")
        told = learned(tmp_path, {"messages": [USER, CALLING]}, tokenizer=chatml(joins))
        assert told == ['Let me look.<call>weather{"city": "Bonn", "days": null}</call><|im_end|>\n']

    def test_prompts_are_what_the_template_makes_of_the_same_messages(self, tmp_path) -> None:
        tokenizer, messages = chatml(), [USER, CALLING, RESULT, ANSWER]
        dataset = load(tmp_path, {"messages": messages, "tools": TOOLS}, {"messages": [USER, ANSWER]})
        rows = [token_example(example, tokenizer) for example in dataset]
        whole = [(messages[:2], TOOLS), (messages, TOOLS), ([USER, ANSWER], None)]
        expected = [
            tokenizer.apply_chat_template(part, tools=tools, return_dict=False, tokenize=True) for part, tools in whole
        ]
        assert [row["input_ids"] for row in rows] == expected
        assert "parameters" in tokenizer.decode(expected[0])

    def test_tools_may_be_json_as_trl_takes_them(self, tmp_path) -> None:
        given = [load(tmp_path, {"messages": [USER, ANSWER], "tools": tools}) for tools in (TOOLS, json.dumps(TOOLS))]
        assert given[0].to_list() == given[1].to_list()
        assert data_digest(given[0]) != data_digest(load(tmp_path, {"messages": [USER, ANSWER]}))

    @pytest.mark.parametrize(
        ("bare", "lost"),
        [
            (WITHOUT_CALLS, "tool_calls of message 2 (assistant)"),
            (WITHOUT_CONTENT, "content of message 2 (assistant)"),
            (WITHOUT_TOOL_TURNS, "content of message 3 (tool)"),
            (CHATML.replace("{% if tools %}", "{% if false %}"), "tools"),
        ],
    )
    def test_what_the_template_leaves_out_is_refused_by_line(self, tmp_path, bare, lost) -> None:
        record = {"messages": [USER, CALLING, RESULT, ANSWER], "tools": TOOLS}
        said = refusal(tmp_path, {"messages": [USER, ANSWER]}, record, tokenizer=chatml(bare))
        assert said.startswith(f"/chat.jsonl:2: the model's chat template leaves out {lost}, so it would be lost")

    def test_what_plain_templates_take_is_not_refused(self, tmp_path) -> None:
        turns = [{"role": "system", "content": "Be brief."}, USER, {**ANSWER, "name": "bot", "id": 7}, USER, ANSWER]
        assert (
            learned(tmp_path, {"messages": turns}, tokenizer=byte_tokenizer(CHAT_TEMPLATE)) == ["Yes, rain.<eos>"] * 2
        )


class TestWhatIsLearned:
    def test_words_of_the_user_in_a_completion_are_not(self, tmp_path) -> None:
        record = {"prompt": [USER], "completion": [CALLING, RESULT, ANSWER, {**USER, "content": "Thanks!"}]}
        assert learned(tmp_path, record) == learned(tmp_path, {"messages": [USER, CALLING, RESULT, ANSWER]})
        earlier = {"prompt": [USER, CALLING, RESULT], "completion": [ANSWER]}
        assert learned(tmp_path, earlier) == ["Yes, rain.<|im_end|>\n"]

    def test_a_completion_without_an_answer_is_refused(self, tmp_path) -> None:
        assert "completion has no turn with the role 'assistant'" in refusal(
            tmp_path, {"prompt": [USER], "completion": [USER]}
        )

    @pytest.mark.parametrize("switch", [{"weight": 0}, {"train": False}, {"weight": 0.0, "train": True}])
    def test_a_turn_that_is_switched_off_is_said_but_not_learned(self, tmp_path, switch) -> None:
        first = {"role": "assistant", "content": "Perhaps."}
        dataset = load(tmp_path, {"messages": [USER, {**first, **switch}, USER, {**ANSWER, "weight": 1}]})
        assert [conversation(example)[:2] for example in dataset] == [([USER, first, USER], [ANSWER])]

    def test_reasoning_is_learned(self, tmp_path) -> None:
        thinking = {**ANSWER, "reasoning_content": "Clouds."}
        assert (
            learned(tmp_path, {"messages": [USER, thinking, USER, thinking]})
            == ["<think>Clouds.</think>Yes, rain.<|im_end|>\n"] * 2
        )
        said = refusal(tmp_path, {"messages": [USER, thinking]}, tokenizer=byte_tokenizer(CHAT_TEMPLATE))
        assert "leaves out reasoning of message 2 (assistant)" in said

    def test_a_system_of_the_record_comes_first(self, tmp_path) -> None:
        system = {"role": "system", "content": "Be brief."}
        for record in ({"messages": [USER, ANSWER]}, {"prompt": [USER], "completion": [ANSWER]}):
            given, meant = (
                load(tmp_path, {**record, "system": "Be brief."}),
                load(tmp_path, {"messages": [system, USER, ANSWER]}),
            )
            assert data_digest(given) == data_digest(meant)
        both = {"messages": [system, USER, ANSWER], "system": "Be long."}
        assert 'system is "Be long.", but the messages open with a system message' in refusal(tmp_path, both)
        ignores = CHATML.replace("in messages %}", "in messages if message.role != 'system' %}")
        said = refusal(tmp_path, {"messages": [USER, ANSWER], "system": "Be brief."}, tokenizer=chatml(ignores))
        assert "leaves out content of message 1 (system)" in said

    def test_variables_of_the_template_are_passed_on(self, tmp_path) -> None:
        shouts = chatml(
            CHATML.replace("{{ message.content }}", "{{ message.content | upper if loud else message.content }}")
        )
        loud = {"messages": [USER, ANSWER], "chat_template_kwargs": {"loud": True}}
        assert learned(tmp_path, loud, tokenizer=shouts) == ["YES, RAIN.<|im_end|>\n"]
        for name in ("loud", "padding"):  # what the template does not know, and what is not meant for it
            record = {"messages": [USER, ANSWER], "chat_template_kwargs": {name: True}}
            assert f"leaves out chat_template_kwargs.{name}, so it would be lost" in refusal(tmp_path, record)


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"messages": [USER, {**ANSWER, "weight": 0.5}]}, "messages[1].weight is 0.5; it must be 0 or 1"),
        ({"messages": [USER, {**ANSWER, "train": 1}]}, "messages[1].train is 1; it must be false or true"),
        ({"messages": [{**USER, "train": True}, ANSWER]}, "only turns of the role 'assistant' are learned"),
        ({"messages": [USER, ANSWER], "weight": 0.3}, "weight is 0.3; no chat template here is given that"),
        ({"messages": [USER, ANSWER], "functions": TOOLS}, "functions is [{"),
        ({"messages": [USER, {**ANSWER, "function_call": CALL}]}, "messages[1] has function_call"),
        ({"messages": [USER, {**ANSWER, "tool_calls": "weather()"}]}, 'messages[1].tool_calls is "weather()"; it must be'),
        ({"messages": [USER, {**ANSWER, "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]}, "tool_calls is"),
        ({"messages": [USER, ANSWER], "tools": "weather"}, 'tools is "weather"; it must be a list of objects'),
        ({"messages": [USER, ANSWER], "chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs is {"),
        ({"messages": [USER, {"role": "assistant"}]}, "messages[1] is"),
        ({"messages": [USER, {**ANSWER, "reasoning_content": ["x"]}]}, "reasoning_content is"),
        ({"messages": [USER, {**ANSWER, "reasoning": "\ud83d"}]}, "half of a surrogate pair"),
        ({"messages": [USER, ANSWER], "chat_template_kwargs": {"x": "\ud83d"}}, "half of a surrogate pair"),
        ({"instruction": "a", "output": "b", "system": "Be brief."}, 'system is "Be brief.", which a prompt of text'),
        ({"prompt": "a", "completion": "b", "tools": TOOLS}, "tools is [{"),
    ],
)  # fmt: skip
def test_what_cannot_be_honoured_is_refused_by_line(tmp_path, record, said) -> None:
    message = refusal(tmp_path, {"messages": [USER, ANSWER]}, record)
    assert message.startswith("/chat.jsonl:2: ")
    assert said in message


@pytest.mark.parametrize("place", ["messages", "tools"])
def test_what_is_nested_deeply_is_refused_by_line_if_at_all(tmp_path, place) -> None:
    path, refused = tmp_path / "chat.jsonl", 0
    for levels in (20, 200, *range(850, 1050, 40), 5000):
        record = {"messages": [USER, {**ANSWER, "id": "X"}], "tools": [{"x": "X"}]}
        text = json.dumps(
            {"messages": record[place]} if place == "messages" else {**record, "messages": [USER, ANSWER]}
        )
        path.write_text(text.replace('"X"', "[" * levels + "]" * levels))
        try:
            assert len(tokenize(load_examples(str(path)), chatml(), max_length=9000).dataset) == 1
        except S2FTError as error:
            refused += 1
            assert str(error).startswith(f"{path}:1: ")  # noqa: PT017
    assert refused > 0


def test_columns_beside_the_layout_do_not_matter(tmp_path) -> None:
    alpaca = {"instruction": "Add 2 and 3.", "output": "5"}
    plain = load(tmp_path, alpaca).to_list()
    for name in ("prompt", "completion", "answer"):
        assert load(tmp_path, {**alpaca, name: "other"}).to_list() == plain


class TestEnds:
    @pytest.mark.parametrize(
        ("tokenizer", "ends"),
        [
            (chatml(), ["<eos>", "<|im_end|>"]),
            (byte_tokenizer(LLAMA3, ["<s>", "<|start|>", "<|end|>", "<|eot_id|>"]), ["<eos>", "<|eot_id|>"]),
            (byte_tokenizer(CHAT_TEMPLATE), ["<eos>"]),
            (byte_tokenizer(ENDLESS_TURNS, CHATML_TOKENS), ["<eos>"]),
            (byte_tokenizer(), ["<eos>"]),
        ],
    )
    def test_a_turn_ends_where_the_template_ends_it(self, tokenizer, ends) -> None:
        assert tokenizer.convert_ids_to_tokens(end_tokens(tokenizer)) == ends
        assert turn_end(tokenizer) in (None, end_tokens(tokenizer)[-1])

    def test_responses_without_an_end_are_counted(self, tmp_path) -> None:
        dataset = load(tmp_path, *[{"messages": [USER, ANSWER]}] * 3)
        found = tokenize(dataset, byte_tokenizer(ENDLESS_TURNS), max_length=200)
        assert (found.endless, len(found.dataset)) == (3, 3)
        assert tokenize(dataset, chatml(), max_length=200).endless == 0


@pytest.mark.parametrize("when", ["true", "messages | length > 2", "add_generation_prompt"])
def test_a_template_without_an_end_is_left_at_once_and_stopped(tmp_path, monkeypatch, when) -> None:
    monkeypatch.setattr(template, "SECONDS", 0.3)
    loops = "".join(f"{{% for {name} in range(99999) %}}" for name in "abcd") + "{% endfor %}" * 4
    endless = chatml(f"{{% if {when} %}}{loops}{{% endif %}}{CHATML}")
    said = refusal(tmp_path, *[{"messages": [USER, ANSWER, USER, ANSWER]}] * 200, tokenizer=endless)
    assert said.startswith("the model's chat template did not come to an end within 0.3 seconds")
    for thread in threading.enumerate():
        if thread.name == "chat template":
            thread.join(20)
            assert not thread.is_alive()


class TestAround:
    """Tokenizers that put tokens of their own around every text."""

    @pytest.mark.parametrize("around", ["<s> $A <eos>", "$A <eos>", "<s> $A", "$A", "<s> $A <sep>"])
    @pytest.mark.parametrize("pair", [PAIR, {**PAIR, "completion": "5<eos>"}, {**PAIR, "prompt": ""}])
    def test_beginning_and_end_stand_there_once(self, around, pair) -> None:
        tokenizer = byte_tokenizer(None, ["<s>", "<sep>"], around)
        row = token_example(pair, tokenizer)
        begin = "<s>" if around.startswith("<s>") else ""
        assert tokenizer.decode(row["input_ids"]) == f"{begin}{pair['prompt']}5<eos>"
        assert tokenizer.decode([label for label in row["labels"] if label != IGNORED]) == "5<eos>"

    def test_a_beginning_that_the_text_brings_is_not_doubled(self) -> None:
        tokenizer = byte_tokenizer(None, ["<s>"], "<s> $A <eos>")
        brought = token_example({"prompt": "<s>2+3=", "completion": "5"}, tokenizer)
        assert brought == token_example(PAIR, tokenizer)
