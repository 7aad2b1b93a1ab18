"""The prompts: one place, so that training, evaluation and serving ask a model in the same words.

A record in the Alpaca layout becomes the Alpaca prompt; the response begins right after `### Response:`.

Source: https://github.com/tatsu-lab/stanford_alpaca (prompts of train.py), which LLM-Adapters and the S²FT paper use.
"""

from collections.abc import Mapping, Sequence

_PREAMBLE, _RESPONSE = "Below is an instruction that describes a task", "\n\n### Response:\n"
_WITHOUT_INPUT = (
    f"{_PREAMBLE}. Write a response that appropriately completes the request.\n\n"
    f"### Instruction:\n{{instruction}}{_RESPONSE}"
)
_WITH_INPUT = (
    f"{_PREAMBLE}, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    f"### Instruction:\n{{instruction}}\n\n### Input:\n{{input}}{_RESPONSE}"
)


def alpaca_prompt(instruction: str, input: str = "") -> str:
    """The prompt for an instruction, up to where the response begins.

    Example:
        >>> alpaca_prompt("Add 2 and 3.").splitlines()[-4:]
        ['### Instruction:', 'Add 2 and 3.', '', '### Response:']
        >>> "### Input:" in alpaca_prompt("Add them.", "2 and 3")
        True
    """
    template = _WITH_INPUT if input.strip() else _WITHOUT_INPUT
    return template.format(instruction=instruction, input=input)


def is_alpaca(prompt: str) -> bool:
    """Whether a prompt is made by `alpaca_prompt`.

    Example:
        >>> is_alpaca(alpaca_prompt("Add 2 and 3.")), is_alpaca("2 + 3 =")
        (True, False)
    """
    return prompt.startswith(_PREAMBLE) and prompt.endswith(_RESPONSE)


def alpaca_example(record: Mapping[str, str]) -> dict[str, str]:
    """A record (`instruction`, `output`, and maybe `input`) as a prompt and its completion.

    Example:
        >>> alpaca_example({"instruction": "Add 2 and 3.", "output": "5"})["completion"]
        '5'
    """
    prompt = alpaca_prompt(record["instruction"], record.get("input") or "")
    return {"prompt": prompt, "completion": record["output"]}


def alpaca_conversation(turns: Sequence[tuple[str, str]], instruction: str) -> str:
    """The prompt for an instruction that follows on earlier ones and their answers.

    Example:
        >>> alpaca_conversation([("Add 2 and 3.", "5")], "And 1?").splitlines()[-7:]
        ['### Response:', '5', '', '### Instruction:', 'And 1?', '', '### Response:']
        >>> alpaca_conversation([], "Add 2 and 3.") == alpaca_prompt("Add 2 and 3.")
        True
    """
    text, follow_up = "", "\n\n### Instruction:\n{instruction}\n\n### Response:\n"
    for question, answer in (*turns, (instruction, "")):
        text += (follow_up.format(instruction=question) if text else alpaca_prompt(question)) + answer
    return text
