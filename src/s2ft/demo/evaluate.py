"""Exact match: the share of examples whose greedy completion is the expected one, to the letter."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from s2ft.common.errors import S2FTError
from s2ft.demo.skills import Example
from s2ft.evaluate.engines import TransformersEngine
from s2ft.evaluate.tasks import Decoding


@dataclass(frozen=True)
class Score:
    """How a model did on some examples."""

    accuracy: float  # in [0, 1]
    completions: list[str]  # in the order of the examples


def exact_match(model: Any, tokenizer: Any, examples: Sequence[Example], batch_size: int = 128) -> Score:
    """Scores any causal language model (a PEFT model too) on examples of {"prompt", "completion"}.

    A completion may be one token longer than the longest expected one: the end of text.

    Raises:
        S2FTError: if a completion could not be produced.
    """
    prompts = [tokenizer(example["prompt"]).input_ids for example in examples]
    expected = [tokenizer(example["completion"], add_special_tokens=False).input_ids for example in examples]
    decoding = Decoding(beams=1, max_new_tokens=1 + max(map(len, expected), default=0))
    engine = TransformersEngine(model, tokenizer, batch_size)
    answers = dict(pair for batch in engine.answers(prompts, decoding) for pair in batch)
    completions = []
    for index in range(len(examples)):
        text = answers[index].text
        if text is None:
            raise S2FTError(f"no completion of {examples[index]['prompt']!r}: {answers[index].error}")
        completions.append(text)
    right = sum(example["completion"] == text for example, text in zip(examples, completions, strict=True))
    return Score(right / max(1, len(examples)), completions)
