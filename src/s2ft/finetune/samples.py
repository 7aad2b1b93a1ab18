"""What base and result answer to the same prompts, beside the data's own answer: `--samples N`, for the report.

Prompts are those of the first held-out examples, or of the first that were trained on; of a text without a prompt, its first
half. Answers are greedy.
"""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from s2ft.data.tokens import IGNORED
from s2ft.evaluate.engines import TransformersEngine
from s2ft.evaluate.tasks import Decoding

GREEDY = Decoding(beams=1, max_new_tokens=96)


class Samples:
    """Asks the base, which may be gone after training, and then the result."""

    def __init__(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, count: int) -> None:
        self._rows = [rows[index] for index in range(min(count, len(rows)))]
        self._tokenizer = tokenizer
        self._base: list[str] | None = None

    def ask_base(self, model: Any) -> None:
        """Asks a model that training is about to change."""
        self._base = self._answers(model)

    def compare(self, model: Any) -> list[dict[str, str]]:
        """For the run card. A model with an adapter is its own base, with the adapter switched off."""
        if not self._rows:
            return []
        if self._base is None:
            with model.disable_adapter():
                self.ask_base(model)
        assert self._base is not None
        known = zip(self._rows, self._base, self._answers(model), strict=True)
        return [
            {"prompt": self._text(_prompt(row)), "base": base, "tuned": tuned, "wanted": self._text(_response(row))}
            for row, base, tuned in known
        ]

    def _answers(self, model: Any) -> list[str]:
        engine, found = TransformersEngine(model, self._tokenizer), [""] * len(self._rows)
        for batch in engine.answers([_prompt(row) for row in self._rows], GREEDY):
            for index, answer in batch:
                told = f"{answer.text}{' …' if answer.truncated else ''}"
                found[index] = told if answer.error is None else f"(no answer: {answer.error})"
        return found

    def _text(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))


def _prompt(row: dict[str, list[int]]) -> list[int]:
    return row["input_ids"][: _start(row)]


def _response(row: dict[str, list[int]]) -> list[int]:
    return [label for label in row["labels"][_start(row) :] if label != IGNORED]


def _start(row: dict[str, list[int]]) -> int:
    """Where the answer begins: with the first token that is learned, if there are others before."""
    first = next(place for place, label in enumerate(row["labels"]) if label != IGNORED)
    return first or -(-len(row["labels"]) // 2)
